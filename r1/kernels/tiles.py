"""How kernels read weights: "load this tile of W, however it is stored".

A launch is given an `Operand` of each matrix. In the kernel, `matrix_of` finds one matrix of a
stack, and `load_tile` loads a tile of it. A storage has a format: a branch in `operand` and in
`load_tile`. The kernels' bodies are the same for all.

| format | a number is stored as | `load_tile` gives |
|---|---|---|
| dense | itself | the numbers as they are |
| int8 | a byte, -128 to 127 | fp32: (number - zero point) * scale |
| int4 | half a byte, 0 to 15, the even column low | fp32, likewise; without zero points: - 8 |
| fp8 | e4m3 | fp32: number * scale |
| e4m3 | the same | the same, converted by the chip's own instruction (Chip.e4m3) |

Packed numbers become fp32 in registers. A thread loads some columns of a row side by side, and one
scale for them (see SIDE).

Shapes: (out, in) is one matrix, (E, out, in) a stack of them; (down, across) the grid of blocks
that share a scale (r1/storage/spec.py).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.errors import InputError
from r1.model.strategy import without_kernels
from r1.storage.dense import Dense
from r1.storage.joined import Part
from r1.storage.matrix import Matrix
from r1.storage.quantized import Quantized

SIDE = 16
"""The most columns for which a scale is loaded once: a thread's share of a row, 16 bytes of it."""

BITS = {"fp8": 8, "int8": 8, "int4": 4}


class Operand(NamedTuple):
    """A matrix, or a stack of them, as a kernel's argument. The constants are compiled in."""

    weight: Tensor
    """The numbers, or the packed bytes."""
    scale: Tensor
    """(..., down, across), of a packed format. Dense: not read."""
    zero: Tensor
    """Zero points of the same shape. Not read without ZEROS."""
    ROW: tl.constexpr
    """Elements of `weight` from one row to the next."""
    EXPERT: tl.constexpr
    """Elements of `weight` from one matrix of the stack to the next."""
    FORMAT: tl.constexpr
    """A row of the table above."""
    ZEROS: tl.constexpr = tl.constexpr(False)
    """Whether there are zero points."""
    SCALE_ROW: tl.constexpr = tl.constexpr(0)
    SCALE_EXPERT: tl.constexpr = tl.constexpr(0)
    """The same of `scale` and `zero`."""
    TALL: tl.constexpr = tl.constexpr(1)
    WIDE: tl.constexpr = tl.constexpr(1)
    """Rows and columns of a block."""
    TOGETHER: tl.constexpr = tl.constexpr(1)
    """Columns that have one scale for sure, wherever a multiple of it begins; at most SIDE."""


def operand(matrix: Matrix | Tensor, e4m3: bool = False) -> Operand:
    """The operand of a matrix object, or of a dense tensor with contiguous rows.

    `e4m3` says whether the chip converts FP8 by itself. Raises InputError for a storage without a
    format.
    """
    if isinstance(matrix, Tensor):
        return _dense(matrix)
    stored = matrix.whole if isinstance(matrix, Part) else matrix
    if not isinstance(stored, Quantized):
        return _dense(tensor_of(matrix))
    if why := why_not(matrix):
        raise InputError(why)
    return _packed(stored, matrix.stored(), e4m3)


def tensor_of(matrix: Matrix) -> Tensor:
    """The tensor, or the view of one, that holds a dense matrix. Raises InputError if none does."""
    stored = matrix.whole if isinstance(matrix, Part) else matrix
    if not isinstance(stored, Dense):
        raise InputError(_unreadable(stored))
    if isinstance(matrix, Part):
        return stored.weight.narrow(-2, matrix.start, matrix.stop - matrix.start)
    return stored.weight


def packed_bits(matrix: Matrix) -> tuple[int, ...]:
    """For launch parameters: the bits of a packed number; nothing for a dense matrix."""
    stored = matrix.whole if isinstance(matrix, Part) else matrix
    return (BITS[stored.spec.kind],) if isinstance(stored, Quantized) else ()


def block_of(matrix: Matrix) -> tuple[int, int]:
    """Rows and columns that share a scale; 0: all of them, or there is no scale."""
    stored = matrix.whole if isinstance(matrix, Part) else matrix
    return (stored.spec.rows, stored.spec.columns) if isinstance(stored, Quantized) else (0, 0)


def _dense(weight: Tensor) -> Operand:
    row, expert = _strides(weight.stride())
    return Operand(weight, weight, weight, row, expert, _constant("dense"))


def _packed(matrix: Quantized, tensors: dict[str, Tensor], e4m3: bool) -> Operand:
    """The operand of a quantized matrix, or of rows of it, from its stored tensors."""
    weight, scale, zero, _ = (tensors.get(name) for name in matrix.NAMES)
    assert weight is not None and scale is not None
    weight = weight.view(torch.uint8)
    spec, columns = matrix.spec, matrix.shape[-1]
    kind = "e4m3" if spec.kind == "fp8" and e4m3 else spec.kind
    wide = spec.columns or 2**30
    together = next(n for n in (SIDE, 8, 4, 2, 1) if wide % n == 0 and columns % n == 0)
    blocks = (_constant(size) for size in (spec.rows or 2**30, wide, together))
    return Operand(
        weight, scale, scale if zero is None else zero, *_strides(weight.stride()),
        _constant(kind), _constant(zero is not None), *_strides(scale.stride()), *blocks,
    )  # fmt: skip


def _strides(strides: tuple[int, ...]) -> tuple[tl.constexpr, tl.constexpr]:
    """Elements from a row to the next, and from a matrix to the next."""
    expert, row, column = (0, *strides)[-3:]
    assert column == 1, "a row's numbers lie side by side"
    return _constant(row), _constant(expert)


@cache
def _constant(value: int | str | bool) -> tl.constexpr:
    return tl.constexpr(value)


def why_not(*matrices: Matrix) -> str | None:
    """One sentence that names the first storage without a format; None where there is none."""
    for matrix in matrices:
        stored = matrix.whole if isinstance(matrix, Part) else matrix
        if isinstance(stored, Quantized):
            if stored.spec.indexed:
                return _unreadable(stored, " with reordered columns (g_idx)")
            if stored.spec.kind == "int4" and stored.shape[-1] % 2:
                return _unreadable(stored, f" of {stored.shape[-1]} columns, an odd number")
        elif not isinstance(stored, Dense):
            return _unreadable(stored)
    return None


def _unreadable(stored: Matrix, how: str = "") -> str:
    reads = f"the Triton kernels can't read weights stored as {type(stored).__name__}{how}"
    return f"{reads}: {without_kernels()}"


@triton.jit
def matrix_of(w, expert, row=0, column=0):
    """Matrix `expert` of a stack (0 of a single one), from `row` and `column` on, where a block
    must begin: the places of its numbers, scales and zero points, and the steps from row to row.
    """
    if w.FORMAT == "int4":
        place = w.weight + expert * w.EXPERT + row * w.ROW + column // 2
    else:
        place = w.weight + expert * w.EXPERT + row * w.ROW + column
    block = expert * w.SCALE_EXPERT + row // w.TALL * w.SCALE_ROW + column // w.WIDE
    return place, w.scale + block, w.zero + block, w.ROW, w.SCALE_ROW


@triton.jit
def expert_of(routed, shared, expert, count, row, column, SHARED: tl.constexpr):
    """Matrix `expert` of the routed experts. From number `count` on: the shared experts' matrix,
    from `row` and `column` on. Both have one format.
    """
    place, scale, zero, stride, scale_stride = matrix_of(routed, 0)
    if expert < count:
        place += expert.to(tl.int64) * routed.EXPERT
        scale += expert.to(tl.int64) * routed.SCALE_EXPERT
        zero += expert.to(tl.int64) * routed.SCALE_EXPERT
    elif SHARED > 0:
        other = matrix_of(shared, 0, row, column)
        place, scale, zero = other[0], other[1], other[2]
    if SHARED > 0:
        tl.static_assert(routed.FORMAT == shared.FORMAT)
        tl.static_assert(routed.ZEROS == shared.ZEROS)
        stride = tl.where(expert < count, routed.ROW, shared.ROW)
        scale_stride = tl.where(expert < count, routed.SCALE_ROW, shared.SCALE_ROW)
    return place, scale, zero, stride, scale_stride


@triton.jit
def load_tile(matrix, row, column, first, mask, w):
    """The numbers in rows `row` and columns `first` + `column` of `matrix_of`'s or `expert_of`'s
    result; 0 where `mask` is False. `w` is their Operand.

    `column` counts up along the last dimension. `first` is one number: where a loop's tile begins.
    """
    place, scale, zero, stride, scale_stride = matrix
    if w.FORMAT == "dense":
        tile = tl.load(place + row * stride + column + first, mask=mask, other=0.0)
    else:
        tile = unpacked(place, scale, zero, stride, scale_stride, row, column, first, mask, w)
    return tile


@triton.jit
def unpacked(place, scale, zero, stride, scale_stride, row, column, first, mask, w):
    """`load_tile` of a packed format, in fp32. Here `column` lies along the last dimension."""
    COLUMNS: tl.constexpr = column.shape[len(column.shape) - 1]
    if w.FORMAT == "int4":
        byte = along(tl.arange(0, COLUMNS // 2), column)
        pair = tl.load(place + row * stride + (first // 2 + byte), mask=some_of(mask, 2), other=0)
        numbers = tl.reshape(tl.join(pair & 15, pair >> 4), mask.shape)
    else:
        numbers = tl.load(place + row * stride + (column + first), mask=mask, other=0)
    TOGETHER: tl.constexpr = min(w.TOGETHER, COLUMNS)
    start = along(tl.arange(0, COLUMNS // TOGETHER) * TOGETHER, column)
    at = row // w.TALL * scale_stride + (first + start) // w.WIDE
    some = some_of(mask, TOGETHER)
    factor = tl.load(scale + at, mask=some, other=0.0).to(tl.float32)
    if w.FORMAT == "e4m3":
        numbers = numbers.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
    elif w.FORMAT == "fp8":
        # e4m3 is SEEEEMMM and fp16 SEEEEEMMMMMMMMMM, with exponents biased by 7 and 15. So the same
        # bits are a 256th of the number. (Not every GPU converts e4m3 by itself.)
        bits = ((numbers & 0x80).to(tl.uint16) << 8) | ((numbers & 0x7F).to(tl.uint16) << 7)
        numbers = bits.to(tl.float16, bitcast=True).to(tl.float32)
        factor *= 256.0
    else:
        # A number below 256 in the lowest bits of 2^23, less 2^23: two operations at full speed,
        # where a chip converts integers at a quarter of it.
        if w.FORMAT == "int8":
            numbers ^= 0x80  # -128 to 127 become 0 to 255
        numbers = (numbers.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
        if w.FORMAT == "int8":
            numbers -= 8388608.0 + 128.0
        elif w.ZEROS:
            numbers -= 8388608.0
        else:
            numbers -= 8388608.0 + 8.0
    values = by_columns(numbers, TOGETHER)
    if w.ZEROS:
        off = tl.load(zero + at, mask=some, other=0).to(tl.float32)
        values -= tl.expand_dims(off, len(mask.shape))
    return tl.reshape(values * tl.expand_dims(factor, len(mask.shape)), mask.shape)


@triton.jit
def along(numbers, column):
    """One dimension of numbers, made to lie as `column` lies: along the last dimension."""
    return numbers[None, None, :] if len(column.shape) == 3 else numbers[None, :]


@triton.jit
def by_columns(tile, N: tl.constexpr):
    """(..., columns) -> (..., columns / N, N)."""
    if len(tile.shape) == 3:
        split = tl.reshape(tile, (tile.shape[0], tile.shape[1], tile.shape[2] // N, N))
    else:
        split = tl.reshape(tile, (tile.shape[0], tile.shape[1] // N, N))
    return split


@triton.jit
def some_of(mask, N: tl.constexpr):
    """Whether one of N columns side by side is wanted: (..., columns) -> (..., columns / N)."""
    return tl.max(by_columns(mask.to(tl.int32), N), axis=len(mask.shape)) > 0
