"""The attention kernels that bench_kernels.py times, of latent and of grouped-query attention."""

from __future__ import annotations

import torch
from kernel_cases import EPS, Case, Place, randn
from torch import Tensor

from r1 import Config
from r1.model.gqa import GQA
from r1.model.step import Step


def latent_case(place: Place, c: Config, tokens: int, context: int) -> Case:
    from r1.kernels.latent import LatentLaunch, latent, latent_torch

    heads, rank, r, nope = (
        c.attention.num_attention_heads,
        c.attention.kv_lora_rank,
        c.attention.qk_rope_head_dim,
        c.attention.qk_nope_head_dim,
    )
    q, kv, gain = (
        randn(tokens, heads * c.attention.qk_head_dim),
        randn(tokens, c.attention.latent_dim),
        randn(rank),
    )
    angle = torch.rand(tokens, 1, 1, r)
    positions = torch.full((tokens, 1), context - 1)
    cache = randn(tokens, context, c.attention.latent_dim)

    def run(weight: Tensor, use: LatentLaunch | None) -> tuple[Tensor, Tensor]:
        w_uk = weight[:, :nope]
        return latent(
            place.chip, q, kv, w_uk, gain, EPS, angle, angle, positions, cache, launch=use
        )

    def twin(weight: Tensor) -> tuple[Tensor, Tensor]:
        return latent_torch(q, kv, weight[:, :nope], gain, EPS, angle, angle, positions, cache)

    def outputs(queries: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The queries and the new cache entries. They are cleared here, so that the next kernel
        compared must write them itself.
        """
        written = cache[:, context - 1].clone()
        cache[:, context - 1] = 0
        return [*queries, written]

    nbytes = 2 * heads * nope * rank
    weights = [
        randn(heads, nope + c.attention.v_head_dim, rank, scale=0.02)
        for _ in range(place.copies(nbytes))
    ]
    moved = nbytes + 2 * (q.numel() + kv.numel() * 2 + tokens * heads * c.attention.latent_dim)
    default = LatentLaunch.default((tokens, heads, nope, rank, 2), place.chip)
    return Case("latent", moved, nbytes * tokens, weights, run, twin, default, outputs)


def attention_case(place: Place, c: Config, tokens: int, context: int) -> Case:
    from r1.kernels.attention import AttentionLaunch, attention, attention_torch

    heads, rank, nope = (
        c.attention.num_attention_heads,
        c.attention.kv_lora_rank,
        c.attention.qk_nope_head_dim,
    )
    q_c, q_pe = (
        randn(tokens, heads, rank, scale=0.1),
        randn(tokens, heads, c.attention.qk_rope_head_dim),
    )
    positions = torch.full((tokens, 1), context - 1)

    def run(cold: tuple[Tensor, Tensor], use: AttentionLaunch | None) -> Tensor:
        return attention(place.chip, q_c, q_pe, cold[0], positions, cold[1][:, nope:], 0.07, use)

    def twin(cold: tuple[Tensor, Tensor]) -> Tensor:
        return attention_torch(q_c, q_pe, cold[0], positions, cold[1][:, nope:], 0.07)

    nbytes = (
        2 * tokens * context * c.attention.latent_dim + 2 * heads * c.attention.v_head_dim * rank
    )
    kv_b = (heads, nope + c.attention.v_head_dim, rank)
    cold = [
        (randn(tokens, context, c.attention.latent_dim), randn(*kv_b, scale=0.02))
        for _ in range(place.copies(nbytes))
    ]
    flops = 2 * tokens * heads * context * (c.attention.latent_dim + rank)
    default = AttentionLaunch.default(
        (tokens, heads, rank, c.attention.qk_rope_head_dim, context, 2), place.chip
    )
    return Case(f"attention, {context} tokens", nbytes, flops, cold, run, twin, default)


def grouped_case(place: Place, c: Config, tokens: int, context: int) -> Case:
    """Biases, norms, rotation, the new entries of the cache, and the attention."""
    from r1.kernels.grouped import GroupedLaunch, grouped_step, grouped_step_torch

    a = c.grouped
    layer, step = grouped_layer(c), step_at(tokens, context, a.head_dim)
    sizes = [n * a.head_dim for n in (a.num_attention_heads, *[a.num_key_value_heads] * 2)]
    q, k, v = randn(tokens, sum(sizes), scale=0.5).split(sizes, dim=-1)
    written: list[tuple[Tensor, Tensor]] = []  # the cache of the latest call

    def run(cache: tuple[Tensor, Tensor], use: GroupedLaunch | None) -> Tensor:
        written[:] = [cache]
        return grouped_step(place.chip, q, k, v, layer, step, cache, use)

    def twin(cache: tuple[Tensor, Tensor]) -> Tensor:
        written[:] = [cache]
        return grouped_step_torch(q, k, v, layer, step, cache)

    def outputs(o: Tensor) -> list[Tensor]:
        """As of `latent_case`: the new entries are cleared, so that each kernel must write them."""
        new = [each[:, context - 1].clone() for each in written[0]]
        for each in written[0]:
            each[:, context - 1] = 0
        return [o, *new]

    nbytes = 2 * 2 * tokens * context * a.num_key_value_heads * a.head_dim
    cold = [grouped_cache(c, tokens, context) for _ in range(place.copies(nbytes))]
    heads = (a.num_attention_heads, a.num_key_value_heads, a.head_dim)
    default = GroupedLaunch.default((tokens, *heads, context, 2), place.chip)
    flops = 2 * 2 * tokens * context * sizes[0]
    nbytes += 2 * tokens * (2 * sizes[0] + 2 * sizes[1])
    return Case(f"attention, {context} tokens", nbytes, flops, cold, run, twin, default, outputs)


def grouped_layer(c: Config) -> GQA:
    """One layer's attention with random biases and gains, and without matrices.

    They are small, and so are scores: the twin rounds these to bf16.
    """
    with torch.device("meta"):
        layer = GQA(c).bfloat16().requires_grad_(False)
    for module in layer.children():
        for name, vector in module.named_parameters():
            if vector.dim() == 1:
                small = randn(*vector.shape, scale=0.3)
                setattr(module, name, torch.nn.Parameter(small, requires_grad=False))
    return layer


def step_at(tokens: int, context: int, size: int) -> Step:
    """One new token of each row, which takes the last slot of `context`."""
    angle = torch.rand(tokens, 1, 1, size)
    positions = torch.full((tokens, 1), context - 1)
    return Step("decode", positions, angle, angle, torch.arange(tokens)[:, None])


def grouped_cache(c: Config, tokens: int, context: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, T, U, A), whose heads lie before slots, as in a model's cache."""
    shape = (tokens, c.grouped.num_key_value_heads, context, c.grouped.head_dim)
    return randn(*shape).transpose(1, 2), randn(*shape).transpose(1, 2)
