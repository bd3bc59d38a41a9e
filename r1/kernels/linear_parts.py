"""A projection of several tokens with few outputs: columns are cut into parts.

Few programs would go through their rows step after step. Here each warp has a part of the columns,
and the sums of all parts are added up at the end. With eight parts there are an eighth of the
steps. The first two tiles of weights are loaded before the wait.

Shapes: N tokens; out and in are W's rows and columns; P parts, each of in / P columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.chip import let_next_start, product, wait_for_previous
from r1.kernels.packed import load_words, unpack
from r1.kernels.tiles import Operand, load, matrix_of, scaled


def can_cut(weight: Operand, inputs: int, parts: int, step: int) -> bool:
    """Whether rows of so many columns are whole steps of so many parts, which begin at blocks; or
    there is one part.
    """
    if parts == 1:
        return True
    wide, whole = min(weight.WIDE.value, inputs), inputs % (parts * step) == 0
    return whole and (wide == inputs or inputs // parts % wide == 0)


@triton.jit
def parts_kernel(
    x, x_stride, weight, residual, y, tokens, outputs, INPUTS: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT rows of W for ROWS tokens, BLOCK_IN columns of each of PARTS parts at a time."""
    let_next_start(PDL)
    part: tl.constexpr = INPUTS // PARTS
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    begin, d = tl.arange(0, PARTS)[:, None, None] * part, tl.arange(0, BLOCK_IN)
    matrix, w_row = matrix_of(weight, 0, 0, begin), out.to(tl.int64)[None, :, None]
    real, column = (out < outputs)[None, :, None], d[None, None, :]
    w = part_tile(matrix, w_row, real, column, 0, part, weight)  # (P, BLOCK_OUT, BLOCK_IN)
    later = part_tile(matrix, w_row, real, column, BLOCK_IN, part, weight)
    wait_for_previous(PDL)
    x += row[None, None, :] * x_stride + begin + d[None, :, None]  # (P, BLOCK_IN, ROWS)
    mine = (row < tokens)[None, None, :]
    sums = tl.zeros((PARTS, BLOCK_OUT, ROWS), tl.float32)
    for start in range(0, part, BLOCK_IN):
        v = tl.load(x + start, mask=mine, other=0.0)
        sums = add_part(sums, w, v, weight)
        w = later
        later = part_tile(matrix, w_row, real, column, start + 2 * BLOCK_IN, part, weight)
    total = tl.sum(sums, axis=0)  # (BLOCK_OUT, ROWS)
    mask = (out < outputs)[:, None] & (row < tokens)[None, :]
    place = row[None, :] * outputs + out[:, None]
    if residual is not None:
        total += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def part_tile(matrix, row, real, column, first, limit, w):
    """As `load` of tiles.py. Where a row of the tile has one scale, it is (..., 1)."""
    if w.FORMAT != "dense" and not w.ZEROS and w.WIDE % column.shape[2] == 0:
        place, scale, _zero, stride, scale_stride = matrix
        words, off = load_words(place, stride, row, real, column, first, limit, w), 0.0
        at = row // w.TALL * scale_stride + first // w.WIDE
        factor = tl.load(scale + at, real & (first < limit), 0.0).to(tl.float32)
        if w.FORMAT == "fp8" and not w.PTX:
            factor *= 256.0  # see packed.py
    else:
        words, factor, off = load(matrix, row, real, column, first, limit, w)
    return words, factor, off


@triton.jit
def add_part(sums, loaded, v, w):
    """sums (P, rows, tokens) + a loaded tile times `v` (P, columns, tokens).

    One scale of a row is multiplied after the product, as in `add_product` of tiles.py.
    """
    if w.FORMAT != "dense" and not w.ZEROS and w.WIDE % v.shape[1] == 0:
        tile = unpack(loaded[0], w).to(v.dtype)
        sums += product(tile, v, tl.zeros(sums.shape, tl.float32)) * loaded[1]
    else:
        sums = product(scaled(loaded, w).to(v.dtype), v, sums)
    return sums
