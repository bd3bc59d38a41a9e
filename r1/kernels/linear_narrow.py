"""A projection of several tokens and packed weights: products by the matrix units (narrow.py).

Shapes: N tokens; out and in are W's rows and columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.chip import let_next_start, wait_for_previous
from r1.kernels.narrow_products import load_factors, product_of, rows_of, two_products
from r1.kernels.tiles import matrix_of


@triton.jit
def narrow_kernel(
    x, weight, residual, y, tokens, outputs, INPUTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, STEP: tl.constexpr, EACH: tl.constexpr, DOUBLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT rows of W for ROWS tokens: as `tile_kernel`, with x as EACH narrow numbers. With
    DOUBLE as many rows again, which share what is loaded of x.
    """
    first_out = tl.program_id(1) * (2 * BLOCK_OUT if DOUBLE else BLOCK_OUT)
    out = first_out + tl.arange(0, BLOCK_OUT)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    matrix, w_row = matrix_of(weight, 0), out.to(tl.int64)[:, None]
    wanted, real = (out < outputs)[:, None], row < tokens
    rows = rows_of(first_out, w_row, wanted, outputs, weight, EACH)
    a = load_factors(matrix, rows[2], rows[3], 0, INPUTS, weight)
    if DOUBLE:
        others = (out + BLOCK_OUT < outputs)[:, None]
        other_rows = rows_of(
            first_out + BLOCK_OUT, w_row + BLOCK_OUT, others, outputs, weight, EACH
        )
        b = load_factors(matrix, other_rows[2], other_rows[3], 0, INPUTS, weight)
    wait_for_previous(PDL)
    let_next_start(PDL)
    if DOUBLE:
        sums, other_sums = two_products(
            x, row, real, matrix, rows, a, weight, matrix, other_rows, b, weight, INPUTS, STEP, EACH
        )
        store_sums(y, residual, other_sums, row, out + BLOCK_OUT, others & real[None, :], outputs)
    else:
        sums = product_of(x, row, real, matrix, rows, a, weight, INPUTS, STEP, EACH)
    store_sums(y, residual, sums, row, out, wanted & real[None, :], outputs)


@triton.jit
def store_sums(y, residual, sums, row, out, mask, outputs):
    """fp32 sums (BLOCK_OUT, ROWS), and the residual, to rows `row` and columns `out` of y."""
    place = row[None, :] * outputs + out[:, None]
    if residual is not None:
        sums += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=mask)
