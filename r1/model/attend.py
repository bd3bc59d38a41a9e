"""Three ways to fill the slot `attend` over one set of weights. They compute the same function.

| strategy | cache of one token | work of one new token against T cached ones | for |
|---|---|---|---|
| `naive` | keys and values of every head, H (N + R + V) | reads all of it | reading; the reference |
| `expand` | the latent, C + R | expands T latents to keys and values, then fused attention | prefill |
| `absorbed` | the latent, C + R | moves W_UK to the query and W_UV behind the sum: reads the T latents, once | decode |

A fourth, `triton`, is `absorbed` as hand-written kernels for decode: r1/kernels/attention.py.

A mask of None means that the keys are the step's own tokens and position i sees 0..i, so fused
causal kernels apply: padding stands at the *end* of a row, where no real token sees it.

Shapes: B batch, S sequence (queries), T keys, H heads, N nope, R rope, V value dim, C latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from r1.model.cache import LayerCache
    from r1.model.mla import MLA
    from r1.model.transformer import Step


class Attend(Protocol):
    """q_nope (B, S, H, N), q_pe (B, S, H, R), c_kv (B, S, C), k_pe (B, S, R) -> (B, S, H, V).

    Writes the step's tokens into the layer's cache, where there is one, before it looks at them.
    """

    def __call__(
        self,
        mla: MLA,
        q_nope: Tensor,
        q_pe: Tensor,
        c_kv: Tensor,
        k_pe: Tensor,
        step: Step,
        cache: LayerCache | None,
    ) -> Tensor: ...


def naive(
    mla: MLA,
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    step: Step,
    cache: LayerCache | None,
) -> Tensor:
    """Attention as the textbook has it, over a cache of full keys and values."""
    k, v = keys_values(mla, c_kv, k_pe)
    if cache is not None:
        k, v = step.remember(cache, k, v)  # (B, T, H, N + R), (B, T, H, V)
    q = torch.cat((q_nope, q_pe), dim=-1)  # (B, S, H, N + R)
    scores = torch.einsum("bshd,bthd->bhst", q, k)
    return torch.einsum(
        "bhst,bthv->bshv", probabilities(scores, mla.scale, step.bias).to(v.dtype), v
    )


def expand(
    mla: MLA,
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    step: Step,
    cache: LayerCache | None,
) -> Tensor:
    """Keys and values made anew from the latents, then torch's fused attention: the cheapest in
    FLOPs for many queries."""
    if cache is not None:
        (latent,) = step.remember(cache, torch.cat((c_kv, k_pe), dim=-1))  # (B, T, C + R)
        c_kv, k_pe = latent.split(mla.kv_split, dim=-1)
    k, v = keys_values(mla, c_kv, k_pe)
    q = torch.cat((q_nope, q_pe.to(q_nope.dtype)), dim=-1)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # (B, H, S or T, ...)
    o = F.scaled_dot_product_attention(
        q, k, v, step.mask, is_causal=step.mask is None, scale=mla.scale
    )
    return o.transpose(1, 2)


def absorbed(
    mla: MLA,
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    step: Step,
    cache: LayerCache | None,
) -> Tensor:
    """Attention among latents: q.(W_UK c) = (W_UK^T q).c, and sum p (W_UV c) = W_UV sum p c (V2
    paper, section 2.1.2).

    All heads share the latent keys, so it is one matrix product with S H rows, and the same latents
    serve as values."""
    latent = torch.cat((c_kv, k_pe), dim=-1)  # (B, S, C + R)
    if cache is not None:
        (latent,) = step.remember(cache, latent)  # (B, T, C + R)
    w_uk, w_uv = mla.up_projections()
    q_c = by_head(q_nope, w_uk)  # (B, S, H, C)
    q = torch.cat((q_c, q_pe.to(q_c.dtype)), dim=-1)  # (B, S, H, C + R)
    scores = torch.bmm(q.flatten(1, 2), latent.to(q.dtype).mT)  # (B, S H, T)
    scores = scores.view(*q.shape[:3], -1).transpose(1, 2)  # (B, H, S, T)
    p = probabilities(scores, mla.scale, step.bias).transpose(1, 2).flatten(1, 2)  # (B, S H, T)
    c = torch.bmm(p.to(latent.dtype), latent[..., : mla.kv_split[0]])  # (B, S H, C)
    return by_head(c.view(*q.shape[:3], -1), w_uv.mT)


STRATEGIES: dict[str, Attend] = {"naive": naive, "expand": expand, "absorbed": absorbed}


def by_head(x: Tensor, weight: Tensor) -> Tensor:
    """Each head's own product: x (B, S, H, in) times weight (H, in, out) -> (B, S, H, out)."""
    rows = x.flatten(0, 1).transpose(0, 1)  # (H, B S, in)
    return torch.bmm(rows, weight).transpose(0, 1).view(*x.shape[:3], -1)


def keys_values(mla: MLA, c_kv: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (B, T, C) and shared rotated keys (B, T, R) -> keys (B, T, H, N + R) and values (B,
    T, H, V)."""
    kv = mla.kv_b_proj(c_kv).unflatten(-1, (mla.heads, -1))  # (B, T, H, N + V)
    k_nope, v = kv.split([mla.nope, mla.v_dim], dim=-1)
    k_pe = k_pe.to(kv.dtype)[:, :, None].expand(-1, -1, mla.heads, -1)  # (B, T, H, R)
    return torch.cat((k_nope, k_pe), dim=-1), v


def probabilities(scores: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Softmax over the keys in fp32: scores (B, H, S, T), bias (B, 1, S, T) of 0 and -inf, or None
    -> fp32 (B, H, S, T)."""
    if bias is None:
        bias = torch.full(scores.shape[-2:], float("-inf"), device=scores.device).triu(1)
    return torch.add(bias, scores, alpha=scale).softmax(dim=-1)
