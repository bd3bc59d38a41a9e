"""Grouped-query attention's kernels: heads made ready, a split of the context, the splits' sum.

Shapes: N tokens, T slots of the cache, H query heads, U heads of keys and values, A head_dim,
Z splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.attention_kernels import lengths_of
from r1.kernels.chip import let_next_start, product, wait_for_previous


@triton.jit
def heads_kernel(
    q, q_stride, k, k_stride, v, v_stride, q_bias, k_bias, v_bias, q_gain, k_gain, eps, cos, sin,
    positions, new, keys, values, cache_row, cache_slot, cache_head, capacity, out,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One head of one token. Queries go to `out` (N, H, A), keys and values to their slot.

    The programs of a token are its H queries, then U keys, then U values.
    """
    let_next_start(PDL)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, PAD)
    wait_for_previous(PDL)
    cos += token * SIZE
    sin += token * SIZE
    if head < HEADS:
        turned = turned_head(q + token * q_stride, q_bias, q_gain, eps, cos, sin, head, d, SIZE)
        place = out + (token * HEADS + head) * SIZE + d
        tl.store(place, turned.to(out.dtype.element_ty), mask=d < SIZE)
    else:
        at = tl.load(positions + token)
        head -= HEADS
        slot = (token // new) * cache_row + at * cache_slot + d
        if at < capacity:
            if head < GROUPS:
                k += token * k_stride
                turned = turned_head(k, k_bias, k_gain, eps, cos, sin, head, d, SIZE)
                place = keys + slot + head * cache_head
                tl.store(place, turned.to(keys.dtype.element_ty), mask=d < SIZE)
            else:
                head -= GROUPS
                x = with_bias(v + token * v_stride, v_bias, head * SIZE + d, d < SIZE)
                place = values + slot + head * cache_head
                tl.store(place, x.to(values.dtype.element_ty), mask=d < SIZE)


@triton.jit
def with_bias(x, bias, at, mask):
    """Elements of a projection in fp32, rounded after the bias, as gqa.py does."""
    y = tl.load(x + at, mask=mask, other=0.0)
    if bias is not None:
        more = tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) + more).to(y.dtype)
    return y.to(tl.float32)


@triton.jit
def turned_head(x, bias, gain, eps, cos, sin, head, d, SIZE: tl.constexpr):
    """A query or key in fp32: with its bias, normed and rotated. It is loaded twice, the second
    time with its halves swapped.
    """
    half: tl.constexpr = SIZE // 2
    swapped = tl.where(d < half, d + half, d - half)
    mask = d < SIZE
    a = with_bias(x, bias, head * SIZE + d, mask)
    b = with_bias(x, bias, head * SIZE + swapped, mask)
    if gain is not None:
        factor = tl.rsqrt(tl.sum(a * a, axis=0) / SIZE + eps)
        a = normed(a, factor, gain + d, mask, x.dtype.element_ty)
        b = normed(b, factor, gain + swapped, mask, x.dtype.element_ty)
    c = tl.load(cos + d, mask=mask, other=0.0)
    return a * c + b * tl.load(sin + d, mask=mask, other=0.0)


@triton.jit
def normed(a, factor, gain, mask, kind: tl.constexpr):
    """a times its norm's factor and gain, in fp32; both products are rounded, as in layers.py."""
    weight = tl.load(gain, mask=mask, other=0.0).to(tl.float32)
    return ((a * factor).to(kind).to(tl.float32) * weight).to(kind).to(tl.float32)


@triton.jit
def grouped_split_kernel(
    q, keys, values, cache_row, cache_slot, cache_head, capacity, positions, new, part, weight,
    scale, HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split's weighted mean of values, `part` (N, H, Z, A), and the base-2 logarithm of its
    weight, `weight` (N, H, Z), for the queries of one head of keys. An empty split writes nothing.

    EARLY, for one token: its few programs leave room for the next kernels, so these may start at
    once. With the sum's EARLY, o_proj's first weights are loaded while this kernel runs.
    """
    let_next_start(PDL and EARLY)
    each_group: tl.constexpr = HEADS // GROUPS
    group, split = tl.program_id(0), tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    own = tl.arange(0, BLOCK_H)
    d, t = tl.arange(0, PAD), tl.arange(0, BLOCK_T)
    length, each = lengths_of(positions + token, capacity, SPLITS, BLOCK_T)
    start = split * each
    end = tl.minimum(start + each, length)
    first_slot = (token // new) * cache_row + group * cache_head
    wait_for_previous(PDL)
    let_next_start(PDL and not EARLY)
    real, inside = (own < each_group)[:, None], (d < SIZE)[None, :]
    row = token * HEADS + group * each_group + own
    queries = tl.load(q + row[:, None] * SIZE + d[None, :], mask=real & inside, other=0.0)
    if start < end:
        best = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        mean = tl.zeros((BLOCK_H, PAD), tl.float32)
        for first in tl.range(start, end, BLOCK_T, num_stages=STAGES):
            at = first + t
            slot = first_slot + at.to(tl.int64)[:, None] * cache_slot + d[None, :]
            seen = (at < end)[:, None] & inside
            k = tl.load(keys + slot, mask=seen, other=0.0)  # (BLOCK_T, PAD)
            v = tl.load(values + slot, mask=seen, other=0.0)  # (BLOCK_T, PAD)
            scores = product(queries, tl.trans(k), tl.zeros((BLOCK_H, BLOCK_T), tl.float32))
            scores = tl.where((at < end)[None, :], scores * scale, float("-inf"))
            better = tl.maximum(best, tl.max(scores, axis=1))
            p = tl.exp2(scores - better[:, None])
            shrink = tl.exp2(best - better)
            total = total * shrink + tl.sum(p, axis=1)
            mean = product(p.to(v.dtype), v, mean * shrink[:, None])
            best = better
        place = row * SPLITS + split
        mean /= total[:, None]
        here = part + place[:, None] * SIZE + d[None, :]
        tl.store(here, mean.to(part.dtype.element_ty), mask=real & inside)
        tl.store(weight + place, best + tl.log2(total), mask=own < each_group)


@triton.jit
def grouped_sum_kernel(
    part, weight, positions, capacity, o, HEADS: tl.constexpr, SIZE: tl.constexpr,
    PAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The splits' means of one head of one token, weighted and added up: o (N, H, A).

    Which splits are empty follows from the length, so empty splits are never read.
    """
    let_next_start(PDL and EARLY)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z, d = tl.arange(0, SPLITS), tl.arange(0, PAD)
    length, each = lengths_of(positions + token, capacity, SPLITS, BLOCK_T)
    filled = z * each < length
    place = (token * HEADS + head) * SPLITS + z
    wait_for_previous(PDL)
    let_next_start(PDL and not EARLY)
    logs = tl.load(weight + place, mask=filled, other=float("-inf"))
    mask = filled[:, None] & (d < SIZE)[None, :]
    mean = tl.load(part + place[:, None] * SIZE + d[None, :], mask=mask, other=0.0)
    share = tl.exp2(logs - tl.max(logs, axis=0))
    share /= tl.sum(share, axis=0)
    y = tl.sum(mean.to(tl.float32) * share[:, None], axis=0)  # (PAD,)
    tl.store(o + (token * HEADS + head) * SIZE + d, y.to(o.dtype.element_ty), mask=d < SIZE)
