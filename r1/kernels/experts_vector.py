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
from r1.kernels.vectors import columns_of


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
        inner = tl.zeros((BLOCK_OUT,), tl.float32)
        if COUNT == 0 or expert < COUNT:  # programs of no expert would take time from the others
            inner = gated(
                x, token, None, eps, gate, up, expert, 0, out, DIM, INNER, FIXED, BLOCK_OUT,
                BLOCK_IN,
            )  # fmt: skip
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
    BESIDE: tl.constexpr, COUNT: tl.constexpr, FIXED: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT of a token's outputs: the weighted sum over all of its slots, and the residual.
    With FIXED h is a `Fixed`, of a token's slots side by side. COUNT: see `up_vector_kernel`.

    The choice is older than the previous kernel, so the first AHEAD tiles of weights are loaded
    before the wait: first BLOCK_IN columns of all chosen experts at once, tile after tile, then
    those of the shared experts; or BESIDE of them, which are all, beside the chosen ones. Slots are
    a tile's first dimension: so a warp has all outputs of a slot, and takes an inner value once.
    """
    out = tl.program_id(0) // tokens * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    expert, weight, some = choice_of(indices, weights, token, CHOSEN, BESIDE, CHOSEN_PAD, COUNT)
    places = slots_matrices(down, shared_down, expert, CHOSEN, BESIDE, INNER)
    routed: tl.constexpr = (INNER + BLOCK_IN - 1) // BLOCK_IN  # tiles
    size: tl.constexpr = CHOSEN_PAD * BLOCK_IN  # columns of a tile of shared experts alone
    tiles: tl.constexpr = routed + ((SHARED - BESIDE) * INNER + size - 1) // size
    queue = ()
    for n in tl.static_range(min(AHEAD, tiles)):
        w = down_tile(places, down, shared_down, some, out, n, routed, DIM, INNER, SHARED, BLOCK_IN)
        queue = queue + (w,)  # type: ignore[assignment]  # noqa: RUF005
    wait_for_previous(PDL)
    let_next_start(PDL)
    total = tl.zeros((BLOCK_OUT,), tl.float32)
    if residual is not None:
        total += tl.load(residual + token * DIM + out, mask=out < DIM, other=0.0).to(tl.float32)
    sums = tl.zeros((CHOSEN_PAD, BLOCK_OUT, BLOCK_IN // min(down.TOGETHER, BLOCK_IN)), tl.float32)
    for n in tl.static_range(tiles):
        if n < routed:
            v = slots_of(h, token, some, n, down, CHOSEN, SHARED, BESIDE, INNER, BLOCK_IN, FIXED)
            sums += times_fixed(queue[n], v, down) if FIXED else times(queue[n], v, down)
        else:
            total += shared_product(
                queue[n], h, token, (n - routed) * size, shared_down, CHOSEN, SHARED, INNER, size,
                FIXED,
            )  # fmt: skip
        if n + AHEAD < tiles:
            w = down_tile(
                places, down, shared_down, some, out, n + AHEAD, routed, DIM, INNER, SHARED,
                BLOCK_IN,
            )  # fmt: skip
            queue = queue + (w,)  # type: ignore[assignment]  # noqa: RUF005
    # Each dimension by itself: of a tensor that is permuted, and reshaped so that its rows are not
    # whole runs of lanes, Triton 3.6 adds up the wrong lanes.
    total += tl.sum(tl.sum(sums * weight[:, None, None], axis=2), axis=0)
    tl.store(y + token * DIM + out, total.to(y.dtype.element_ty), mask=out < DIM)


@triton.jit
def choice_of(
    indices, weights, token, CHOSEN: tl.constexpr, BESIDE: tl.constexpr, CHOSEN_PAD: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """A token's experts, their weights, and which of them are real: (CHOSEN_PAD,) each. BESIDE
    shared experts come after them, with weight 1.
    """
    slot = tl.arange(0, CHOSEN_PAD)
    some = slot < CHOSEN
    expert = tl.load(indices + token * CHOSEN + slot, mask=some, other=0).to(tl.int64)
    weight = tl.load(weights + token * CHOSEN + slot, mask=some, other=0.0)
    if COUNT > 0:
        some = some & (expert < COUNT)
    if BESIDE > 0:
        more = (slot >= CHOSEN) & (slot < CHOSEN + BESIDE)
        weight, some = tl.where(more, 1.0, weight), some | more
    return expert, weight, some


@triton.jit
def slots_matrices(
    down, shared_down, expert, CHOSEN: tl.constexpr, BESIDE: tl.constexpr, INNER: tl.constexpr
):
    """`matrix_of` each slot's expert, (CHOSEN_PAD, 1, 1): BESIDE shared ones come after those
    chosen. All begin at 16 bytes.
    """
    place, scale, zero, stride, scale_stride = matrix_of(down, expert[:, None, None])
    if BESIDE > 0:
        slot = tl.arange(0, expert.shape[0])[:, None, None]
        chosen, number = slot < CHOSEN, slot - CHOSEN  # of a shared expert
        block = number * (INNER // down.WIDE)
        place = tl.where(chosen, place, shared_down.weight + number * (INNER // down.PER))
        scale = tl.where(chosen, scale, shared_down.scale + block)
        zero = tl.where(chosen, zero, shared_down.zero + block)
        stride = tl.where(chosen, down.ROW, shared_down.ROW)
        scale_stride = tl.where(chosen, down.SCALE_ROW, shared_down.SCALE_ROW)
        # Without these words Triton 3.9 loads an element at a time.
        each: tl.constexpr = 128 // down.weight.dtype.element_ty.primitive_bitwidth
        place = tl.multiple_of(place, (16, 16, 16))
        stride = tl.multiple_of(stride, (each, each, each))
    return place, scale, zero, stride, scale_stride


@triton.jit
def down_tile(
    matrices, down, shared_down, some, out, n: tl.constexpr, ROUTED: tl.constexpr,
    DIM: tl.constexpr, INNER: tl.constexpr, SHARED: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Tile n of down's weights: (CHOSEN_PAD, BLOCK_OUT, BLOCK_IN) of the slots' `matrices`, or,
    from number ROUTED on, (BLOCK_OUT, CHOSEN_PAD BLOCK_IN) of the shared experts alone.
    """
    if n < ROUTED:
        real = (some[:, None] & (out < DIM)[None, :])[:, :, None]
        column = tl.arange(0, BLOCK_IN)[None, None, :]
        w = load(matrices, out[None, :, None], real, column, n * BLOCK_IN, INNER, down)
    else:
        size: tl.constexpr = some.shape[0] * BLOCK_IN
        inside, column = (out < DIM)[:, None], tl.arange(0, size)[None, :]
        start: tl.constexpr = (n - ROUTED) * size
        matrix = matrix_of(shared_down, 0)
        w = load(matrix, out[:, None], inside, column, start, SHARED * INNER, shared_down)
    return w


@triton.jit
def slots_of(
    h, token, some, n, w, CHOSEN: tl.constexpr, SHARED: tl.constexpr, BESIDE: tl.constexpr,
    INNER: tl.constexpr, BLOCK_IN: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Tile n of each slot's h, of the chosen experts and of BESIDE shared ones:
    fixed-point, or fp32 (CHOSEN_PAD, 1, BLOCK_IN).
    """
    slot, real, start = tl.arange(0, some.shape[0]), CHOSEN + BESIDE, n * BLOCK_IN
    length: tl.constexpr = (CHOSEN + SHARED) * INNER
    if FIXED:
        v = slots_fixed(h, token, slot[:, None, None], start, length, real, INNER, BLOCK_IN)
    else:
        h += token * length
        v = columns_of(h, INNER, real, start, INNER, w, some.shape[0], BLOCK_IN)
        v = v.to(tl.float32)[:, None, :]
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
        h += token * length + first
        v = columns_of(h, 0, 1, start, SHARED * INNER, down, 1, SIZE).to(tl.float32)
        sums = times(w, v, down)
    return tl.sum(sums, axis=1)
