"""Grouped-query attention's kernels: heads made ready, a split of the context, the splits' sum.

Where each row has one new token, `grouped_step_kernel` makes the heads ready and takes them through
a split, in one kernel.

Shapes: N tokens, T slots of the cache, H query heads, U heads of keys and values, A head_dim,
Z splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.attention_kernels import lengths_of, store_values
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
    d = tl.arange(0, PAD)[None, :]
    inside = d < SIZE
    cos, sin = rotation(cos, sin, token, d, SIZE)
    wait_for_previous(PDL)
    if head < HEADS:
        q += token * q_stride
        turned = turned_heads(q, q_bias, q_gain, eps, cos, sin, head, inside, d, SIZE)
        place = out + (token * HEADS + head) * SIZE + d
        tl.store(place, turned.to(out.dtype.element_ty), mask=inside)
    else:
        at = tl.load(positions + token)
        head -= HEADS
        slot = (token // new) * cache_row + at * cache_slot + d
        if at < capacity:
            if head < GROUPS:
                k += token * k_stride
                turned = turned_heads(k, k_bias, k_gain, eps, cos, sin, head, inside, d, SIZE)
                place = keys + slot + head * cache_head
                tl.store(place, turned.to(keys.dtype.element_ty), mask=inside)
            else:
                head -= GROUPS
                x = with_bias(v + token * v_stride, v_bias, head * SIZE + d, inside)
                place = values + slot + head * cache_head
                tl.store(place, x.to(values.dtype.element_ty), mask=inside)


@triton.jit
def with_bias(x, bias, at, mask):
    """Elements of a projection in fp32, rounded after the bias, as gqa.py does."""
    y = tl.load(x + at, mask=mask, other=0.0)
    if bias is not None:
        more = tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) + more).to(y.dtype)
    return y.to(tl.float32)


@triton.jit
def turned_heads(x, bias, gain, eps, cos, sin, head, mask, d, SIZE: tl.constexpr):
    """Queries or keys in fp32: with their bias, normed and rotated. They are loaded twice, the
    second time with their halves swapped.

    `head` is one number or a column of them; `d`, `cos` and `sin` are lines (1, PAD), and `mask` is
    that of all loads.
    """
    swapped, inside = (d + SIZE // 2) % SIZE, d < SIZE
    a = with_bias(x, bias, head * SIZE + d, mask)
    b = with_bias(x, bias, head * SIZE + swapped, mask)
    if gain is not None:
        factor = tl.rsqrt(tl.sum(a * a, axis=1, keep_dims=True) / SIZE + eps)
        a = normed(a, factor, gain + d, inside, x.dtype.element_ty)
        b = normed(b, factor, gain + swapped, inside, x.dtype.element_ty)
    return a * cos + b * sin


@triton.jit
def normed(a, factor, gain, mask, kind: tl.constexpr):
    """a times its norm's factor and gain, in fp32; both products are rounded, as in layers.py."""
    weight = tl.load(gain, mask=mask, other=0.0).to(tl.float32)
    return ((a * factor).to(kind).to(tl.float32) * weight).to(kind).to(tl.float32)


@triton.jit
def part_of(EACH: tl.constexpr, BLOCK_H: tl.constexpr, PAD: tl.constexpr):
    """A program's head of keys, split and token, its EACH query heads and which of them are real
    (BLOCK_H,), and a head's numbers (1, PAD).
    """
    group, head = tl.program_id(0), tl.arange(0, BLOCK_H)
    head = group * EACH + head
    real, d = head < (group + 1) * EACH, tl.arange(0, PAD)[None, :]
    return group, tl.program_id(1), tl.program_id(2).to(tl.int64), head, real, d


@triton.jit
def slots_of(position, capacity, split, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Where a split begins and ends. One that is empty ends before it begins, or there."""
    length, each = lengths_of(position, capacity, SPLITS, BLOCK_T)
    return split * each, tl.minimum(split * each + each, length)


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
    group, split, token, head, real, d = part_of(HEADS // GROUPS, BLOCK_H, PAD)
    start, end = slots_of(positions + token, capacity, split, SPLITS, BLOCK_T)
    first_slot = (token // new) * cache_row + group * cache_head
    wait_for_previous(PDL)
    let_next_start(PDL and not EARLY)
    row = token * HEADS + head
    queries = tl.load(q + row[:, None] * SIZE + d, mask=real[:, None] & (d < SIZE), other=0.0)
    if start < end:
        best, total, mean = no_softmax(BLOCK_H, PAD)
        best, total, mean = through_slots(
            queries, keys, values, first_slot, cache_slot, start, end, d, scale, best, total, mean,
            SIZE, BLOCK_T, STAGES,
        )  # fmt: skip
        write_split(part, weight, row * SPLITS + split, best, total, mean, real, d, SIZE)


@triton.jit
def grouped_step_kernel(
    q, q_stride, k, k_stride, v, v_stride, q_bias, k_bias, v_bias, q_gain, k_gain, eps, cos, sin,
    positions, keys, values, cache_row, cache_slot, cache_head, capacity, part, weight, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`heads_kernel` and `grouped_split_kernel` in one, where each row has one new token.

    Every split makes its queries ready again. The split that holds the new slot puts the new key
    and value into its last tile, and writes them to the cache. So from the cache come older slots
    alone, which no running kernel writes: the last tile's are loaded before the wait.
    """
    let_next_start(PDL and EARLY)
    group, split, token, head, real, d = part_of(HEADS // GROUPS, BLOCK_H, PAD)
    position = tl.load(positions + token)
    start, end = slots_of(positions + token, capacity, split, SPLITS, BLOCK_T)
    last = start + tl.maximum(end - start - 1, 0) // BLOCK_T * BLOCK_T
    at, first_slot = last + tl.arange(0, BLOCK_T), token * cache_row + group * cache_head
    older = at < tl.minimum(end, position)
    older_k, older_v = tile_of(keys, values, first_slot, cache_slot, at, older, d, SIZE)
    cos, sin = rotation(cos, sin, token, d, SIZE)
    wait_for_previous(PDL)
    let_next_start(PDL and not EARLY)
    if start < end:
        q, k, v = q + token * q_stride, k + token * k_stride, v + token * v_stride
        new_v = with_bias(v, v_bias, group * SIZE + d, d < SIZE).to(values.dtype.element_ty)
        new_k = turned_heads(k, k_bias, k_gain, eps, cos, sin, group, d < SIZE, d, SIZE)
        new_k = new_k.to(keys.dtype.element_ty)  # as new_v: (1, PAD), in the cache's dtype
        queries = turned_queries(q, q_bias, q_gain, eps, cos, sin, head, real, d, SIZE)
        if position < end:  # the new slot is here
            slot = first_slot + position * cache_slot + d
            tl.store(keys + slot, new_k, mask=d < SIZE)
            tl.store(values + slot, new_v, mask=d < SIZE)
        new = (at == position)[:, None]
        k_tile, v_tile = tl.where(new, new_k, older_k), tl.where(new, new_v, older_v)
        best, total, mean = no_softmax(BLOCK_H, PAD)
        best, total, mean = attended(queries, k_tile, v_tile, at < end, scale, best, total, mean)
        best, total, mean = through_slots(
            queries, keys, values, first_slot, cache_slot, start, last, d, scale, best, total,
            mean, SIZE, BLOCK_T, STAGES,
        )  # fmt: skip
        row = token * HEADS + head
        write_split(part, weight, row * SPLITS + split, best, total, mean, real, d, SIZE)


@triton.jit
def turned_queries(q, bias, gain, eps, cos, sin, head, real, d, SIZE: tl.constexpr):
    """The queries of the heads `head` (BLOCK_H,), as `tl.dot` takes them, (BLOCK_H, PAD).

    A maximum of one changes nothing. But Triton lets no layout of tl.dot's stand above it, in which
    each warp would make all queries ready.
    """
    mask = real[:, None] & (d < SIZE)
    queries = turned_heads(q, bias, gain, eps, cos, sin, head[:, None], mask, d, SIZE)
    return tl.max(queries[None], axis=0).to(q.dtype.element_ty)


@triton.jit
def rotation(cos, sin, token, d, SIZE: tl.constexpr):
    """A token's cos and sin, (1, PAD) each. They are as old as positions.

    For the maxima of one number see `turned_queries`: without biases they save it a few barriers.
    """
    at, mask = token * SIZE + d, d < SIZE
    cos = tl.max(tl.load(cos + at, mask=mask, other=0.0), axis=0, keep_dims=True)
    sin = tl.max(tl.load(sin + at, mask=mask, other=0.0), axis=0, keep_dims=True)
    return cos, sin


@triton.jit
def no_softmax(BLOCK_H: tl.constexpr, PAD: tl.constexpr):
    """The softmax of no slots yet: see `attended`."""
    best = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    return best, tl.zeros((BLOCK_H,), tl.float32), tl.zeros((BLOCK_H, PAD), tl.float32)


@triton.jit
def through_slots(
    queries, keys, values, first_slot, cache_slot, start, end, d, scale, best, total, mean,
    SIZE: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The softmax so far, with the slots from `start` to `end`."""
    for first in tl.range(start, end, BLOCK_T, num_stages=STAGES):
        at = first + tl.arange(0, BLOCK_T)
        k, v = tile_of(keys, values, first_slot, cache_slot, at, at < end, d, SIZE)
        best, total, mean = attended(queries, k, v, at < end, scale, best, total, mean)
    return best, total, mean


@triton.jit
def tile_of(keys, values, first_slot, cache_slot, at, seen, d, SIZE: tl.constexpr):
    """The keys and the values, (BLOCK_T, PAD) each, of the slots `at`, where they are `seen`."""
    place = first_slot + at.to(tl.int64)[:, None] * cache_slot + d
    mask = seen[:, None] & (d < SIZE)
    k = tl.load(keys + place, mask=mask, other=0.0)
    return k, tl.load(values + place, mask=mask, other=0.0)


@triton.jit
def attended(queries, k, v, seen, scale, best, total, mean):
    """The softmax so far, with one more tile: its best scores, total weights (BLOCK_H,), and the
    weighted sums of values (BLOCK_H, PAD), relative to the best.
    """
    zeros = tl.zeros((queries.shape[0], k.shape[0]), tl.float32)
    scores = product(queries, tl.trans(k), zeros)
    scores = tl.where(seen[None, :], scores * scale, float("-inf"))
    better = tl.maximum(best, tl.max(scores, axis=1))
    p = tl.exp2(scores - better[:, None])
    shrink = tl.exp2(best - better)
    total = total * shrink + tl.sum(p, axis=1)
    return better, total, product(p.to(v.dtype), v, mean * shrink[:, None])


@triton.jit
def write_split(part, weight, place, best, total, mean, real, d, SIZE: tl.constexpr):
    """Write a split's softmax for the heads at `place` (BLOCK_H,), where they are `real`."""
    mean /= total[:, None]
    here = part + place[:, None] * SIZE + d
    tl.store(here, mean.to(part.dtype.element_ty), mask=real[:, None] & (d < SIZE))
    tl.store(weight + place, best + tl.log2(total), mask=real)


@triton.jit
def grouped_sum_kernel(
    part, weight, positions, capacity, o, fixed, HEADS: tl.constexpr, SIZE: tl.constexpr,
    PAD: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The splits' means of one head of one token, weighted and added up: o (N, H, A), and into
    `fixed`, if it is given.

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
    store_values(o, fixed, y[None, :], token, 1, head, 0, HEADS, SIZE)
