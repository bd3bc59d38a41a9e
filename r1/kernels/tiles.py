"""How kernels read weights: "load a tile of W, however it is stored".

A launch is given an `Operand` of each matrix. In the kernel, `matrix_of` finds one matrix of a
stack, and `load_tile` loads a tile of it. A new storage (fp8, int4) is a new format: a branch in
`operand` and in the functions below, with more fields in `Operand`. The kernels' bodies stay as
they are.

Shapes: (out, in) is one matrix, (E, out, in) a stack of them.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from r1.errors import InputError
from r1.model.strategy import without_kernels
from r1.storage.dense import Dense
from r1.storage.joined import Part
from r1.storage.matrix import Matrix


class Operand(NamedTuple):
    """A matrix, or a stack of them, as a kernel's argument. The constants are compiled in."""

    weight: Tensor
    ROW: tl.constexpr
    """Numbers from one row to the next."""
    EXPERT: tl.constexpr
    """Numbers from one matrix of the stack to the next."""
    FORMAT: tl.constexpr
    """How `weight` is to be read: "dense"."""


def operand(matrix: Matrix | Tensor) -> Operand:
    """The operand of a matrix object, or of a dense tensor with contiguous rows.

    Raises InputError for a storage without a format.
    """
    weight = tensor_of(matrix) if isinstance(matrix, Matrix) else matrix
    return Operand(weight, *_constants(weight.stride()))


def tensor_of(matrix: Matrix) -> Tensor:
    """The tensor, or the view of one, that holds a matrix. Raises InputError where none does."""
    stored = matrix.whole if isinstance(matrix, Part) else matrix
    if not isinstance(stored, Dense):
        raise InputError(why_not(matrix))
    if isinstance(matrix, Part):
        return stored.weight.narrow(-2, matrix.start, matrix.stop - matrix.start)
    return stored.weight


@cache
def _constants(strides: tuple[int, ...]) -> tuple[tl.constexpr, ...]:
    """ROW, EXPERT and FORMAT of a dense tensor."""
    expert, row, column = (0, *strides)[-3:]
    assert column == 1, "a row's numbers lie side by side"
    return tl.constexpr(row), tl.constexpr(expert), tl.constexpr("dense")


def why_not(*matrices: Matrix) -> str | None:
    """One sentence that names the first storage without a format; None where there is none."""
    for matrix in matrices:
        stored = matrix.whole if isinstance(matrix, Part) else matrix
        if not isinstance(stored, Dense):
            reads = f"the Triton kernels can't read weights stored as {type(stored).__name__}"
            return f"{reads}: {without_kernels()}"
    return None


@triton.jit
def matrix_of(w, expert, row=0, column=0):
    """Matrix `expert` of a stack (0 of a single one), from `row` and `column` on: its place and the
    numbers from one row to the next.
    """
    return w.weight + expert * w.EXPERT + row * w.ROW + column, w.ROW


@triton.jit
def expert_of(routed, shared, expert, count, row, column, SHARED: tl.constexpr):
    """Matrix `expert` of the routed experts. From number `count` on: the shared experts' matrix,
    from `row` and `column` on. Both have one format.
    """
    place = routed.weight
    stride = routed.ROW
    if expert < count:
        place += expert.to(tl.int64) * routed.EXPERT
    elif SHARED > 0:
        place = shared.weight + (row * shared.ROW + column)
    if SHARED > 0:
        tl.static_assert(routed.FORMAT == shared.FORMAT)
        stride = tl.where(expert < count, routed.ROW, shared.ROW)
    return place, stride


@triton.jit
def load_tile(matrix, row, column, first, mask, FORMAT: tl.constexpr):
    """The numbers in rows `row` and columns `first` + `column` of `matrix_of`'s or `expert_of`'s
    result; 0 where `mask` is False. `first` is one number: where a loop's tile begins.
    """
    place, stride = matrix
    tl.static_assert(FORMAT == "dense")
    return tl.load(place + row * stride + column + first, mask=mask, other=0.0)
