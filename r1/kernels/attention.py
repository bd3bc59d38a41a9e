"""Attention of new tokens to the latent cache, split over the context, and W_UV behind it (V2
paper, section 2.1.2).

All heads share the latents, so a tile of heads meets a tile of tokens in one matrix product, and
the latents read for it serve as values too. A row's context is cut into splits, so that few rows
still fill the chip; each split's softmax is its own, and the second kernel joins them. Lengths are
read from a tensor in the kernel: a graph holds it, and what lies behind a row's length is never
read.

Shapes: N tokens (B rows x S), H heads, R rope, C latent, V value dim, T capacity, P splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from r1.kernels.prefetch import prefetch
from r1.model.attend import by_head, probabilities

if TYPE_CHECKING:
    from r1.model.cache import LayerCache
    from r1.model.mla import MLA
    from r1.model.transformer import Step


@dataclass(frozen=True)
class AttentionLaunch:
    """Each program takes `heads` heads of one token through one of `splits` (a power of two) parts,
    `keys` at a time. `apart`: Triton is kept from scheduling its two products together; see
    `split_kernel`. `early`: keys are asked for while the kernel ahead still runs.

    The sum's: `values` rows of one head's W_UV for as many tokens as make `sum_rows` splits,
    `latents` columns at a time."""

    heads: int
    keys: int
    splits: int
    warps: int
    stages: int
    apart: bool = False
    early: bool = False
    sum_rows: int = 16
    values: int = 32
    latents: int = 128
    sum_warps: int = 4
    sum_stages: int = 2

    @staticmethod
    def default(sizes: Sizes, chip: Chip) -> AttentionLaunch:
        tokens, heads, latent, rope, capacity, itemsize = sizes
        key = (
            power_of_two(latent, 16) + power_of_two(rope, 16)
        ) * itemsize  # bytes of one key, and of one head's query
        room = chip.shared - 2**13  # some is for probabilities and the compiler
        block = next(
            b for b in (64, 32, 16) if b == 16 or (b <= heads and (b + 2 * 32) * key <= room)
        )
        fill = max(
            1, chip.processors // (tokens * ceil_div(heads, block))
        )  # splits that give each processor one program
        least = (
            16 if tokens == 1 else 32 if tokens <= 16 else 128
        )  # keys that are worth a split: its sum costs, too
        splits = 1 << (max(1, min(64, fill, capacity // least)).bit_length() - 1)
        wanted = 64 if block > 16 else max(16, min(64, power_of_two(ceil_div(capacity, splits))))
        keys = next(
            k for k in (64, 32, 16) if k == 16 or (k <= wanted and (block + 2 * k) * key <= room)
        )
        buffers = (room - block * key) // (keys * key)
        stages = max(
            1, min(3, buffers if block > 16 else 1 + buffers)
        )  # tiles of 16 heads pass through registers
        few, tall = splits <= 16, block > 16
        rows, sum_stages = max(64 if tall else 16, splits), 3 if tall else 2
        wide, most = (
            128 if tall or itemsize > 2 else 512,
            32 if not (few or tall) else 64 if tokens == 1 else 128,
        )

        def fits(values: int, columns: int) -> bool:
            """Whether the sum's tiles do: all of W_UV's columns at once, or a pipeline of them."""
            return (rows + values) * columns * itemsize * (
                1 if columns >= latent else sum_stages
            ) <= room

        values = next(v for v in (128, 64, 32) if v == 32 or (v <= most and fits(v, wide)))
        latents = next(c for c in (512, 128, 64, 32) if c == 32 or (c <= wide and fits(values, c)))
        warps = 8 if block > 16 or (tokens == 1 and keys == 64) else 4
        sum_warps = 8 if not tall and rows * values > 1024 else 4
        return AttentionLaunch(
            block, keys, splits, warps, stages, chip.dependent_launch and block >= 64,
            chip.dependent_launch and tokens == 1, rows, values,
            min(latents, power_of_two(latent, 16)), sum_warps, sum_stages,
        )  # fmt: skip

    @property
    def choices(self) -> Choices:
        return {
            "splits": (1, 2, 4, 8, 16, 32, 64), "keys": (16, 32, 64), "heads": (16, 32, 64),
            "warps": (4, 8), "stages": (1, 2, 3, 4), "apart": (False, True), "early": (False, True),
            "values": (16, 32, 64, 128), "sum_rows": (16, 32, 64), "latents": (64, 128, 256, 512),
            "sum_warps": (4, 8), "sum_stages": (1, 2, 3),
        }  # fmt: skip


def attention(
    chip: Chip, q_c: Tensor, q_pe: Tensor, cache: Tensor, positions: Tensor, w_uv: Tensor,
    scale: float, launch: AttentionLaunch | None = None,
) -> Tensor:  # fmt: skip
    """q_c (N, H, C) absorbed, q_pe (N, H, R) rotated, cache (B, T, C + R), positions int64 (B, S),
    W_UV (H, V, C) -> (N, H, V).

    Token n is number n % S of row n // S, and attends to slots 0 to its position. `positions` must
    be older than the kernel ahead, as chip.py says: they are read while that one may run."""
    tokens, heads, latent = q_c.shape
    rope, value, new = q_pe.shape[-1], w_uv.shape[1], positions.shape[1]
    use = launch or chip.launch(
        AttentionLaunch, tokens, heads, latent, rope, cache.shape[1], cache.itemsize
    )
    part = q_c.new_empty(tokens, heads, use.splits, latent)
    weight = q_c.new_empty(tokens, heads, use.splits, dtype=torch.float32)
    chip.run(
        split_kernel, (ceil_div(heads, use.heads), use.splits, tokens), q_c, q_pe, cache,
        cache.stride(0), cache.stride(1), cache.shape[1], positions, new, part, weight,
        scale * LOG2_E, HEADS=heads, LATENT=latent, ROPE=rope, LATENT_PAD=power_of_two(latent, 16),
        ROPE_PAD=power_of_two(rope, 16), BLOCK_H=use.heads, BLOCK_T=use.keys, SPLITS=use.splits,
        STAGES=use.stages, APART=use.apart, EARLY=use.early, warps=use.warps, stages=use.stages,
    )  # fmt: skip
    o = q_c.new_empty(tokens, heads, value)
    group = max(1, use.sum_rows // use.splits)
    values = min(use.values, power_of_two(value, 16))
    chip.run(
        sum_kernel, (ceil_div(value, values), heads, ceil_div(tokens, group)), part, weight,
        positions, cache.shape[1], w_uv, w_uv.stride(0), o, tokens, HEADS=heads, LATENT=latent,
        VALUE=value, SPLITS=use.splits, BLOCK_T=use.keys, GROUP=group, BLOCK_V=values,
        BLOCK_C=use.latents, warps=use.sum_warps, stages=use.sum_stages,
    )  # fmt: skip
    return o


def attention_torch(
    q_c: Tensor, q_pe: Tensor, cache: Tensor, positions: Tensor, w_uv: Tensor, scale: float
) -> Tensor:
    """The twin: what r1/model/attend.py's `absorbed` does with the cache, over its whole
    capacity."""
    latent = q_c.shape[-1]
    q = torch.cat((q_c, q_pe), dim=-1).view(*positions.shape, q_c.shape[1], -1)  # (B, S, H, C + R)
    scores = torch.einsum("bshd,btd->bhst", q, cache)
    hidden = (
        torch.arange(cache.shape[1], device=cache.device) > positions[:, None, :, None]
    )  # (B, 1, S, T)
    bias = torch.zeros(hidden.shape, device=cache.device).masked_fill(hidden, float("-inf"))
    p = probabilities(scores, scale, bias).to(cache.dtype)
    c = torch.einsum("bhst,btc->bshc", p, cache[..., :latent])
    return by_head(c, w_uv.mT).flatten(0, 1)


ATTENTION = {"torch": attention_torch, "triton": attention}
LOG2_E = 1.4426950408889634
"""The kernels use powers of 2, which the hardware has."""


@triton.jit
def split_kernel(
    q_c, q_pe, cache, cache_row, cache_slot, capacity, positions, new, part, weight, scale,
    HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, LATENT_PAD: tl.constexpr,
    ROPE_PAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, APART: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split's softmax-weighted mean of latents, and the base-2 logarithm of its weight; of an
    empty split nothing.

    APART puts the work behind two conditions that always hold, for the sake of Triton's schedule on
    Hopper, where tiles of 64 heads make it pay. A product that another one takes up gets all warps
    along its rows, so the two warp groups would make the same 64 rows; behind the inner `if` the
    compiler doesn't see that it is taken up. And what stands in an `if` comes behind the next
    tile's loads, which else are issued when nothing is left to do meanwhile."""
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    c, r, t = tl.arange(0, LATENT_PAD), tl.arange(0, ROPE_PAD), tl.arange(0, BLOCK_T)
    length, each = lengths_of(positions + token, capacity, SPLITS, BLOCK_T)
    start = split * each
    end = tl.minimum(start + each, length)
    cache += (token // new) * cache_row
    if EARLY:
        size: tl.constexpr = cache.dtype.element_ty.primitive_bitwidth // 8
        keys = tl.maximum(tl.minimum(end - start, STAGES * BLOCK_T), 0)
        prefetch(
            cache + start.to(tl.int64) * cache_slot, keys.to(tl.int64) * cache_slot * size, PDL
        )
    wait_for_previous(PDL)
    let_next_start(PDL)
    place = (token * HEADS + head) * SPLITS + split
    row = (token * HEADS + head)[:, None]
    real = (head < HEADS)[:, None]
    q = tl.load(
        q_c + row * LATENT + c[None, :], mask=real & (c < LATENT)[None, :], other=0.0
    )  # (BLOCK_H, LATENT_PAD)
    qp = tl.load(
        q_pe + row * ROPE + r[None, :], mask=real & (r < ROPE)[None, :], other=0.0
    )  # (BLOCK_H, ROPE_PAD)
    if start < end:
        best = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        mean = tl.zeros((BLOCK_H, LATENT_PAD), tl.float32)
        shrink = tl.zeros((BLOCK_H,), tl.float32)
        share = tl.zeros((BLOCK_H, BLOCK_T), cache.dtype.element_ty)
        for first in tl.range(start, end, BLOCK_T, num_stages=STAGES):
            at = first + t
            slot = cache + at.to(tl.int64)[:, None] * cache_slot
            seen = (at < end)[:, None]
            k = tl.load(
                slot + c[None, :], mask=seen & (c < LATENT)[None, :], other=0.0
            )  # (BLOCK_T, LATENT_PAD)
            kp = tl.load(
                slot + LATENT + r[None, :], mask=seen & (r < ROPE)[None, :], other=0.0
            )  # (BLOCK_T, ROPE_PAD)
            across, across_pe = (
                tl.trans(k),
                tl.trans(kp),
            )  # out here, or one buffer more is made for kp
            if (not APART) | (first < capacity):
                if (not APART) | (first < end):
                    scores = product(qp, across_pe, tl.zeros((BLOCK_H, BLOCK_T), tl.float32))
                    scores = product(q, across, scores)  # (BLOCK_H, BLOCK_T)
                    scores = tl.where((at < end)[None, :], scores * scale, float("-inf"))
                    better = tl.maximum(best, tl.max(scores, axis=1))
                    p = tl.exp2(scores - better[:, None])
                    shrink = tl.exp2(best - better)
                    total = total * shrink + tl.sum(p, axis=1)
                    share = p.to(k.dtype)
                    best = better
                mean = product(share, k, mean * shrink[:, None])
        mean /= total[:, None]
        tl.store(
            part + place[:, None] * LATENT + c[None, :],
            mean.to(part.dtype.element_ty),
            mask=real & (c < LATENT)[None, :],
        )
        tl.store(weight + place, best + tl.log2(total), mask=head < HEADS)


@triton.jit
def lengths_of(position, capacity, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr):
    """How many keys tokens at these places (pointers) see, and how many of them a split has, in
    whole tiles."""
    length = tl.minimum(tl.load(position).to(tl.int32) + 1, capacity)
    return length, tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_T) * BLOCK_T


@triton.jit
def sum_kernel(
    part, weight, positions, capacity, w_uv, w_uv_head, o, tokens, HEADS: tl.constexpr,
    LATENT: tl.constexpr, VALUE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The splits' means weighted, times W_UV, and only then added up: so the splits are the
    product's rows.

    Which splits are empty follows from the length, so nothing has to be read to know what needn't
    be."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    head = tl.program_id(1)
    rows: tl.constexpr = GROUP * SPLITS
    row, c = tl.arange(0, rows), tl.arange(0, BLOCK_C)
    token = tl.program_id(2) * GROUP + row // SPLITS
    place = (token.to(tl.int64) * HEADS + head) * SPLITS + row % SPLITS
    column = (
        w_uv + head.to(tl.int64) * w_uv_head + v[None, :] * LATENT + c[:, None]
    )  # (BLOCK_C, BLOCK_V)
    real = (v < VALUE)[None, :]
    part += place[:, None] * LATENT + c[None, :]  # (rows, BLOCK_C)
    length, each = lengths_of(positions + tl.minimum(token, tokens - 1), capacity, SPLITS, BLOCK_T)
    filled = (token < tokens) & (row % SPLITS * each < length)
    if BLOCK_C >= LATENT:
        w = tl.load(
            column, mask=(c < LATENT)[:, None] & real, other=0.0
        )  # before the wait: weights
    wait_for_previous(PDL)
    let_next_start(PDL)
    logs = tl.load(
        weight + place, mask=filled, other=-1e30
    )  # not -inf: rows without a token have no other
    if BLOCK_C >= LATENT:
        mean = tl.load(part, mask=filled[:, None] & (c < LATENT)[None, :], other=0.0)
    logs = tl.reshape(logs, (GROUP, SPLITS))
    share = tl.exp2(logs - tl.max(logs, axis=1)[:, None])
    share = tl.reshape(share / tl.sum(share, axis=1)[:, None], (rows,))
    sums = tl.zeros((rows, BLOCK_V), tl.float32)
    for start in range(0, LATENT, BLOCK_C):
        if BLOCK_C < LATENT:
            mean = tl.load(
                part + start, mask=filled[:, None] & (start + c < LATENT)[None, :], other=0.0
            )
            w = tl.load(column + start, mask=(start + c < LATENT)[:, None] & real, other=0.0)
        sums = product((mean.to(tl.float32) * share[:, None]).to(w.dtype), w, sums)
    y = tl.sum(tl.reshape(sums, (GROUP, SPLITS, BLOCK_V)), axis=1)  # (GROUP, BLOCK_V)
    n = tl.program_id(2) * GROUP + tl.arange(0, GROUP)
    mask = (n < tokens)[:, None] & (v < VALUE)[None, :]
    tl.store(
        o + (n.to(tl.int64)[:, None] * HEADS + head) * VALUE + v[None, :],
        y.to(o.dtype.element_ty),
        mask=mask,
    )


# ---------------------------------------------------------------------------------------- attention=triton
@torch.library.custom_op("r1::latent_attention", mutates_args=())
def _latent_attention(
    q_c: Tensor, q_pe: Tensor, cache: Tensor, positions: Tensor, w_uv: Tensor, scale: float
) -> Tensor:
    return attention(Chip.of(q_c.device), q_c, q_pe, cache, positions, w_uv, scale)


@_latent_attention.register_fake
def _(
    q_c: Tensor, q_pe: Tensor, cache: Tensor, positions: Tensor, w_uv: Tensor, scale: float
) -> Tensor:
    return q_c.new_empty(*q_c.shape[:2], w_uv.shape[1])


def attend(
    mla: MLA,
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    step: Step,
    cache: LayerCache | None,
) -> Tensor:
    """The slot's strategy, for decode; see r1/model/attend.py for the shapes. An operator of ours,
    which torch.compile takes as one."""
    assert cache is not None, "a decode step has a cache"
    step.remember(cache, torch.cat((c_kv, k_pe), dim=-1))
    w_uk, w_uv = mla.up_projections()
    q_c = by_head(q_nope, w_uk).flatten(0, 1).contiguous()  # (N, H, C)
    q_pe = q_pe.flatten(0, 1).contiguous()  # (N, H, R)
    return _latent_attention(q_c, q_pe, cache[0], step.positions, w_uv, mla.scale).view(
        *q_nope.shape[:3], -1
    )
