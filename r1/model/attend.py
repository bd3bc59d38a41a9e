"""Three strategies for the slot `attend`, over one set of weights. They compute the same function.

| strategy | keeps of one token | one new token against T cached ones | good for |
|---|---|---|---|
| `naive` | keys and values of every head, H (P + R + V) | uses them as they are | study |
| `expand` | `c_kv` and `k_pe`, C + R | makes T keys and values, then fused attention | prompts |
| `absorbed` | `c_kv` and `k_pe`, C + R | applies W_UK to the query, W_UV to the sum | decode |

A fourth, `triton`, is `absorbed` as hand-written kernels for decode: r1/kernels/attention.py.

Shapes: B rows, S queries of a row, T keys, H heads, P nope dim, R rope dim, V value dim, C latent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.model.cache import Entry, LayerCache
from r1.model.config import AttentionShape
from r1.model.layers import Linear
from r1.model.step import Step
from r1.model.strategy import Attention


class UpProjection(Linear):
    """`kv_b_proj`, (H (P + V), C): for each head W_UK (P, C) above W_UV (V, C)."""

    def __init__(self, shape: AttentionShape) -> None:
        self.heads, self.nope = shape.num_attention_heads, shape.qk_nope_head_dim
        self.value = shape.v_head_dim
        super().__init__(shape.kv_lora_rank, self.heads * (self.nope + self.value))

    def keys_values(self, c_kv: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C) and (B, T, R) -> keys (B, T, H, P + R) and values (B, T, H, V)."""
        kv = self(c_kv).unflatten(-1, (self.heads, -1))  # (B, T, H, P + V)
        k_nope, v = kv.split([self.nope, self.value], dim=-1)  # (B, T, H, P), (B, T, H, V)
        k_pe = k_pe.to(kv.dtype)[:, :, None].expand(-1, -1, self.heads, -1)  # (B, T, H, R)
        return torch.cat((k_nope, k_pe), dim=-1), v

    def by_head(self) -> tuple[Tensor, Tensor]:
        """W_UK (H, P, C) and W_UV (H, V, C), as views of the dense weight."""
        # A default would be one more thing that a compiled step checks.
        weight = self.matrix.dense(None).unflatten(0, (self.heads, -1))  # (H, P + V, C)
        w_uk, w_uv = weight.split([self.nope, self.value], dim=1)  # (H, P, C), (H, V, C)
        return w_uk, w_uv


class Attend(Attention):
    """A way to compute attention of a call's tokens to their keys, and the cache that it keeps."""

    keeps = "the latent"  # `c_kv` and `k_pe`

    def entry(self, shape: AttentionShape) -> Entry:
        return [(shape.latent_dim,)]

    def flops(self, shape: AttentionShape) -> float:
        return 2.0 * shape.num_attention_heads * (shape.qk_head_dim + shape.v_head_dim)

    def __call__(
        self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, up: UpProjection,
        scale: float, step: Step, cache: LayerCache | None,
    ) -> Tensor:  # fmt: skip
        """q_nope (B, S, H, P), q_pe (B, S, H, R), c_kv (B, S, C), k_pe (B, S, R) -> (B, S, H, V).

        `scale` multiplies the scores. Where there is a cache, the tokens are first written to it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__")


class Naive(Attend):
    """Textbook attention, over a cache of full keys and values."""

    name, needs, keeps = "naive", "bias", "every head's keys and values"

    def entry(self, shape: AttentionShape) -> Entry:
        heads = shape.num_attention_heads
        return [(heads, shape.qk_head_dim), (heads, shape.v_head_dim)]

    def __call__(
        self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, up: UpProjection,
        scale: float, step: Step, cache: LayerCache | None,
    ) -> Tensor:  # fmt: skip
        k, v = up.keys_values(c_kv, k_pe)
        if cache is not None:
            k, v = step.write(cache, k, v)  # (B, T, H, P + R), (B, T, H, V)
        q = torch.cat((q_nope, q_pe), dim=-1)  # (B, S, H, P + R)
        scores = torch.einsum("bshd,bthd->bhst", q, k)  # (B, H, S, T)
        p = probabilities(scores, scale, step.bias).to(v.dtype)  # (B, H, S, T)
        return torch.einsum("bhst,bthv->bshv", p, v)  # (B, S, H, V)


class Expand(Attend):
    """Makes keys and values from all latents at each call. Fewest operations for many queries."""

    name, needs = "expand", "mask"

    def __call__(
        self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, up: UpProjection,
        scale: float, step: Step, cache: LayerCache | None,
    ) -> Tensor:  # fmt: skip
        if cache is not None:
            (kept,) = step.write(cache, torch.cat((c_kv, k_pe), dim=-1))  # (B, T, C + R)
            # (B, T, C), (B, T, R)
            c_kv, k_pe = kept.split([c_kv.shape[-1], k_pe.shape[-1]], dim=-1)
        k, v = up.keys_values(c_kv, k_pe)  # (B, T, H, P + R), (B, T, H, V)
        q = torch.cat((q_nope, q_pe.to(q_nope.dtype)), dim=-1)  # (B, S, H, P + R)
        # (B, H, S, P + R), (B, H, T, P + R), (B, H, T, V)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        causal = step.starts_rows  # then there is no mask
        # (B, H, S, V)
        o = F.scaled_dot_product_attention(q, k, v, step.mask, is_causal=causal, scale=scale)
        return o.transpose(1, 2)  # (B, S, H, V)


class Absorbed(Attend):
    """Attention to the latents themselves (V2 paper, section 2.1.2).

    q · (W_UK c) = (W_UK^T q) · c, and sum p (W_UV c) = W_UV (sum p c). All heads share these keys,
    so the scores are one matrix product of S H rows. The keys' first C elements serve as values.
    """

    name, needs = "absorbed", "bias"

    def query_numbers(self, shape: AttentionShape) -> int:
        return shape.qk_head_dim + shape.latent_dim + shape.kv_lora_rank

    def key_numbers(self, shape: AttentionShape) -> int:
        return 0

    def flops(self, shape: AttentionShape) -> float:
        return 2.0 * shape.num_attention_heads * (shape.latent_dim + shape.kv_lora_rank)

    def __call__(
        self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, up: UpProjection,
        scale: float, step: Step, cache: LayerCache | None,
    ) -> Tensor:  # fmt: skip
        k = torch.cat((c_kv, k_pe), dim=-1)  # (B, S, C + R)
        if cache is not None:
            (k,) = step.write(cache, k)  # (B, T, C + R)
        w_uk, w_uv = up.by_head()  # (H, P, C), (H, V, C)
        q_c = by_head(q_nope, w_uk)  # (B, S, H, C)
        q = torch.cat((q_c, q_pe.to(q_c.dtype)), dim=-1)  # (B, S, H, C + R)
        scores = torch.bmm(q.flatten(1, 2), k.to(q.dtype).mT)  # (B, S H, T)
        scores = scores.view(*q.shape[:3], -1).transpose(1, 2)  # (B, H, S, T)
        p = probabilities(scores, scale, step.bias).transpose(1, 2).flatten(1, 2)  # (B, S H, T)
        c = torch.bmm(p.to(k.dtype), k[..., : c_kv.shape[-1]])  # (B, S H, C)
        return by_head(c.view(*q.shape[:3], -1), w_uv.mT)  # (B, S, H, V)


STRATEGIES: tuple[Attend, ...] = (Naive(), Expand(), Absorbed())


def by_head(x: Tensor, weight: Tensor) -> Tensor:
    """Each head's own product: x (B, S, H, in) times weight (H, in, out) -> (B, S, H, out)."""
    rows = x.flatten(0, 1).transpose(0, 1)  # (H, B S, in)
    return torch.bmm(rows, weight).transpose(0, 1).view(*x.shape[:3], -1)  # (B, S, H, out)


def probabilities(scores: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Softmax of `scale * scores` over the keys, in fp32: (B, H, S, T) -> (B, H, S, T).

    `bias` (B, 1, S, T) hides keys. None: the keys are the queries' own tokens, so S = T.
    """
    if bias is None:
        if scores.shape[-2] != scores.shape[-1]:
            raise ValueError('there is no bias to hide cached keys: set needs = "bias"')
        bias = scores.new_full(scores.shape[-2:], float("-inf"), dtype=torch.float32).triu(1)
    return torch.add(bias, scores, alpha=scale).softmax(dim=-1)
