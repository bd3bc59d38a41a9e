"""Grouped-query attention in three kernels: heads made ready, splits of the context, their sum.
Where each row has one new token, the first two are one.

The query heads that share a head of keys are the rows of one matrix product, so each key and value
is read once. As with latent attention (attention.py), a row's context is cut into splits, each with
its own softmax. The kernels are in grouped_kernels.py. They read lengths from a tensor, so a graph
can hold them, and never read slots after a row's length.

Shapes: B rows, S new tokens of a row, N = B S tokens, T slots of the cache, H query heads, U heads
of keys and values, A head_dim, Z splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r1.kernels.attention import LOG2_E
from r1.kernels.chip import Chip, Choices, Sizes, power_of_two
from r1.kernels.fixed import Fixed
from r1.kernels.grouped_kernels import (
    grouped_split_kernel,
    grouped_step_kernel,
    grouped_sum_kernel,
    heads_kernel,
)
from r1.model import gqa
from r1.model.attend import probabilities
from r1.model.cache import LayerCache
from r1.model.gqa import GQA
from r1.model.step import Step


@dataclass(frozen=True)
class GroupedLaunch:
    """How the context is split: each program takes the queries of one head of keys through one of
    `splits` (a power of two) parts of the context, `keys` slots at a time.
    """

    keys: int
    splits: int
    warps: int = 4
    stages: int = 2

    @staticmethod
    def default(sizes: Sizes, chip: Chip) -> GroupedLaunch:
        tokens, _heads, groups, size, capacity, itemsize = sizes
        fill = max(1, chip.processors // (tokens * groups))  # one program for each processor
        splits = 1 << (max(1, min(64, fill, capacity // 32)).bit_length() - 1)
        # 16 KB at a time: a step of Llama's 8B shape on an H200 took 3.85 ms so, 4.14 with 32 KB.
        room = chip.shared // 2
        slot = 2 * power_of_two(size, 16) * itemsize  # bytes of a key and a value
        keys = next(k for k in (64, 32, 16) if k == 16 or k * slot <= min(2**14, room // 2))
        return GroupedLaunch(keys, splits, 4, max(1, min(3, room // (keys * slot))))

    @property
    def choices(self) -> Choices:
        return {
            "splits": (1, 2, 4, 8, 16, 32, 64), "keys": (16, 32, 64, 128), "warps": (2, 4, 8),
            "stages": (1, 2, 3, 4),
        }  # fmt: skip


# ---------------------------- heads
def heads(
    chip: Chip, q: Tensor, k: Tensor, v: Tensor, layer: GQA, step: Step, cache: LayerCache
) -> Tensor:
    """The projections' outputs q (N, H A), k and v (N, U A) -> queries (N, H, A), ready to attend.

    Adds the biases, norms and rotates queries and keys, and writes keys and values to `cache`, two
    tensors (B, T, U, A), at `step.positions`.
    """
    shape, (keys, values) = layer.shape, cache
    assert keys.stride() == values.stride() and keys.stride(3) == 1
    out = q.new_empty(q.shape[0], shape.num_attention_heads, shape.head_dim)
    programs = shape.num_attention_heads + 2 * shape.num_key_value_heads
    chip.run(
        heads_kernel, (q.shape[0], programs), *_unready(q, k, v, layer, step), step.positions,
        step.positions.shape[1], keys, values, *keys.stride()[:3], keys.shape[1], out,
        HEADS=shape.num_attention_heads, GROUPS=shape.num_key_value_heads, SIZE=shape.head_dim,
        PAD=power_of_two(shape.head_dim, 16), warps=1,
    )  # fmt: skip
    return out


def _unready(q: Tensor, k: Tensor, v: Tensor, layer: GQA, step: Step) -> tuple[Any, ...]:
    """The first arguments of the kernels that make heads ready."""
    normed = layer.shape.qk_norm
    gains = (layer.q_norm.weight, layer.k_norm.weight) if normed else (None, None)
    return (
        q, q.stride(0), k, k.stride(0), v, v.stride(0), layer.q_proj.bias, layer.k_proj.bias,
        layer.v_proj.bias, *gains, layer.q_norm.eps if normed else 0.0, step.cos, step.sin,
    )  # fmt: skip


def heads_torch(
    q: Tensor, k: Tensor, v: Tensor, layer: GQA, step: Step, cache: LayerCache
) -> Tensor:
    """The twin: the same lines as `GQA.forward`."""
    projections = zip((q, k, v), (layer.q_proj, layer.k_proj, layer.v_proj), strict=True)
    by_head = (*step.positions.shape, -1, layer.shape.head_dim)
    # (B, S, H, A), (B, S, U, A), (B, S, U, A)
    q, k, v = (each.with_bias(y).view(by_head) for y, each in projections)
    if layer.shape.qk_norm:
        q, k = layer.q_norm(q), layer.k_norm(k)
    q, k = gqa.rotate_each(q, k, step)
    step.write(cache, k, v)
    return q.flatten(0, 1)


# ---------------------------- attention
def grouped(
    chip: Chip, q: Tensor, cache: LayerCache, positions: Tensor, scale: float,
    launch: GroupedLaunch | None = None, fixed: Fixed | None = None,
) -> Tensor:  # fmt: skip
    """q (N, H, A), rotated, cache of two tensors (B, T, U, A), positions int64 (B, S) -> (N, H, A).

    Token n is number n % S of row n // S, and attends to slots 0 to its position. The kernels read
    `positions` before their waits, so they must be older than the previous kernel (chip.py).
    `fixed` is memory for the result (N, H A): it is stored there, too.
    """
    keys, values = cache
    assert keys.stride() == values.stride() and keys.stride(3) == 1
    splits = _Splits(chip, q, keys, launch, count=q.shape[1])
    chip.run(
        grouped_split_kernel, splits.grid, q, keys, values, *keys.stride()[:3], keys.shape[1],
        positions, positions.shape[1], splits.part, splits.weight, scale * LOG2_E,
        **splits.constants,
    )  # fmt: skip
    return splits.sum(positions, fixed)


class _Splits:
    """What the kernels of the splits write, and how they are launched, for `count` query heads of
    each line of q.
    """

    def __init__(
        self, chip: Chip, q: Tensor, keys: Tensor, launch: GroupedLaunch | None, count: int
    ) -> None:
        tokens, (_rows, capacity, groups, size) = q.shape[0], keys.shape
        sizes = (tokens, count, groups, size, capacity, keys.itemsize)
        use = launch or chip.launch(GroupedLaunch, *sizes)
        self.chip, self.capacity = chip, capacity
        self.part = q.new_empty(tokens, count, use.splits, size)
        self.weight = q.new_empty(tokens, count, use.splits, dtype=torch.float32)
        self.grid = (groups, use.splits, tokens)
        self.tiles = {
            "HEADS": count, "SIZE": size, "PAD": power_of_two(size, 16), "SPLITS": use.splits,
            "BLOCK_T": use.keys, "EARLY": tokens == 1,
        }  # fmt: skip
        self.constants: dict[str, Any] = self.tiles | {
            "GROUPS": groups, "BLOCK_H": power_of_two(count // groups, 16), "STAGES": use.stages,
            "warps": use.warps, "stages": use.stages,
        }  # fmt: skip

    def sum(self, positions: Tensor, fixed: Fixed | None) -> Tensor:
        """The splits' means, weighted and added up: (N, H, A)."""
        tokens, count, _splits, size = self.part.shape
        o = self.part.new_empty(tokens, count, size)
        self.chip.run(
            grouped_sum_kernel, (tokens, count), self.part, self.weight, positions, self.capacity,
            o, fixed, **self.tiles, warps=1,
        )  # fmt: skip
        return o


def grouped_torch(q: Tensor, cache: LayerCache, positions: Tensor, scale: float) -> Tensor:
    """The twin, over the cache's whole capacity."""
    keys, values = cache
    q = q.view(*positions.shape, *q.shape[1:])  # (B, S, H, A)
    k, v = (each.repeat_interleave(q.shape[2] // keys.shape[2], 2) for each in (keys, values))
    slots = torch.arange(keys.shape[1], device=q.device)
    hidden = (slots > positions[..., None])[:, None]  # (B, 1, S, T)
    bias = torch.zeros(hidden.shape, device=q.device).masked_fill(hidden, float("-inf"))
    p = probabilities(torch.einsum("bsha,btha->bhst", q, k), scale, bias).to(v.dtype)
    return torch.einsum("bhst,btha->bsha", p, v).flatten(0, 1)


# ---------------------------- both
def grouped_step(
    chip: Chip, q: Tensor, k: Tensor, v: Tensor, layer: GQA, step: Step, cache: LayerCache,
    launch: GroupedLaunch | None = None, fixed: Fixed | None = None,
) -> Tensor:  # fmt: skip
    """`heads`, then `grouped`: the projections' outputs (N, ...) -> (N, H, A).

    One kernel does the work of their first two where each row has one new token. Then the cache's
    older slots are read before the wait, so they must be as old as `positions`.
    """
    if step.positions.shape[1] > 1:
        ready = heads(chip, q, k, v, layer, step, cache)
        return grouped(chip, ready, cache, step.positions, layer.scale, launch, fixed)
    keys, values = cache
    assert keys.stride() == values.stride() and keys.stride(3) == 1
    splits = _Splits(chip, q, keys, launch, count=layer.shape.num_attention_heads)
    chip.run(
        grouped_step_kernel, splits.grid, *_unready(q, k, v, layer, step), step.positions, keys,
        values, *keys.stride()[:3], keys.shape[1], splits.part, splits.weight,
        layer.scale * LOG2_E, **splits.constants,
    )  # fmt: skip
    return splits.sum(step.positions, fixed)


def grouped_step_torch(
    q: Tensor, k: Tensor, v: Tensor, layer: GQA, step: Step, cache: LayerCache,
    fixed: None = None,
) -> Tensor:  # fmt: skip
    """The twin."""
    ready = heads_torch(q, k, v, layer, step, cache)
    return grouped_torch(ready, cache, step.positions, layer.scale)


GROUPED = {"torch": grouped_step_torch, "triton": grouped_step}


# ---------------------------- the attention alone
@torch.library.custom_op("r1::grouped_attention", mutates_args=())
def _grouped_attention(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float
) -> Tensor:
    return grouped(Chip.of(q.device), q, (keys, values), positions, scale)


@_grouped_attention.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, step: Step, cache: LayerCache | None
) -> Tensor:
    """A decode step's `attend` (r1/model/gqa_attend.py has the shapes), by the kernels.

    They are a custom operator, which torch.compile takes as a whole.
    """
    assert cache is not None, "a decode step has a cache"
    step.write(cache, k, v)
    flat = q.flatten(0, 1).contiguous()  # (N, H, A)
    return _grouped_attention(flat, *cache, step.positions, scale).view_as(q)
