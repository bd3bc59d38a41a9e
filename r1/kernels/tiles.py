"""How kernels read weights: "load this tile of W, however it is stored".

A launch is given an `Operand` of each matrix. In the kernel, `matrix_of` finds one matrix of a
stack, and `load_tile` loads a tile of it. A product with a vector takes two steps instead: `load`
only loads, so a loop may do it far ahead, and `times` multiplies. A storage has a format: a branch
in `operand` and in packed.py. The kernels' bodies are the same for all.

| format | a number is stored as | `load_tile` gives |
|---|---|---|
| dense | itself | the numbers as they are |
| int8 | a byte, -128 to 127 | fp32: (number - zero point) * scale |
| int4 | half a byte, 0 to 15, the even column low | fp32, likewise; without zero points: - 8 |
| fp8 | e4m3 | fp32: number * scale |

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
from r1.kernels.chip import product
from r1.kernels.packed import along, by_columns, load_words, times_unpacked, unpack, unpacked
from r1.model.strategy import without_kernels
from r1.storage.dense import Dense
from r1.storage.joined import Part, whole_of
from r1.storage.matrix import Matrix
from r1.storage.quantized import Quantized

SHARE = 16
"""Bytes of a row that a thread has side by side. A scale is loaded once for their columns."""

BITS = {"fp8": 8, "int8": 8, "int4": 4}


class Operand(NamedTuple):
    """A matrix, or a stack of them, as a kernel's argument. The constants are compiled in."""

    weight: Tensor
    """The numbers, or words of packed ones."""
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
    PER: tl.constexpr = tl.constexpr(1)
    """Numbers in an element of `weight`."""
    PTX: tl.constexpr = tl.constexpr(False)
    """Whether the chip's own instructions unpack them (packed.py)."""
    ZEROS: tl.constexpr = tl.constexpr(False)
    """Whether there are zero points."""
    SCALE_ROW: tl.constexpr = tl.constexpr(0)
    SCALE_EXPERT: tl.constexpr = tl.constexpr(0)
    """The same of `scale`. Rows of `zero` are as far apart as rows of `scale`."""
    ZERO_EXPERT: tl.constexpr = tl.constexpr(0)
    """The same of `zero`: where an expert is a row of bytes, its numbers are of another width."""
    TALL: tl.constexpr = tl.constexpr(1)
    WIDE: tl.constexpr = tl.constexpr(1)
    """Rows and columns of a block."""
    TOGETHER: tl.constexpr = tl.constexpr(1)
    """Columns, of at most SHARE bytes, that have one scale wherever a multiple of it begins."""


def operand(matrix: Matrix | Tensor, ptx: bool = False) -> Operand:
    """The operand of a matrix object, or of a dense tensor with contiguous rows.

    `ptx` is Chip.ptx. Raises InputError for a storage without a format.
    """
    if isinstance(matrix, Tensor):
        return _dense(matrix)
    stored = whole_of(matrix)
    if not isinstance(stored, Quantized):
        return _dense(tensor_of(matrix))
    if why := why_not(matrix):
        raise InputError(why)
    return _packed(stored, matrix.stored(), ptx)


def tensor_of(matrix: Matrix) -> Tensor:
    """The tensor, or the view of one, that holds a dense matrix. Raises InputError if none does."""
    stored = whole_of(matrix)
    if not isinstance(stored, Dense):
        raise InputError(_unreadable(stored))
    if isinstance(matrix, Part):
        return stored.weight.narrow(-2, matrix.start, matrix.stop - matrix.start)
    return stored.weight


def packed_bits(matrix: Matrix) -> tuple[int, ...]:
    """For launch parameters: the bits of a packed number; nothing for a dense matrix."""
    stored = whole_of(matrix)
    return (BITS[stored.spec.kind],) if isinstance(stored, Quantized) else ()


def block_of(matrix: Matrix) -> tuple[int, int]:
    """Rows and columns that share a scale; 0: all of them, or there is no scale."""
    stored = whole_of(matrix)
    return (stored.spec.rows, stored.spec.columns) if isinstance(stored, Quantized) else (0, 0)


def _dense(weight: Tensor) -> Operand:
    row, expert = _strides(weight.stride())
    return Operand(weight, weight, weight, row, expert, _constant("dense"))


def _packed(matrix: Quantized, tensors: dict[str, Tensor], ptx: bool) -> Operand:
    """The operand of a quantized matrix, or of rows of it, from its stored tensors."""
    packed, scale, zero, _ = (tensors.get(name) for name in matrix.NAMES)
    assert packed is not None and scale is not None
    spec, weight = matrix.spec, _words(packed.view(torch.uint8))
    per = 8 * weight.itemsize // BITS[spec.kind]
    wide, share = spec.columns or 2**30, 8 * SHARE // BITS[spec.kind]
    together = next(n for n in (share, 16, 8, 4, 2, 1) if wide % n == 0)
    return Operand(
        weight, scale, scale if zero is None else zero, *_strides(weight.stride()),
        _constant(spec.kind), _constant(per), _constant(ptx and weight.itemsize == 4),
        _constant(zero is not None), *_strides(scale.stride()),
        _strides((scale if zero is None else zero).stride())[1], _constant(spec.rows or 2**30),
        _constant(wide), _constant(together),
    )  # fmt: skip


def _words(packed: Tensor) -> Tensor:
    """Bytes (..., n) as words, the widest that every row is a whole number of."""
    for word in (torch.int32, torch.int16):
        sizes = (packed.shape[-1], packed.storage_offset(), *packed.stride()[:-1])
        if all(size % word.itemsize == 0 for size in sizes):
            return packed.view(word)
    return packed


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
        stored = whole_of(matrix)
        if (lack := _lack(stored)) is not None:
            return _unreadable(stored, lack)
    return None


def _unreadable(stored: Matrix, lack: str = "") -> str:
    reads = f"the Triton kernels can't read weights stored as {type(stored).__name__}{lack}"
    return f"{reads}: {without_kernels()}"


def unpacks(matrix: Matrix) -> bool:
    """Whether this is a packed matrix, with a format."""
    stored = whole_of(matrix)
    return isinstance(stored, Quantized) and _lack(stored) is None


def _lack(stored: Matrix) -> str | None:
    """What of a storage has no format; "": all of it."""
    if isinstance(stored, Quantized):
        if stored.spec.indexed:
            return " with reordered columns (g_idx)"
        if stored.spec.kind == "int4" and stored.shape[-1] % 2:
            return f" of {stored.shape[-1]} columns, an odd number"
        return None
    return None if isinstance(stored, Dense) else ""


@triton.jit
def matrix_of(w, expert, row=0, column=0):
    """Matrix `expert` of a stack (0 of a single one), from `row` and `column` on, where a block
    must begin: the places of its numbers, scales and zero points, and the steps from row to row.
    """
    if w.FORMAT == "dense":
        place = w.weight + expert * w.EXPERT + row * w.ROW + column
    else:
        place = w.weight + expert * w.EXPERT + row * w.ROW + column // w.PER
    block = row // w.TALL * w.SCALE_ROW + column // w.WIDE
    scale, zero = w.scale + expert * w.SCALE_EXPERT, w.zero + expert * w.ZERO_EXPERT
    return place, scale + block, zero + block, w.ROW, w.SCALE_ROW


@triton.jit
def expert_of(routed, shared, expert, count, row, column, SHARED: tl.constexpr):
    """Matrix `expert` of the routed experts. From number `count` on: the shared experts' matrix,
    from `row` and `column` on. Both have one format.
    """
    place, scale, zero, stride, scale_stride = matrix_of(routed, 0)
    if expert < count:
        place += expert.to(tl.int64) * routed.EXPERT
        scale += expert.to(tl.int64) * routed.SCALE_EXPERT
        zero += expert.to(tl.int64) * routed.ZERO_EXPERT
    elif SHARED > 0:
        other = matrix_of(shared, 0, row, column)
        place, scale, zero = other[0], other[1], other[2]
    if SHARED > 0:
        tl.static_assert(routed.FORMAT == shared.FORMAT)
        tl.static_assert(routed.PER == shared.PER)
        tl.static_assert(routed.ZEROS == shared.ZEROS)
        stride = tl.where(expert < count, routed.ROW, shared.ROW)
        scale_stride = tl.where(expert < count, routed.SCALE_ROW, shared.SCALE_ROW)
    return place, scale, zero, stride, scale_stride


@triton.jit
def load_tile(matrix, row, real, column, first, limit, w):
    """The numbers in rows `row` and columns `first` + `column` of `matrix_of`'s or `expert_of`'s
    result; 0 where `real` is False, and from column `limit` on. `w` is their Operand.

    `column` counts up along the last dimension. `first` is one number: where a loop's tile begins.
    """
    return scaled(load(matrix, row, real, column, first, limit, w), w)


@triton.jit
def scaled(loaded, w):
    """The numbers of a tile that `load` has loaded."""
    tile, factor = unpacked(loaded, w)
    if w.FORMAT != "dense":
        values = by_columns(tile, tile.numel // factor.numel)
        tile = tl.reshape(values * tl.expand_dims(factor, len(factor.shape)), tile.shape)
    return tile


@triton.jit
def load(matrix, row, real, column, first, limit, w):
    """What the memory holds of such a tile: its words, and their scales and zero points, fp32."""
    place, scale, zero, stride, scale_stride = matrix
    if w.FORMAT == "dense":
        inside = real & (first + column < limit)
        words, factor, off = tl.load(place + row * stride + column + first, inside, 0.0), 1.0, 0.0
    else:
        COLUMNS: tl.constexpr = column.shape[len(column.shape) - 1]
        N: tl.constexpr = min(w.TOGETHER, COLUMNS)
        words = load_words(place, stride, row, real, column, first, limit, w)
        block = first + along(tl.arange(0, COLUMNS // N), column) * N
        at, some = row // w.TALL * scale_stride + block // w.WIDE, real & (block < limit)
        factor = tl.load(scale + at, some, 0.0).to(tl.float32)
        if w.FORMAT == "fp8" and not w.PTX:
            factor *= 256.0  # see packed.py
        off = tl.load(zero + at, some, 0).to(tl.float32) if w.ZEROS else 0.0
    return words, factor, off


@triton.jit
def add_product(sums, matrix, row, real, column, first, limit, w, v, FLIP: tl.constexpr = False):
    """fp32 sums (rows, tokens) + such a tile times `v` (columns, tokens). With FLIP sums are
    (tokens, rows).

    Where a row has one scale for the whole tile, packed numbers are multiplied first: v's dtype
    holds them exactly, and scales then cost a token's few sums and no weight.
    """
    COLUMNS: tl.constexpr = column.shape[1]
    if w.FORMAT == "dense" or w.ZEROS or w.WIDE % COLUMNS != 0:
        tile = load_tile(matrix, row, real, column, first, limit, w).to(v.dtype)
        sums = product(tl.trans(v), tl.trans(tile), sums) if FLIP else product(tile, v, sums)
    else:
        place, scale, _zero, stride, scale_stride = matrix
        words = load_words(place, stride, row, real, column, first, limit, w)
        tile = unpack(words, w).to(v.dtype)
        factor = tl.load(scale + row // w.TALL * scale_stride + first // w.WIDE, real, 0.0)
        factor = factor.to(tl.float32)  # (rows, 1)
        if w.FORMAT == "fp8" and not w.PTX:
            factor *= 256.0  # see packed.py
        none = tl.zeros(sums.shape, tl.float32)
        if FLIP:
            sums += product(tl.trans(v), tl.trans(tile), none) * tl.trans(factor)
        else:
            sums += product(tile, v, none) * factor
    return sums


@triton.jit
def times(loaded, v, w):
    """A loaded tile times `v`, fp32 (..., C), which lies as the tile does: fp32 (..., C / N), where
    N columns share a scale and are added up. N is 1 for a dense tile.
    """
    return times_unpacked(unpacked(loaded, w), v, w)
