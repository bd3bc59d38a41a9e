"""The experts of several tokens: `tl.dot` on tiles of tokens that are sorted by expert.

A program streams its rows of an expert's weights past a tile of that expert's tokens. The outputs
of a token's J slots (its K choices, then the shared experts) are kept apart. A third kernel adds
them up in the slots' order.

With APART, which prompts use, each tile of tokens has programs of its own: arithmetic is the limit
then. Without it one program takes all tokens of its expert: reading weights is the limit.

Shapes: N tokens, D hidden_size, I moe_intermediate_size, K experts per token, J slots of a token
(K + shared).
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.chip import let_next_start, wait_for_previous
from r1.kernels.tiles import add_product, expert_of


@triton.jit
def work_of(work, ends, tokens, count, APART: tl.constexpr):
    """A program's expert, and where its tokens begin and end in the order.

    A shared expert has all tokens.
    """
    program = tl.program_id(1)
    if APART:
        return (
            tl.load(work + 3 * program),
            tl.load(work + 3 * program + 1),
            tl.load(work + 3 * program + 2),
        )
    first = tl.load(ends + program - 1, mask=(program > 0) & (program < count), other=0)
    return program, first, tl.load(ends + program, mask=program < count, other=tokens)


@triton.jit
def tile_of(
    expert, first, end, order, tokens, count, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The next ROWS tokens of an expert: their numbers, choices, places in h, slots in y (N J), and
    which of them are real.

    A shared expert (from number `count` on) has all tokens, in order. h has the experts one after
    the other, each one's tokens side by side.
    """
    i = first + tl.arange(0, ROWS)
    choice = tl.load(order + i, mask=i < tl.where(expert < count, end, 0), other=0)
    routed = expert < count
    token = tl.where(routed, choice // CHOSEN, i).to(tl.int64)
    slot = token * (CHOSEN + SHARED) + tl.where(routed, choice % CHOSEN, CHOSEN + expert - count)
    place = i + tl.where(routed, 0, tokens * (CHOSEN + expert - count)).to(tl.int64)
    return token, choice, place, slot, i < end


@triton.jit
def up_tile_kernel(
    x, order, ends, work, gate, up, shared_gate, shared_up, h, tokens, count,
    DIM: tl.constexpr, INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, APART: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT inner values of one expert, for all of its tokens, ROWS at a time."""
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    d = tl.arange(0, BLOCK_IN)
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, APART)
    w_row = (expert - count) * INNER  # where a shared expert begins
    wanted = (out < INNER)[:, None]
    gates = expert_of(gate, shared_gate, expert, count, w_row, 0, SHARED)
    ups = expert_of(up, shared_up, expert, count, w_row, 0, SHARED)
    for first in range(start, end, ROWS):
        token, _choice, row, _slot, real = tile_of(
            expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS
        )
        gate_sum = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        up_sum = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        for column in range(0, DIM, BLOCK_IN):
            inside = column + d < DIM
            v_mask = inside[:, None] & real[None, :]
            v = tl.load(x + token[None, :] * DIM + column + d[:, None], mask=v_mask, other=0.0)
            gate_sum = add_product(
                gate_sum, gates, out[:, None], wanted, d[None, :], column, DIM, gate, v
            )
            up_sum = add_product(up_sum, ups, out[:, None], wanted, d[None, :], column, DIM, up, v)
        inner = gate_sum * tl.sigmoid(gate_sum) * up_sum
        place = h + row[None, :] * INNER + out[:, None]
        tl.store(place, inner.to(h.dtype.element_ty), mask=wanted & real[None, :])


@triton.jit
def down_tile_kernel(
    h, order, ends, work, weights, down, shared_down, y, tokens, count, DIM: tl.constexpr,
    INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
    APART: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT outputs of one expert, weighted, for all of its tokens: into their slots of y,
    (N, J, D).

    Few tokens are the product's short side. With APART the tokens are the product's rows, and the
    outputs, twice as many, its columns. So Hopper's widest product fits, and the tokens' inner
    values are read half as often.
    """
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i = tl.arange(0, BLOCK_IN)
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, APART)
    matrix = expert_of(down, shared_down, expert, count, 0, (expert - count) * INNER, SHARED)
    wanted = (out < DIM)[:, None]
    for first in range(start, end, ROWS):
        _token, choice, row, slot, real = tile_of(
            expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS
        )
        sums = tl.zeros((ROWS, BLOCK_OUT) if APART else (BLOCK_OUT, ROWS), tl.float32)
        for column in range(0, INNER, BLOCK_IN):
            inside = column + i < INNER
            v_mask = inside[:, None] & real[None, :]
            v = tl.load(h + row[None, :] * INNER + column + i[:, None], mask=v_mask, other=0.0)
            sums = add_product(
                sums, matrix, out[:, None], wanted, i[None, :], column, INNER, down, v, APART
            )
        sums = tl.trans(sums) if APART else sums
        weight = tl.where(expert < count, tl.load(weights + choice, mask=real, other=0.0), 1.0)
        weighted = (sums * weight[None, :]).to(y.dtype.element_ty)
        place = y + slot[None, :] * DIM + out[:, None]
        tl.store(place, weighted, mask=wanted & real[None, :])


@triton.jit
def add_kernel(
    y, residual, out, DIM: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """A token's slots added up in their order, and the residual.

    The residual is older than the kernel before this one, which lets this one start only after its
    own wait. So it is loaded before the wait: it may have to come from memory, and the slots don't.
    The grid has one dimension, because the others have 65,535 programs at most.
    """
    let_next_start(PDL)
    blocks: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    if residual is not None:
        old = tl.load(residual + token * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        place = y + (token * SLOTS + slot) * DIM + d
        total += tl.load(place, mask=d < DIM, other=0.0).to(tl.float32)
    if residual is not None:
        total += old
    tl.store(out + token * DIM + d, total.to(out.dtype.element_ty), mask=d < DIM)
