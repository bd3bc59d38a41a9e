"""The experts of one token, or of so few that an expert has one of them or none: two kernels, both
matrix-vector products without `tl.dot`.

The first makes the inner values of each of a token's slots (its K choices, then the shared
experts). The second runs over all slots of the token, so it adds up their outputs at once.
Of several tokens, those programs run side by side that read the same rows of an expert's weights:
all but the first find them in the second-level cache, and nothing need be sorted.

Shapes: N tokens, D hidden_size, I moe_intermediate_size, E experts, K experts per token, J slots of
a token (K + shared).
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.chip import let_next_start, wait_for_previous
from r1.kernels.fixed import columns_fixed, slots_fixed, times_fixed
from r1.kernels.linear import gain_columns, normed_columns
from r1.kernels.tiles import load, matrix_of, times


@triton.jit
def up_vector_kernel(
    x, indices, gate, up, shared_gate, shared_up, residual, norm, eps, h, tokens,
    DIM: tl.constexpr, INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    COUNT: tl.constexpr, FIXED: tl.constexpr, MANY: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT inner values of one slot's expert, silu(gate) * up, into h (N, J, I). 0 for a
    choice of no expert: number COUNT, unless COUNT is 0.

    Shared experts start first: they do not depend on the router. With `norm` (x is then the
    residual's norm) they norm the residual themselves, so they don't wait for the router's x.
    With FIXED x is a `Fixed`, and they wait. MANY: there are several tokens.
    """
    places = (CHOSEN + SHARED) * tokens
    blocks: tl.constexpr = (INNER + BLOCK_OUT - 1) // BLOCK_OUT
    program = tl.program_id(0)
    place = program % places if MANY else program // blocks
    out = (program // places if MANY else program % blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    slot, token = CHOSEN + SHARED - 1 - place // tokens, (place % tokens).to(tl.int64)
    h += (token * (CHOSEN + SHARED) + slot) * INNER + out
    if slot < CHOSEN:
        wait_for_previous(PDL)
        # So late, because down_vector_kernel reads the choice before its own wait.
        let_next_start(PDL)
        expert = tl.load(indices + token * CHOSEN + slot).to(tl.int64)
        wanted = out
        if COUNT > 0:
            wanted = tl.where(expert < COUNT, out, INNER)  # from this row on nothing is read
        inner = gated(
            x, token, None, eps, gate, up, expert, 0, wanted, DIM, INNER, FIXED, BLOCK_OUT, BLOCK_IN
        )
        tl.store(h, inner.to(h.dtype.element_ty), mask=out < INNER)
    elif SHARED > 0:
        row = (slot - CHOSEN) * INNER  # where this shared expert begins
        if norm is None or FIXED:
            wait_for_previous(PDL)
            inner = gated(
                x, token, None, eps, shared_gate, shared_up, 0, row, out, DIM, INNER, FIXED,
                BLOCK_OUT, BLOCK_IN,
            )  # fmt: skip
        else:
            inner = gated(
                residual, token, norm, eps, shared_gate, shared_up, 0, row, out, DIM, INNER, False,
                BLOCK_OUT, BLOCK_IN,
            )  # fmt: skip
        wait_for_previous(PDL)
        let_next_start(PDL)
        tl.store(h, inner.to(h.dtype.element_ty), mask=out < INNER)


@triton.jit
def gated(
    x, token, norm, eps, gates, ups, expert, row, out, DIM: tl.constexpr, INNER: tl.constexpr,
    FIXED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """silu(gate x) * (up x) for rows `out` of an expert that begins at `row`, fp32 (BLOCK_OUT,).

    With `norm` x is RMS-normed with this gain, in the same pass, as linear.py's kernel does it.
    """
    d = tl.arange(0, BLOCK_IN)
    gate_matrix, up_matrix = matrix_of(gates, expert, row), matrix_of(ups, expert, row)
    gate = tl.zeros((BLOCK_OUT, BLOCK_IN // min(gates.TOGETHER, BLOCK_IN)), tl.float32)
    up = tl.zeros((BLOCK_OUT, BLOCK_IN // min(ups.TOGETHER, BLOCK_IN)), tl.float32)
    squares = tl.zeros((BLOCK_IN,), tl.float32)
    real, d_row = (out < INNER)[:, None], d[None, :]
    for start in range(0, DIM, BLOCK_IN):
        if FIXED:
            v = columns_fixed(x, token, start, DIM, BLOCK_IN)
        else:
            gain = gain_columns(norm, start + d, DIM)
            v, squares = normed_columns(x + token * DIM, norm, gain, squares, start + d, DIM)
        w = load(gate_matrix, out[:, None], real, d_row, start, DIM, gates)
        gate += times_fixed(w, v, gates) if FIXED else times(w, v[None, :], gates)
        w = load(up_matrix, out[:, None], real, d_row, start, DIM, ups)
        up += times_fixed(w, v, ups) if FIXED else times(w, v[None, :], ups)
    gate_sum, up_sum = tl.sum(gate, axis=1), tl.sum(up, axis=1)  # (BLOCK_OUT,)
    if norm is not None:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / DIM + eps)
        gate_sum, up_sum = gate_sum * factor, up_sum * factor
    return gate_sum * tl.sigmoid(gate_sum) * up_sum


@triton.jit
def down_vector_kernel(
    h, indices, weights, down, shared_down, residual, y, tokens, DIM: tl.constexpr,
    INNER: tl.constexpr, CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr, SHARED: tl.constexpr,
    COUNT: tl.constexpr, FIXED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT of a token's outputs: the weighted sum over all of its slots, and the residual.
    With FIXED h is a `Fixed`, of a token's slots side by side. COUNT: see `up_vector_kernel`.

    The choice is older than the previous kernel, so the first AHEAD tiles of weights are loaded
    before the wait: first BLOCK_IN columns of all chosen experts at once, tile after tile, then
    those of the shared experts.
    """
    out = tl.program_id(0) // tokens * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    expert, weight, some = choice_of(indices, weights, token, CHOSEN, CHOSEN_PAD, COUNT)
    routed: tl.constexpr = (INNER + BLOCK_IN - 1) // BLOCK_IN  # tiles
    size: tl.constexpr = CHOSEN_PAD * BLOCK_IN  # columns of a tile of shared experts
    tiles: tl.constexpr = routed + (SHARED * INNER + size - 1) // size
    queue = ()
    for n in tl.static_range(min(AHEAD, tiles)):
        w = down_tile(down, shared_down, expert, some, out, n, routed, DIM, INNER, SHARED, BLOCK_IN)
        queue = queue + (w,)  # type: ignore[assignment]  # noqa: RUF005
    wait_for_previous(PDL)
    let_next_start(PDL)
    total = tl.zeros((BLOCK_OUT,), tl.float32)
    if residual is not None:
        total += tl.load(residual + token * DIM + out, mask=out < DIM, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_OUT, CHOSEN_PAD, BLOCK_IN // min(down.TOGETHER, BLOCK_IN)), tl.float32)
    for n in tl.static_range(tiles):
        if n < routed:
            v = slots_of(h, token, weight, n * BLOCK_IN, CHOSEN, SHARED, INNER, BLOCK_IN, FIXED)
            if FIXED:
                sums += times_fixed(queue[n], v, down) * weight[None, :, None]
            else:
                sums += times(queue[n], v[None, :, :], down)
        else:
            total += shared_product(
                queue[n], h, token, (n - routed) * size, shared_down, CHOSEN, SHARED, INNER, size,
                FIXED,
            )  # fmt: skip
        if n + AHEAD < tiles:
            w = down_tile(
                down, shared_down, expert, some, out, n + AHEAD, routed, DIM, INNER, SHARED,
                BLOCK_IN,
            )  # fmt: skip
            queue = queue + (w,)  # type: ignore[assignment]  # noqa: RUF005
    total += tl.sum(tl.reshape(sums, (BLOCK_OUT, sums.numel // BLOCK_OUT)), axis=1)
    tl.store(y + token * DIM + out, total.to(y.dtype.element_ty), mask=out < DIM)


@triton.jit
def choice_of(
    indices, weights, token, CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr, COUNT: tl.constexpr
):
    """A token's experts, their weights, and which of them are real: (CHOSEN_PAD,) each."""
    slot = tl.arange(0, CHOSEN_PAD)
    some = slot < CHOSEN
    expert = tl.load(indices + token * CHOSEN + slot, mask=some, other=0).to(tl.int64)
    weight = tl.load(weights + token * CHOSEN + slot, mask=some, other=0.0)
    if COUNT > 0:
        some = some & (expert < COUNT)
    return expert, weight, some


@triton.jit
def down_tile(
    down, shared_down, expert, some, out, n: tl.constexpr, ROUTED: tl.constexpr, DIM: tl.constexpr,
    INNER: tl.constexpr, SHARED: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Tile n of down's weights: (BLOCK_OUT, CHOSEN_PAD, BLOCK_IN) of the chosen experts, or, from
    number ROUTED on, (BLOCK_OUT, CHOSEN_PAD BLOCK_IN) of the shared ones.
    """
    if n < ROUTED:
        real = ((out < DIM)[:, None] & some[None, :])[:, :, None]
        column = tl.arange(0, BLOCK_IN)[None, None, :]
        matrices = matrix_of(down, expert[None, :, None])
        w = load(matrices, out[:, None, None], real, column, n * BLOCK_IN, INNER, down)
    else:
        size: tl.constexpr = some.shape[0] * BLOCK_IN
        inside, column = (out < DIM)[:, None], tl.arange(0, size)[None, :]
        start: tl.constexpr = (n - ROUTED) * size
        matrix = matrix_of(shared_down, 0)
        w = load(matrix, out[:, None], inside, column, start, SHARED * INNER, shared_down)
    return w


@triton.jit
def slots_of(
    h, token, weight, start, CHOSEN: tl.constexpr, SHARED: tl.constexpr, INNER: tl.constexpr,
    BLOCK_IN: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Columns from `start` on of each chosen slot's h: fixed-point, or fp32 (CHOSEN_PAD, BLOCK_IN)
    times the slot's weight.
    """
    slot, at = tl.arange(0, weight.shape[0]), start + tl.arange(0, BLOCK_IN)
    length: tl.constexpr = (CHOSEN + SHARED) * INNER
    if FIXED:
        v = slots_fixed(h, token, slot, start, length, CHOSEN, INNER, BLOCK_IN)
    else:
        mask = (slot < CHOSEN)[:, None] & (at < INNER)[None, :]
        place = h + token * length + slot[:, None] * INNER + at[None, :]
        v = tl.load(place, mask=mask, other=0.0).to(tl.float32) * weight[:, None]
    return v


@triton.jit
def shared_product(
    w, h, token, start, down, CHOSEN: tl.constexpr, SHARED: tl.constexpr, INNER: tl.constexpr,
    SIZE: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """A tile of the shared experts, from column `start` on, times their h: fp32 (BLOCK_OUT,).

    Their slots' h stand side by side, as their matrix has its columns.
    """
    first: tl.constexpr = CHOSEN * INNER
    length: tl.constexpr = (CHOSEN + SHARED) * INNER
    if FIXED:
        sums = times_fixed(w, columns_fixed(h, token, first + start, length, SIZE), down)
    else:
        at = start + tl.arange(0, SIZE)
        place = h + token * length + first + at
        v = tl.load(place, mask=at < SHARED * INNER, other=0.0).to(tl.float32)
        sums = times(w, v[None, :], down)
    return tl.sum(sums, axis=1)
