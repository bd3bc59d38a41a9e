"""Three strategies for the slot `attend` of grouped-query attention, over one cache.

All of them keep the keys and values of the U heads, 2 U A numbers of a token. They compute the same
function.

| strategy | how | good for |
|---|---|---|
| `naive` | repeats keys and values for all query heads | study |
| `sdpa` | torch's fused attention, which keeps no scores in memory | prompts |
| `grouped` | the query heads that share a key head are rows of one product | decode |

Shapes: B rows, S queries of a row, T keys, H query heads, U heads of keys and values, A head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.model.attend import probabilities
from r1.model.cache import Entry, LayerCache
from r1.model.config import GroupedShape
from r1.model.step import Step
from r1.model.strategy import Attention


class GroupedAttend(Attention):
    """A way to compute attention of a call's tokens to their keys, and the cache that it keeps."""

    keeps = "the keys and values of the key-value heads"

    def entry(self, shape: GroupedShape) -> Entry:
        return [(shape.num_key_value_heads, shape.head_dim)] * 2

    def flops(self, shape: GroupedShape) -> float:
        return 2.0 * shape.num_attention_heads * 2 * shape.head_dim

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, step: Step, cache: LayerCache | None
    ) -> Tensor:
        """q (B, S, H, A), k and v (B, S, U, A), rotated -> (B, S, H, A).

        `scale` multiplies the scores. Where there is a cache, the tokens are first written to it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__")


class Naive(GroupedAttend):
    """Textbook attention: every query head gets keys and values of its own."""

    name, needs = "naive", "bias"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, step: Step, cache: LayerCache | None
    ) -> Tensor:
        if cache is not None:
            k, v = step.write(cache, k, v)  # (B, T, U, A) each
        k, v = for_all_heads(k, q), for_all_heads(v, q)  # (B, T, H, A) each
        scores = torch.einsum("bsha,btha->bhst", q, k.to(q.dtype))  # (B, H, S, T)
        p = probabilities(scores, scale, step.bias).to(v.dtype)  # (B, H, S, T)
        return torch.einsum("bhst,btha->bsha", p, v)  # (B, S, H, A)


class Sdpa(GroupedAttend):
    """torch's fused attention.

    On GPUs only its flash kernel takes fewer key heads than query heads. That kernel knows no mask
    and no fp32 (and no fp16 before Ampere). Its other kernels get each head repeated: without that,
    torch would keep all scores in memory.
    """

    name, needs = "sdpa", "mask"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, step: Step, cache: LayerCache | None
    ) -> Tensor:
        if cache is not None:
            k, v = step.write(cache, k, v)  # (B, T, U, A) each
        causal = step.starts_rows  # then there is no mask
        shares_heads = causal and q.dtype == torch.bfloat16
        if not shares_heads:
            k, v = for_all_heads(k, q), for_all_heads(v, q)  # (B, T, H, A) each
        # (B, H, S, A), (B, U, T, A), (B, U, T, A), or H heads of keys and values
        q, k, v = (each.transpose(1, 2) for each in (q, k.to(q.dtype), v.to(q.dtype)))
        o = F.scaled_dot_product_attention(
            q, k, v, step.mask, is_causal=causal, scale=scale, enable_gqa=shares_heads
        )  # (B, H, S, A)
        return o.transpose(1, 2)  # (B, S, H, A)


class Grouped(GroupedAttend):
    """Reads each key and value once: H/U S queries meet the T keys of a head in one product."""

    name, needs = "grouped", "bias"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, step: Step, cache: LayerCache | None
    ) -> Tensor:
        if cache is not None:
            k, v = step.write(cache, k, v)  # (B, T, U, A) each
        rows, new, heads, _ = q.shape
        # (B U, T, A) each: views of a cache, whose heads lie before its slots
        k, v = (each.transpose(1, 2).flatten(0, 1) for each in (k, v))
        queries = q.transpose(1, 2).reshape(len(k), -1, q.shape[-1])  # (B U, H/U S, A)
        scores = torch.bmm(queries, k.to(q.dtype).mT)  # (B U, H/U S, T)
        scores = scores.view(rows, heads, new, -1)  # (B, H, S, T)
        p = probabilities(scores, scale, step.bias).to(v.dtype)  # (B, H, S, T)
        o = torch.bmm(p.view(*queries.shape[:2], -1), v)  # (B U, H/U S, A)
        return o.view(rows, heads, new, -1).transpose(1, 2)  # (B, S, H, A)


STRATEGIES: tuple[GroupedAttend, ...] = (Naive(), Sdpa(), Grouped())


def for_all_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values (B, T, U, A), each head repeated for its queries' heads: (B, T, H, A)."""
    return x.repeat_interleave(q.shape[2] // x.shape[2], dim=2)
