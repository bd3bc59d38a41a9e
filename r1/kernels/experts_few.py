"""The experts of several tokens: as many dot products as an expert has tokens.

Where an expert has a token or two, tiles for `tl.dot` are empty but for those, and to unpack
weights for them takes longer than to read them. Here a program has rows of an expert's weights and
up to ROWS of its tokens. It loads and unpacks each weight once for all of them. With FIXED each
token is a fixed-point vector (fixed.py); otherwise products are in fp32. Choices are sorted by
expert, so the programs that read the same weights run side by side, and all but the first find them
in the second-level cache.

Shapes: N tokens, D hidden_size, I moe_intermediate_size, K experts per token, J slots of a token
(K + shared).
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.chip import let_next_start, wait_for_previous
from r1.kernels.experts_tiles import places_of, work_of
from r1.kernels.linear_few import add_vectors, nothing, product_of, ready, vector_of
from r1.kernels.tiles import expert_of, load


@triton.jit
def places_of_rows(
    expert, first, end, order, tokens, count, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Of each of an expert's next ROWS tokens (the last one again, from `end` on): its number, its
    choice, its place in h, and its slot in y, as `tile_of` counts them.
    """
    rows = ()
    for row in tl.static_range(ROWS):
        i = tl.minimum(first + row, end - 1)
        choice = tl.load(order + i, mask=expert < count, other=0)  # shared ones have all tokens
        token, place, slot = places_of(expert, i, choice, tokens, count, CHOSEN, SHARED)
        rows = rows + ((token, choice, place, slot),)  # type: ignore[assignment]  # noqa: RUF005
    return rows


@triton.jit
def up_few_kernel(
    x, order, ends, work, gate, up, shared_gate, shared_up, h, tokens, count,
    DIM: tl.constexpr, INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, FIXED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT inner values of one expert, for up to ROWS of its tokens. With FIXED x is a
    `Fixed`.
    """
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    d = tl.arange(0, BLOCK_IN)[None, :]
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, True)
    w_row = (expert - count) * INNER  # where a shared expert begins
    wanted = (out < INNER)[:, None]
    gates = expert_of(gate, shared_gate, expert, count, w_row, 0, SHARED)
    ups = expert_of(up, shared_up, expert, count, w_row, 0, SHARED)
    for first in range(start, end, ROWS):  # once, or never
        rows = places_of_rows(expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS)
        a = nothing(gate, ROWS, BLOCK_OUT, BLOCK_IN)
        b = nothing(up, ROWS, BLOCK_OUT, BLOCK_IN)
        for column in range(0, DIM, BLOCK_IN):
            loaded_g = load(gates, out[:, None], wanted, d, column, DIM, gate)
            loaded_u = load(ups, out[:, None], wanted, d, column, DIM, up)
            g, u = ready(loaded_g, gate, FIXED), ready(loaded_u, up, FIXED)
            more_a, more_b = (), ()
            for row in tl.static_range(ROWS):
                v = vector_of(x, DIM, rows[row][0], column, gate, DIM, BLOCK_IN, FIXED)
                c = a[row] + product_of(g, v, gate, FIXED)
                e = b[row] + product_of(u, v, up, FIXED)
                more_a = more_a + (c,)  # type: ignore[assignment]  # noqa: RUF005
                more_b = more_b + (e,)  # type: ignore[assignment]  # noqa: RUF005
            a, b = more_a, more_b
        for row in tl.static_range(ROWS):
            _token, _choice, place, _slot = rows[row]
            gate_sum, up_sum = tl.sum(a[row], axis=1), tl.sum(b[row], axis=1)  # (BLOCK_OUT,)
            inner = gate_sum * tl.sigmoid(gate_sum) * up_sum
            real = out < tl.where(first + row < end, INNER, 0)
            tl.store(h + place * INNER + out, inner.to(h.dtype.element_ty), mask=real)


@triton.jit
def down_few_kernel(
    h, order, ends, work, weights, down, shared_down, y, tokens, count, DIM: tl.constexpr,
    INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
    FIXED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT outputs of one expert, weighted, for up to ROWS of its tokens: into their slots of
    y, (N, J, D). h has a vector for each place; with FIXED it is a `Fixed`.
    """
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i = tl.arange(0, BLOCK_IN)[None, :]
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, True)
    matrix = expert_of(down, shared_down, expert, count, 0, (expert - count) * INNER, SHARED)
    wanted = (out < DIM)[:, None]
    for first in range(start, end, ROWS):  # once, or never
        rows = places_of_rows(expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS)
        places = ()
        for row in tl.static_range(ROWS):
            places = places + (rows[row][2],)  # type: ignore[assignment]  # noqa: RUF005
        sums = nothing(down, ROWS, BLOCK_OUT, BLOCK_IN)
        for column in range(0, INNER, BLOCK_IN):
            w = load(matrix, out[:, None], wanted, i, column, INNER, down)
            sums = add_vectors(
                sums, w, h, INNER, places, column, down, INNER, BLOCK_IN, ROWS, FIXED
            )
        for row in tl.static_range(ROWS):
            _token, choice, _place, slot = rows[row]
            weight = tl.where(expert < count, tl.load(weights + choice), 1.0)
            weighted = tl.sum(sums[row], axis=1) * weight
            real = out < tl.where(first + row < end, DIM, 0)
            tl.store(y + slot * DIM + out, weighted.to(y.dtype.element_ty), mask=real)
