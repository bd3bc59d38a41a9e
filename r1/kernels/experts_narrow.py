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
from r1.kernels.narrow import add_pairs, load_factors, load_pairs, load_scales, twice
from r1.kernels.tiles import expert_of


@triton.jit
def up_narrow_kernel(
    x, order, ends, work, gate, up, shared_gate, shared_up, h, tokens, count,
    DIM: tl.constexpr, INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT inner values of one expert, for up to ROWS of its tokens. BLOCK_IN is the step,
    of which the loop takes UNROLL at a time.
    """
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, True)
    w_row = (expert - count) * INNER  # where a shared expert begins
    wanted = (out < INNER)[:, None]
    gates = expert_of(gate, shared_gate, expert, count, w_row, 0, SHARED)
    ups = expert_of(up, shared_up, expert, count, w_row, 0, SHARED)
    for first in range(start, end, ROWS):  # once, or never
        token, _choice, row, _slot, real = tile_of(
            expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS
        )
        tokens_twice, real_twice = twice(token), twice(real)
        gate_sum = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        up_sum = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        # Scales are loaded one step ahead: the pipeline, which loads the rest, leaves them out.
        a = load_factors(gates, out[:, None], wanted, 0, DIM, gate)
        b = load_factors(ups, out[:, None], wanted, 0, DIM, up)
        scales = load_scales(x, gate, token, real, 0, DIM, BLOCK_IN)
        for column in tl.range(0, DIM, BLOCK_IN, loop_unroll_factor=UNROLL):
            v = load_pairs(x, gate, tokens_twice, real_twice, column, DIM, BLOCK_IN)
            next_a = load_factors(gates, out[:, None], wanted, column + BLOCK_IN, DIM, gate)
            next_b = load_factors(ups, out[:, None], wanted, column + BLOCK_IN, DIM, up)
            next_scales = load_scales(x, gate, token, real, column + BLOCK_IN, DIM, BLOCK_IN)
            gate_sum = add_pairs(
                gate_sum, gates, out[:, None], wanted, column, gate, v, a, scales, BLOCK_IN
            )
            up_sum = add_pairs(
                up_sum, ups, out[:, None], wanted, column, up, v, b, scales, BLOCK_IN
            )
            a, b, scales = next_a, next_b, next_scales
        inner = gate_sum * tl.sigmoid(gate_sum) * up_sum
        place = h + row[None, :] * INNER + out[:, None]
        tl.store(place, inner.to(h.dtype.element_ty), mask=wanted & real[None, :])


@triton.jit
def down_narrow_kernel(
    h, order, ends, work, weights, down, shared_down, y, tokens, count, DIM: tl.constexpr,
    INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT outputs of one expert, weighted, for up to ROWS of its tokens: into their slots of
    y, (N, J, D).
    """
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, True)
    matrix = expert_of(down, shared_down, expert, count, 0, (expert - count) * INNER, SHARED)
    wanted = (out < DIM)[:, None]
    for first in range(start, end, ROWS):  # once, or never
        _token, choice, row, slot, real = tile_of(
            expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS
        )
        rows_twice, real_twice = twice(row), twice(real)
        sums = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        factors = load_factors(matrix, out[:, None], wanted, 0, INNER, down)
        scales = load_scales(h, down, row, real, 0, INNER, BLOCK_IN)
        for column in tl.range(0, INNER, BLOCK_IN, loop_unroll_factor=UNROLL):
            v = load_pairs(h, down, rows_twice, real_twice, column, INNER, BLOCK_IN)
            after = column + BLOCK_IN
            next_factors = load_factors(matrix, out[:, None], wanted, after, INNER, down)
            next_scales = load_scales(h, down, row, real, after, INNER, BLOCK_IN)
            sums = add_pairs(
                sums, matrix, out[:, None], wanted, column, down, v, factors, scales, BLOCK_IN
            )
            factors, scales = next_factors, next_scales
        weight = tl.where(expert < count, tl.load(weights + choice, mask=real, other=0.0), 1.0)
        weighted = (sums * weight[None, :]).to(y.dtype.element_ty)
        place = y + slot[None, :] * DIM + out[:, None]
        tl.store(place, weighted, mask=wanted & real[None, :])
