"""The experts of a step: only those hit are read, by few tokens each once; the shared experts are
more of them, of weight 1.

A shared MLP of width n I is n experts of width I: their gates, ups and downs stand in its matrices,
one behind the other. A token's outputs are kept apart by *slot* (its K choices, then the n shared
experts) and added up in the slots' order.

One token: each program multiplies rows of one expert with a vector, and the down projection's
programs run over the token's slots, so that they add up at once. Several tokens: their choices are
sorted by expert, and a program streams its rows of an expert's weights past a tile of that expert's
tokens. Many, as a prompt's: the same, but each tile of tokens has programs of its own, since
arithmetic is what bounds it then and no longer the reading of weights.

Shapes: N tokens, K choices per token, E experts, D hidden_size, I moe_intermediate_size, L slots (K
+ n)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from r1.kernels.chip import (
    Chip,
    Choices,
    Sizes,
    ceil_div,
    let_next_start,
    power_of_two,
    product,
    wait_for_previous,
)
from r1.model.layers import swiglu
from r1.model.moe import Experts, by_expert, gather


class Matrices(NamedTuple):
    """The weights of experts: stacked, (E, 2I, D) and (E, D, I), or of the shared ones side by
    side, (2nI, D) and (D, nI)."""

    gate_up_proj: Tensor
    down_proj: Tensor


@dataclass(frozen=True)
class ExpertsLaunch:
    """Each program makes `outputs` of an expert's outputs (`up`: of its inner ones) for `rows`
    tokens at a time, `inputs` columns of its weights at a time. One row: no tl.dot. `apart`: each
    tile of rows has programs of its own, so that an expert's are spread over the chip; otherwise
    one program takes all of its expert's tokens, so that weights are read once."""

    rows: int
    up_outputs: int
    up_inputs: int
    down_outputs: int
    down_inputs: int
    warps: int = 4
    stages: int = 1
    apart: bool = False

    @staticmethod
    def default(sizes: Sizes, chip: Chip) -> ExpertsLaunch:
        tokens, chosen, experts, dim, inner, itemsize = sizes
        if tokens == 1:
            return ExpertsLaunch(
                1, 2, min(2048, power_of_two(dim)), 4, min(512, power_of_two(inner))
            )
        if (
            tokens * chosen >= 32 * experts
        ):  # as a prompt's: bound by arithmetic, so tiles are as square as they can be
            columns = 128 // itemsize
            up = (
                128 if itemsize == 2 and chip.shared >= 3 * 3 * 128 * columns * itemsize else 64
            )  # fp32 would spill more
            stages = max(1, min(4, chip.shared // ((2 * up + 128) * columns * itemsize)))
            return ExpertsLaunch(128, up, columns, 2 * up, columns, 8, stages, apart=True)
        rows = min(
            64, power_of_two(2 * ceil_div(tokens * chosen, experts), 16)
        )  # few experts get twice their share
        columns = min(256 // itemsize, power_of_two(min(dim, inner), 16))
        up = 64 if chip.shared >= 2 * (2 * 64 + rows) * columns * itemsize else 32
        stages = max(1, min(4, chip.shared // ((2 * up + rows) * columns * itemsize)))
        return ExpertsLaunch(rows, up, columns, 64, columns, 4, stages)

    @property
    def choices(self) -> Choices:
        if self.rows == 1:
            return {
                "up_outputs": (1, 2, 4), "up_inputs": (512, 1024, 2048), "down_outputs": (1, 2, 4,
                8), "down_inputs": (64, 128, 256, 512), "warps": (2, 4, 8),
            }  # fmt: skip
        return {
            "rows": (16, 32, 64, 128), "up_outputs": (16, 32, 64, 128), "up_inputs": (32, 64, 128,
            256), "down_outputs": (16, 32, 64, 128, 256), "down_inputs": (32, 64, 128, 256),
            "warps": (4, 8), "stages": (2, 3, 4, 5), "apart": (False, True),
        }  # fmt: skip


def experts(
    chip: Chip, x: Tensor, indices: Tensor, weights: Tensor, routed: Matrices,
    shared: Matrices | None = None, residual: Tensor | None = None, norm: Tensor | None = None,
    eps: float = 0.0, launch: ExpertsLaunch | None = None,
) -> Tensor:  # fmt: skip
    """x (N, D), indices int64 (N, K), weights fp32 (N, K) -> the weighted sum of the experts'
    outputs, (N, D).

    The outputs of `shared` and the `residual` (N, D) are added to it, in fp32; where tiles are
    `apart`, each output is rounded to x's dtype before. `norm` (D,) says that x is the residual,
    RMS-normed with this gain by the kernel ahead, and that the residual is older: then shared
    experts needn't wait for x."""
    (tokens, dim), chosen = x.shape, indices.shape[1]
    count, inner = routed.down_proj.shape[0], routed.down_proj.shape[2]
    more = shared.down_proj.shape[1] // inner if shared else 0
    ups = routed.gate_up_proj, shared.gate_up_proj if shared else None
    downs = routed.down_proj, shared.down_proj if shared else None
    use = launch or chip.launch(ExpertsLaunch, tokens, chosen, count, dim, inner, x.itemsize)
    slots = chosen + more
    h, out = x.new_empty(tokens, slots, inner), torch.empty_like(x)
    sizes = {"DIM": dim, "INNER": inner, "CHOSEN": chosen, "SHARED": more}
    up = {
        **sizes,
        "BLOCK_OUT": use.up_outputs,
        "BLOCK_IN": use.up_inputs,
        "warps": use.warps,
        "stages": use.stages,
    }
    down = {
        **sizes,
        "BLOCK_OUT": use.down_outputs,
        "BLOCK_IN": use.down_inputs,
        "warps": use.warps,
        "stages": use.stages,
    }
    up_blocks, down_blocks = ceil_div(inner, use.up_outputs), ceil_div(dim, use.down_outputs)
    if use.rows == 1:
        chip.run(
            up_vector_kernel,
            (up_blocks, slots, tokens),
            x,
            indices,
            *ups,
            residual,
            norm,
            eps,
            h,
            **up,
        )
        chip.run(
            down_vector_kernel, (down_blocks, tokens), h, indices, weights, *downs, residual, out,
            CHOSEN_PAD=power_of_two(chosen), **down,
        )  # fmt: skip
        return out
    order, ends = sort_by_expert(chip, indices, count)
    places, work = count + more, None
    if use.apart:
        # Only an expert's last tile isn't full, so there are no more tiles than these.
        places = min(tokens * chosen, tokens * chosen // use.rows + count) + more * ceil_div(
            tokens, use.rows
        )
        work = divide(chip, ends, places, use.rows, tokens, more)
    how = {"ROWS": use.rows, "APART": use.apart}
    chip.run(
        up_tile_kernel,
        (up_blocks, places),
        x,
        order,
        ends,
        work,
        *ups,
        h,
        tokens,
        count,
        **how,
        **up,
    )
    y = x.new_empty(tokens, slots, dim, dtype=x.dtype if use.apart else torch.float32)
    chip.run(
        down_tile_kernel,
        (down_blocks, places),
        h,
        order,
        ends,
        work,
        weights,
        *downs,
        y,
        tokens,
        count,
        **how,
        **down,
    )
    block = min(1024, power_of_two(dim)) if use.apart else 256
    chip.run(
        add_kernel, (tokens * ceil_div(dim, block), ), y, residual, out, DIM=dim, SLOTS=slots,
        BLOCK=block, warps=max(1, block // 256),
    )  # fmt: skip
    return out


def experts_torch(
    x: Tensor, indices: Tensor, weights: Tensor, routed: Matrices, shared: Matrices | None = None,
    residual: Tensor | None = None, norm: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """The twin. It waits for x anyway, and needs no `norm`."""
    y = gather(cast(Experts, routed), x, indices, weights)
    if shared:
        y = y + F.linear(swiglu(F.linear(x, shared.gate_up_proj)), shared.down_proj)
    return y if residual is None else residual + y


EXPERTS = {"torch": experts_torch, "triton": experts}
MOST_CHOICES = 2**16
"""What a program of `sort_kernel` looks through in less time than torch's sort takes."""


def sort_by_expert(chip: Chip, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`order` and `ends` of r1/model/moe.py's `by_expert`, int32 both, in one kernel: each program
    counts for one expert.

    Very many choices are torch's to sort.
    """
    choices = indices.numel()
    if choices > MOST_CHOICES:
        return sort_by_expert_torch(indices, count)
    order, ends = (
        indices.new_empty(choices, dtype=torch.int32),
        indices.new_empty(count, dtype=torch.int32),
    )
    block = min(4096, power_of_two(choices))
    chip.run(
        sort_kernel,
        (count,),
        indices,
        order,
        ends,
        choices,
        BLOCK=block,
        warps=4 if block <= 1024 else 8,
    )
    return order, ends


def sort_by_expert_torch(indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The twin."""
    order, _, ends = by_expert(indices, count)
    return order.int(), ends


def divide(chip: Chip, ends: Tensor, tiles: int, rows: int, tokens: int, shared: int) -> Tensor:
    """Tiles of `rows` sorted choices, none of two experts: each one's expert, first choice and end,
    int32 (tiles, 3).

    Behind the experts of `ends` come `shared` ones, which have all tokens. Tiles that aren't needed
    are empty."""
    count = len(ends)
    work = ends.new_empty(tiles, 3)
    chip.run(
        divide_kernel,
        (tiles,),
        ends,
        work,
        tokens,
        count,
        shared,
        ROWS=rows,
        PAD=power_of_two(count + shared),
        warps=1,
    )
    return work


def divide_torch(ends: Tensor, tiles: int, rows: int, tokens: int, shared: int) -> Tensor:
    """The twin."""
    start, stop = torch.cat((ends.new_zeros(1), ends[:-1])), ends
    start, stop = (
        torch.cat((start, ends.new_zeros(shared))),
        torch.cat((stop, ends.new_full((shared,), tokens))),
    )
    each = (stop - start + rows - 1) // rows
    tile = torch.arange(tiles, device=ends.device)
    expert = torch.searchsorted(each.cumsum(0), tile, right=True).clamp(max=len(each) - 1)
    first = start[expert] + (tile - each.cumsum(0)[expert] + each[expert]) * rows
    work = torch.stack((expert, first, torch.minimum(first + rows, stop[expert])), dim=1).int()
    return work.masked_fill((tile >= each.sum())[:, None], 0)


@triton.jit
def divide_kernel(
    ends, work, tokens, count, shared, ROWS: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr
):
    """One tile: it is of the expert behind those whose tiles all have smaller numbers."""
    wait_for_previous(PDL)
    let_next_start(PDL)
    tile = tl.program_id(0)
    e = tl.arange(0, PAD)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < count), other=0)
    stop = tl.load(ends + e, mask=e < count, other=0)
    stop = tl.where((e >= count) & (e < count + shared), tokens, stop)
    each = tl.cdiv(stop - start, ROWS)
    through = tl.cumsum(each, axis=0)
    mine = (through > tile) & (through - each <= tile)  # nobody's, behind the last
    first = tl.sum(tl.where(mine, start + (tile - through + each) * ROWS, 0), axis=0)
    end = tl.sum(
        tl.where(mine, tl.minimum(stop, start + (tile - through + each + 1) * ROWS), 0), axis=0
    )
    tl.store(work + 3 * tile, tl.sum(tl.where(mine, e, 0), axis=0))
    tl.store(work + 3 * tile + 1, first)
    tl.store(work + 3 * tile + 2, end)


@triton.jit
def sort_kernel(indices, order, ends, choices, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program e: how many choices are of experts before e, and where those of e stand. Stable,
    hence always the same."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    expert = tl.program_id(0)
    choice = tl.arange(0, BLOCK)
    first = tl.load(indices + choice, mask=choice < choices, other=2**31 - 1).to(
        tl.int32
    )  # a decode step has no more
    before = (first < expert).to(tl.int32)
    for block in range(BLOCK, choices, BLOCK):
        index = tl.load(
            indices + block + choice, mask=block + choice < choices, other=2**31 - 1
        ).to(tl.int32)
        before += (index < expert).to(tl.int32)
    end = tl.sum(before, axis=0)
    for block in range(0, choices, BLOCK):
        mine = (first == expert).to(tl.int32)
        rank = tl.cumsum(mine, axis=0)  # from 1
        tl.store(order + end + rank - 1, block + choice, mask=mine > 0)
        end += tl.sum(mine, axis=0)
        behind = block + BLOCK + choice
        first = tl.load(indices + behind, mask=behind < choices, other=2**31 - 1).to(tl.int32)
    tl.store(ends + expert, end)


# ---------------------------------------------------------------------------------------- one token
@triton.jit
def up_vector_kernel(
    x, indices, routed, shared, residual, norm, eps, h, DIM: tl.constexpr, INNER: tl.constexpr,
    CHOSEN: tl.constexpr, SHARED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT of the inner values of one slot's expert: silu(gate) * up.

    The shared experts come first: which they are hangs on nobody's choice, and where x is the
    residual's norm they make it themselves, so they needn't wait until what the router wrote can be
    seen."""
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    slot = CHOSEN + SHARED - 1 - tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    x += token * DIM
    h += (token * (CHOSEN + SHARED) + slot) * INNER + out
    if slot < CHOSEN:
        wait_for_previous(PDL)
        let_next_start(
            PDL
        )  # so late, because down_vector_kernel reads the choice before its own wait
        matrix = routed + tl.load(indices + token * CHOSEN + slot).to(tl.int64) * (2 * INNER * DIM)
        inner = gated(x, None, eps, matrix, INNER * DIM, out, DIM, INNER, BLOCK_OUT, BLOCK_IN)
        tl.store(h, inner.to(h.dtype.element_ty), mask=out < INNER)
    elif SHARED > 0:
        matrix = shared + (slot - CHOSEN) * (INNER * DIM)
        if norm is not None:
            x = residual + token * DIM
        else:
            wait_for_previous(PDL)
        inner = gated(
            x, norm, eps, matrix, SHARED * INNER * DIM, out, DIM, INNER, BLOCK_OUT, BLOCK_IN
        )
        wait_for_previous(PDL)
        let_next_start(PDL)
        tl.store(h, inner.to(h.dtype.element_ty), mask=out < INNER)


@triton.jit
def gated(
    x, norm, eps, matrix, to_up, out,
    DIM: tl.constexpr, INNER: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """silu(gate x) * (up x) for the rows `out` of an expert's gate; its up stands `to_up` numbers
    behind. fp32 (BLOCK_OUT,).

    With `norm` x is RMS-normed with this gain, as linear.py's kernel does it: in the same pass.
    """
    d = tl.arange(0, BLOCK_IN)
    place = matrix + out[:, None] * DIM + d[None, :]
    gate = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    up = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    squares = tl.zeros((BLOCK_IN,), tl.float32)
    for start in range(0, DIM, BLOCK_IN):
        at = start + d
        mask = (out < INNER)[:, None] & (at < DIM)[None, :]
        v = tl.load(x + at, mask=at < DIM, other=0.0).to(tl.float32)
        if norm is not None:
            squares += v * v
            v *= tl.load(norm + at, mask=at < DIM, other=0.0).to(tl.float32)
        gate += tl.load(place + start, mask=mask, other=0.0).to(tl.float32) * v[None, :]
        up += tl.load(place + to_up + start, mask=mask, other=0.0).to(tl.float32) * v[None, :]
    gates, ups = tl.sum(gate, axis=1), tl.sum(up, axis=1)  # (BLOCK_OUT,)
    if norm is not None:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / DIM + eps)
        gates, ups = gates * factor, ups * factor
    return gates * tl.sigmoid(gates) * ups


@triton.jit
def down_vector_kernel(
    h, indices, weights, routed, shared, residual, y, DIM: tl.constexpr, INNER: tl.constexpr,
    CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr, SHARED: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT of a token's outputs: the weighted sum over all of its slots, and the residual.

    The choice is older than the kernel ahead, so the chosen experts' first weights are under way
    before the wait."""
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token = tl.program_id(1).to(tl.int64)
    i, slot = tl.arange(0, BLOCK_IN), tl.arange(0, CHOSEN_PAD)
    expert = tl.load(indices + token * CHOSEN + slot, mask=slot < CHOSEN, other=0).to(tl.int64)
    weight = tl.load(weights + token * CHOSEN + slot, mask=slot < CHOSEN, other=0.0)
    real = ((out < DIM)[:, None] & (slot < CHOSEN)[None, :])[:, :, None]
    place = (
        routed
        + expert[None, :, None] * (DIM * INNER)
        + out[:, None, None] * INNER
        + i[None, None, :]
    )
    w = tl.load(
        place, mask=real & (i < INNER)[None, None, :], other=0.0
    )  # (BLOCK_OUT, CHOSEN_PAD, BLOCK_IN)
    wait_for_previous(PDL)
    let_next_start(PDL)
    h += token * (CHOSEN + SHARED) * INNER
    sums = tl.zeros((BLOCK_OUT, CHOSEN_PAD, BLOCK_IN), tl.float32)
    for start in range(0, INNER, BLOCK_IN):
        mask = (slot < CHOSEN)[:, None] & (start + i < INNER)[None, :]
        v = (
            tl.load(h + slot[:, None] * INNER + start + i[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
            * weight[:, None]
        )
        sums += w.to(tl.float32) * v[None, :, :]
        w = tl.load(
            place + start + BLOCK_IN,
            mask=real & (start + BLOCK_IN + i < INNER)[None, None, :],
            other=0.0,
        )
    total = tl.sum(tl.reshape(sums, (BLOCK_OUT, CHOSEN_PAD * BLOCK_IN)), axis=1)  # (BLOCK_OUT,)
    if SHARED > 0:
        wide: tl.constexpr = (
            SHARED * INNER
        )  # the shared slots' h stand side by side, as its matrix has its columns
        rest = tl.zeros((BLOCK_OUT, CHOSEN_PAD * BLOCK_IN), tl.float32)
        more = tl.arange(0, CHOSEN_PAD * BLOCK_IN)
        for start in range(0, wide, CHOSEN_PAD * BLOCK_IN):
            at = start + more
            v = tl.load(h + CHOSEN * INNER + at, mask=at < wide, other=0.0).to(tl.float32)
            w_mask = (out < DIM)[:, None] & (at < wide)[None, :]
            rest += (
                tl.load(shared + out[:, None] * wide + at[None, :], mask=w_mask, other=0.0).to(
                    tl.float32
                )
                * v[None, :]
            )
        total += tl.sum(rest, axis=1)
    if residual is not None:
        total += tl.load(residual + token * DIM + out, mask=out < DIM, other=0.0).to(tl.float32)
    tl.store(y + token * DIM + out, total.to(y.dtype.element_ty), mask=out < DIM)


# ---------------------------------------------------------------------------------------- several tokens
@triton.jit
def tile_of(
    program,
    first,
    end,
    order,
    tokens,
    count,
    CHOSEN: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The next ROWS tokens of an expert: their numbers, choices, places in h and slots in y (N L),
    and which are real.

    A shared expert (from number `count` on) has all tokens, in order. h has experts one after the
    other, each one's tokens side by side."""
    i = first + tl.arange(0, ROWS)
    routed = program < count
    choice = tl.load(order + i, mask=i < tl.where(routed, end, 0), other=0)
    token = tl.where(routed, choice // CHOSEN, i).to(tl.int64)
    slot = token * (CHOSEN + SHARED) + tl.where(routed, choice % CHOSEN, CHOSEN + program - count)
    place = i + tl.where(routed, 0, tokens * (CHOSEN + program - count)).to(tl.int64)
    return token, choice, place, slot, i < end


@triton.jit
def work_of(work, ends, tokens, count, APART: tl.constexpr):
    """A program's expert, and from where to where its tokens stand in the order (a shared expert
    has all tokens)."""
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
def up_tile_kernel(
    x, order, ends, work, routed, shared, h, tokens, count, DIM: tl.constexpr, INNER: tl.constexpr,
    CHOSEN: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, APART: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT inner values of one expert, for all of its tokens, ROWS at a time; an expert that
    nobody chose has none."""
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    d = tl.arange(0, BLOCK_IN)
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, APART)
    matrix = routed
    if expert < count:
        matrix += expert.to(tl.int64) * (2 * INNER * DIM)
    elif SHARED > 0:
        matrix = shared + (expert - count) * (INNER * DIM)
    to_up = tl.where(expert < count, INNER * DIM, SHARED * INNER * DIM)
    place = matrix + out[:, None] * DIM + d[None, :]
    for first in range(start, end, ROWS):
        token, _choice, row, _slot, real = tile_of(
            expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS
        )
        gate = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        up = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        for column in range(0, DIM, BLOCK_IN):
            inside = column + d < DIM
            mask = (out < INNER)[:, None] & inside[None, :]
            v = tl.load(
                x + token[None, :] * DIM + column + d[:, None],
                mask=inside[:, None] & real[None, :],
                other=0.0,
            )
            gate = product(tl.load(place + column, mask=mask, other=0.0), v, gate)
            up = product(tl.load(place + to_up + column, mask=mask, other=0.0), v, up)
        inner = gate * tl.sigmoid(gate) * up
        mask = (out < INNER)[:, None] & real[None, :]
        tl.store(h + row[None, :] * INNER + out[:, None], inner.to(h.dtype.element_ty), mask=mask)


@triton.jit
def down_tile_kernel(
    h, order, ends, work, weights, routed, shared, y, tokens, count, DIM: tl.constexpr,
    INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
    APART: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT outputs of one expert, weighted, for all of its tokens: into each one's own slot of
    y, (N, L, D).

    Few tokens are the product's short side. A prompt's are its rows, and outputs, twice as many,
    its columns: that is how Hopper's widest product has them, and the tokens' inner values are read
    half as often."""
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i = tl.arange(0, BLOCK_IN)
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, APART)
    matrix = routed
    if expert < count:
        matrix += expert.to(tl.int64) * (DIM * INNER)
    elif SHARED > 0:
        matrix = shared + (expert - count) * INNER
    width = tl.where(expert < count, INNER, SHARED * INNER)
    place = matrix + out[:, None] * width + i[None, :]
    for first in range(start, end, ROWS):
        _token, choice, row, slot, real = tile_of(
            expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS
        )
        sums = tl.zeros((ROWS, BLOCK_OUT) if APART else (BLOCK_OUT, ROWS), tl.float32)
        for column in range(0, INNER, BLOCK_IN):
            inside = column + i < INNER
            v = tl.load(
                h + row[None, :] * INNER + column + i[:, None],
                mask=inside[:, None] & real[None, :],
                other=0.0,
            )
            w = tl.load(place + column, mask=(out < DIM)[:, None] & inside[None, :], other=0.0)
            sums = product(tl.trans(v), tl.trans(w), sums) if APART else product(w, v, sums)
        sums = tl.trans(sums) if APART else sums
        weight = tl.where(expert < count, tl.load(weights + choice, mask=real, other=0.0), 1.0)
        mask = (out < DIM)[:, None] & real[None, :]
        tl.store(
            y + slot[None, :] * DIM + out[:, None],
            (sums * weight[None, :]).to(y.dtype.element_ty),
            mask=mask,
        )


@triton.jit
def add_kernel(
    y, residual, out, DIM: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """A token's slots added up in their order, and the residual. (One dimension, for others have
    65,535 programs at most.)"""
    blocks: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    wait_for_previous(PDL)
    let_next_start(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        total += tl.load(y + (token * SLOTS + slot) * DIM + d, mask=d < DIM, other=0.0).to(
            tl.float32
        )
    if residual is not None:
        total += tl.load(residual + token * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    tl.store(out + token * DIM + d, total.to(out.dtype.element_ty), mask=d < DIM)


# ---------------------------------------------------------------------------------------- moe=triton
@torch.library.custom_op("r1::experts", mutates_args=())
def _experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return experts(Chip.of(x.device), x, indices, weights, Matrices(gate_up, down))


@_experts.register_fake
def _(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(x)


def dispatch(experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The slot's strategy, see r1/model/moe.py: an operator of ours, which torch.compile takes as
    one."""
    return _experts(x.contiguous(), indices, weights, experts.gate_up_proj, experts.down_proj)
