"""A projection of several tokens and packed weights: products by the matrix units (narrow.py).

Shapes: N tokens; out and in are W's rows and columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.chip import let_next_start, wait_for_previous
from r1.kernels.narrow import add_pairs, load_factors, load_pairs, load_scales, twice
from r1.kernels.tiles import matrix_of


@triton.jit
def narrow_kernel(
    x, weight, residual, y, tokens, outputs, INPUTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT rows of W for ROWS tokens: as `tile_kernel`, with x as pairs."""
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    matrix, w_row = matrix_of(weight, 0), out.to(tl.int64)[:, None]
    wanted, real = (out < outputs)[:, None], row < tokens
    rows_twice, real_twice = twice(row), twice(real)
    # Scales are loaded one step ahead: the pipeline, which loads the rest, leaves them out.
    factors = load_factors(matrix, w_row, wanted, 0, INPUTS, weight)
    wait_for_previous(PDL)
    let_next_start(PDL)
    scales = load_scales(x, weight, row, real, 0, INPUTS, STEP)
    sums = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    for start in range(0, INPUTS, STEP):
        v = load_pairs(x, weight, rows_twice, real_twice, start, INPUTS, STEP)
        next_factors = load_factors(matrix, w_row, wanted, start + STEP, INPUTS, weight)
        next_scales = load_scales(x, weight, row, real, start + STEP, INPUTS, STEP)
        sums = add_pairs(sums, matrix, w_row, wanted, start, weight, v, factors, scales, STEP)
        factors, scales = next_factors, next_scales
    mask = wanted & real[None, :]
    place = row[None, :] * outputs + out[:, None]
    if residual is not None:
        sums += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=mask)
