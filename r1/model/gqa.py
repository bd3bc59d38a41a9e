"""Grouped-query attention (GQA, arXiv 2305.13245): some query heads share one head of keys, values.

It is the attention of R1's distilled models, which are Qwen2, Llama and Qwen3 decoders. There are
H query heads and U heads of keys and values. Query heads H/U h to H/U (h + 1) - 1 use head h of the
keys and values. A cache holds the U heads. The slot `attend` computes the attention itself: see
gqa_attend.py.

Shapes: B rows, S tokens of a row, D hidden_size, H heads, U num_key_value_heads, A head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from r1.model.cache import LayerCache
from r1.model.config import Config
from r1.model.gqa_attend import GroupedAttend
from r1.model.layers import Linear, RMSNorm, project
from r1.model.step import Step


class Projection(Linear):
    """A Linear that may have a bias, (out,). `project` multiplies; `with_bias` comes after it."""

    def __init__(self, inputs: int, outputs: int, has_bias: bool) -> None:
        super().__init__(inputs, outputs)
        self.bias = nn.Parameter(torch.zeros(outputs)) if has_bias else None

    def with_bias(self, y: Tensor) -> Tensor:
        """(..., out) -> (..., out)."""
        return y if self.bias is None else y + self.bias.to(y.dtype)


class GQA(nn.Module):
    """One layer's attention: projections, rotation, the slot `attend`, the output projection."""

    attend: dict[str, GroupedAttend]  # the strategy of each phase, "prefill" and "decode"
    rotate: Callable[[Tensor, Tensor, Step], tuple[Tensor, Tensor]]
    """Rotates queries and keys: `rotate_each` or `rotate_jointly`, from build.py."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        a = self.shape = config.grouped
        dim, biased = config.hidden_size, a.attention_bias
        self.q_proj = Projection(dim, a.num_attention_heads * a.head_dim, biased)
        self.k_proj = Projection(dim, a.num_key_value_heads * a.head_dim, biased)
        self.v_proj = Projection(dim, a.num_key_value_heads * a.head_dim, biased)
        if a.qk_norm:
            self.q_norm = RMSNorm(a.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(a.head_dim, config.rms_norm_eps)
        self.o_proj = Linear(a.num_attention_heads * a.head_dim, dim)
        self.scale = a.head_dim**-0.5  # YaRN's factor is in cos and sin alone

    def forward(self, x: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
        """(B, S, D) -> (B, S, D). Writes the tokens' cache entries where there is a cache."""
        size, layers = self.shape.head_dim, (self.q_proj, self.k_proj, self.v_proj)
        outputs = zip(project(x, step.multiply, *layers), layers, strict=True)
        # (B, S, H, A), (B, S, U, A), (B, S, U, A)
        q, k, v = (layer.with_bias(y).unflatten(-1, (-1, size)) for y, layer in outputs)
        if self.shape.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)  # (B, S, H, A), (B, S, U, A)
        q, k = self.rotate(q, k, step)  # (B, S, H, A), (B, S, U, A)
        # Under autocast a norm is fp32.
        q, k = q.to(v.dtype), k.to(v.dtype)  # (B, S, H, A), (B, S, U, A)
        o = self.attend[step.phase](q, k, v, self.scale, step, cache)  # (B, S, H, A)
        return self.o_proj(o.flatten(2), step.multiply)  # (B, S, H A) -> (B, S, D)


def rotate(x: Tensor, step: Step) -> Tensor:
    """Rotate x (B, S, H, A): pair i is (x[i], x[i + A/2]).

    (a, b) -> (a cos - b sin, b cos + a sin), computed in fp32, returned in x's dtype. `step.sin`
    has the minus of -b sin already.
    """
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # (b, a)
    return torch.addcmul(x * step.cos, swapped, step.sin).to(x.dtype)


def rotate_each(q: Tensor, k: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Rotate the queries (B, S, H, A) and the keys (B, S, U, A)."""
    return rotate(q, step), rotate(k, step)


def rotate_jointly(q: Tensor, k: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """The same in one call, with the keys as more heads: half as many GPU kernels."""
    both = rotate(torch.cat((q, k), dim=2), step)  # (B, S, H + U, A)
    return both[:, :, : q.shape[2]], both[:, :, q.shape[2] :]
