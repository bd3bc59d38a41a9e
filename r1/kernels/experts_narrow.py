"""The experts of several tokens and packed weights: products by the matrix units (narrow.py).

A program has rows of an expert's weights and up to ROWS of its tokens, as in experts_tiles.py.

Shapes: N tokens, D hidden_size, I moe_intermediate_size, K experts per token, J slots of a token
(K + shared).
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.chip import let_next_start, wait_for_previous
from r1.kernels.experts_tiles import tile_of, work_of
from r1.kernels.narrow import store_rounded
from r1.kernels.narrow_products import load_factors, product_of, rows_of, two_products
from r1.kernels.tiles import expert_of


@triton.jit
def up_narrow_kernel(
    x, order, ends, work, gate, up, shared_gate, shared_up, h, tokens, count,
    DIM: tl.constexpr, INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, EACH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT inner values of one expert, for up to ROWS of its tokens. BLOCK_IN is the step. Of
    one number h is a `Fixed`, and BLOCK_OUT a step of it.
    """
    first_out = tl.program_id(0) * BLOCK_OUT
    out = first_out + tl.arange(0, BLOCK_OUT)
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, True)
    w_row = (expert - count) * INNER  # where a shared expert begins
    gates = expert_of(gate, shared_gate, expert, count, w_row, 0, SHARED)
    ups = expert_of(up, shared_up, expert, count, w_row, 0, SHARED)
    wanted = (out < INNER)[:, None]
    gate_rows = rows_of(first_out, out[:, None], wanted, INNER, gate, EACH)
    up_rows = rows_of(first_out, out[:, None], wanted, INNER, up, EACH)
    for first in range(start, end, ROWS):  # once, or never
        token, _choice, row, _slot, real = tile_of(
            expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS
        )
        a = load_factors(gates, gate_rows[2], gate_rows[3], 0, DIM, gate)
        b = load_factors(ups, up_rows[2], up_rows[3], 0, DIM, up)
        gate_sum, up_sum = two_products(
            x, token, real, gates, gate_rows, a, gate, ups, up_rows, b, up, DIM, BLOCK_IN, EACH
        )
        inner = gate_sum * tl.sigmoid(gate_sum) * up_sum
        if EACH == 1:
            store_rounded(h, inner, row, real, first_out, INNER)
        else:
            place = h + row[None, :] * INNER + out[:, None]
            tl.store(place, inner.to(h.dtype.element_ty), mask=wanted & real[None, :])


@triton.jit
def down_narrow_kernel(
    h, order, ends, work, weights, down, shared_down, y, tokens, count, DIM: tl.constexpr,
    INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, EACH: tl.constexpr, DOUBLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT outputs of one expert, weighted, for up to ROWS of its tokens: into their slots of
    y, (N, J, D). With DOUBLE as many outputs again, which share what is loaded of h.
    """
    first_out = tl.program_id(0) * (2 * BLOCK_OUT if DOUBLE else BLOCK_OUT)
    out = first_out + tl.arange(0, BLOCK_OUT)
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, True)
    matrix = expert_of(down, shared_down, expert, count, 0, (expert - count) * INNER, SHARED)
    wanted, others = (out < DIM)[:, None], (out + BLOCK_OUT < DIM)[:, None]
    rows = rows_of(first_out, out[:, None], wanted, DIM, down, EACH)
    other = first_out + BLOCK_OUT
    other_rows = rows_of(other, out[:, None] + BLOCK_OUT, others, DIM, down, EACH)
    for first in range(start, end, ROWS):  # once, or never
        _token, choice, row, slot, real = tile_of(
            expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS
        )
        a = load_factors(matrix, rows[2], rows[3], 0, INNER, down)
        if DOUBLE:
            b = load_factors(matrix, other_rows[2], other_rows[3], 0, INNER, down)
            sums, other_sums = two_products(
                h, row, real, matrix, rows, a, down, matrix, other_rows, b, down, INNER, BLOCK_IN,
                EACH,
            )  # fmt: skip
        else:
            sums = product_of(h, row, real, matrix, rows, a, down, INNER, BLOCK_IN, EACH)
        weight = tl.where(expert < count, tl.load(weights + choice, mask=real, other=0.0), 1.0)
        store_weighted(y, sums, weight, slot, out, wanted & real[None, :], DIM)
        if DOUBLE:
            store_weighted(
                y, other_sums, weight, slot, out + BLOCK_OUT, others & real[None, :], DIM
            )


@triton.jit
def store_weighted(y, sums, weight, slot, out, mask, DIM: tl.constexpr):
    """fp32 sums (BLOCK_OUT, ROWS), weighted, to the tokens' slots of y and its columns `out`."""
    weighted = (sums * weight[None, :]).to(y.dtype.element_ty)
    tl.store(y + slot[None, :] * DIM + out[:, None], weighted, mask=mask)
