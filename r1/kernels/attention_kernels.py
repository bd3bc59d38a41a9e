"""The attention's two kernels: one split of the context, and the sum of all splits times W_UV.

Shapes: N tokens, T slots of the cache, H heads, R rope dim, V value dim, C latent (kv_lora_rank),
Z splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.chip import let_next_start, product, wait_for_previous
from r1.kernels.fixed import store_fixed
from r1.kernels.prefetch import prefetch
from r1.kernels.tiles import load_tile, matrix_of


@triton.jit
def split_kernel(
    q_c, q_pe, cache, cache_row, cache_slot, capacity, positions, new, part, weight, scale,
    HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, LATENT_PAD: tl.constexpr,
    ROPE_PAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, APART: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split's weighted mean of latents, `part` (N, H, Z, C), and the base-2 logarithm of its
    weight, `weight` (N, H, Z). It writes nothing for an empty split.

    APART works around Triton's Hopper schedule, for tiles of 64 heads. Chained `tl.dot`s put all
    warps along the rows, so both warp groups would compute the same 64. The always-true inner `if`
    hides the chain. The outer one moves the products after the next tile's loads, which would
    otherwise start when no work is left to hide them.
    """
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
        first_slot = cache + start.to(tl.int64) * cache_slot
        prefetch(first_slot, keys.to(tl.int64) * cache_slot * size, PDL)
    wait_for_previous(PDL)
    let_next_start(PDL)
    place = (token * HEADS + head) * SPLITS + split
    row = (token * HEADS + head)[:, None]
    real = (head < HEADS)[:, None]
    in_latent, in_rope = (c < LATENT)[None, :], (r < ROPE)[None, :]
    # (BLOCK_H, LATENT_PAD) and (BLOCK_H, ROPE_PAD)
    q = tl.load(q_c + row * LATENT + c[None, :], mask=real & in_latent, other=0.0)
    qp = tl.load(q_pe + row * ROPE + r[None, :], mask=real & in_rope, other=0.0)
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
            # (BLOCK_T, LATENT_PAD) and (BLOCK_T, ROPE_PAD)
            k = tl.load(slot + c[None, :], mask=seen & in_latent, other=0.0)
            kp = tl.load(slot + LATENT + r[None, :], mask=seen & in_rope, other=0.0)
            # Transposed outside the `if`s, or kp needs one buffer more.
            across, across_pe = tl.trans(k), tl.trans(kp)
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
        here = part + place[:, None] * LATENT + c[None, :]
        tl.store(here, mean.to(part.dtype.element_ty), mask=real & in_latent)
        tl.store(weight + place, best + tl.log2(total), mask=head < HEADS)


@triton.jit
def lengths_of(position, capacity, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr):
    """How many slots the tokens whose positions stand at these pointers see, and how many of them
    one split has, in whole tiles.
    """
    length = tl.minimum(tl.load(position).to(tl.int32) + 1, capacity)
    return length, tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_T) * BLOCK_T


@triton.jit
def sum_kernel(
    part, weight, positions, capacity, w_uv, o, fixed, tokens, HEADS: tl.constexpr,
    LATENT: tl.constexpr, VALUE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The splits' means, weighted, times W_UV, and then added up: o (N, H, V), and into `fixed`,
    if it is given.

    The sum comes last, so that the splits are the product's rows. Which splits are empty follows
    from the length, so empty splits are never read.
    """
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    head = tl.program_id(1)
    rows: tl.constexpr = GROUP * SPLITS
    row, c = tl.arange(0, rows), tl.arange(0, BLOCK_C)
    token = tl.program_id(2) * GROUP + row // SPLITS
    place = (token.to(tl.int64) * HEADS + head) * SPLITS + row % SPLITS
    matrix = matrix_of(w_uv, head.to(tl.int64))
    real = (v < VALUE)[None, :]
    part += place[:, None] * LATENT + c[None, :]  # (rows, BLOCK_C)
    length, each = lengths_of(positions + tl.minimum(token, tokens - 1), capacity, SPLITS, BLOCK_T)
    filled = (token < tokens) & (row % SPLITS * each < length)
    if BLOCK_C >= LATENT:  # all of the weights at once, before the wait: (BLOCK_C, BLOCK_V)
        w = load_tile(matrix, v[None, :], real, c[:, None], 0, LATENT, w_uv)
    wait_for_previous(PDL)
    let_next_start(PDL)
    # -1e30 and not -inf: rows without a token have no other.
    logs = tl.load(weight + place, mask=filled, other=-1e30)
    if BLOCK_C >= LATENT:
        mean = tl.load(part, mask=filled[:, None] & (c < LATENT)[None, :], other=0.0)
    logs = tl.reshape(logs, (GROUP, SPLITS))
    share = tl.exp2(logs - tl.max(logs, axis=1)[:, None])
    share = tl.reshape(share / tl.sum(share, axis=1)[:, None], (rows,))
    sums = tl.zeros((rows, BLOCK_V), tl.float32)
    for start in range(0, LATENT, BLOCK_C):
        if BLOCK_C < LATENT:
            inside = start + c < LATENT
            mean = tl.load(part + start, mask=filled[:, None] & inside[None, :], other=0.0)
            w = load_tile(matrix, v[None, :], real, c[:, None], start, LATENT, w_uv)
        sums = product((mean.to(tl.float32) * share[:, None]).to(w.dtype), w, sums)
    y = tl.sum(tl.reshape(sums, (GROUP, SPLITS, BLOCK_V)), axis=1)  # (GROUP, BLOCK_V)
    n = tl.program_id(2) * GROUP
    first = tl.program_id(0) * BLOCK_V
    store_values(o, fixed, y, n.to(tl.int64), tokens - n, head, first, HEADS, VALUE)


@triton.jit
def store_values(o, fixed, y, token, tokens, head, first, HEADS: tl.constexpr, VALUE: tl.constexpr):
    """Store a head's values from `first` on, y fp32 (T, C), of up to `tokens` tokens from number
    `token` on: in o (N, H, V), and in `fixed`, if it is given, what o keeps of them.
    """
    row, v = tl.arange(0, y.shape[0])[:, None], first + tl.arange(0, y.shape[1])[None, :]
    y = y.to(o.dtype.element_ty)
    at = o + ((token + row) * HEADS + head) * VALUE + v
    tl.store(at, y, mask=(row < tokens) & (v < VALUE))
    if fixed is not None:
        column, end = head * VALUE + first, head * VALUE + VALUE
        store_fixed(fixed, y.to(tl.float32), token, tokens, column, end, HEADS * VALUE)
