"""A decoder layer's decode step, fused: the same function as model.py's Block, in 8 kernels for one
token (R1: 9).

Read it beside `Block.forward`, `MLA.forward` and `MoE.forward`: the weights are theirs, and a line
here is what the kernels' borders make of theirs. Norms stand in front of the product that follows,
residuals behind the one before.

The cache of a layer is a tuple of one tensor here, the latents (B, T, C + R): kernels have no use
for full keys and values.

Shapes: B batch, S sequence (new tokens of a row), N = B S, D hidden_size, H heads, C latent, R
rope, V value dim."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from r1.kernels.attention import ATTENTION
from r1.kernels.chip import Chip
from r1.kernels.experts import EXPERTS, Matrices
from r1.kernels.latent import LATENT
from r1.kernels.linear import LINEAR, linear
from r1.kernels.router import ROUTE
from r1.model.cache import LayerCache
from r1.model.layers import MLP
from r1.model.moe import MoE
from r1.model.transformer import Block, Step


class DecodeBlock:
    """Stands in for a Block in decode steps. `chip` None takes the kernels' torch twins."""

    def __init__(self, block: nn.Module, chip: Chip | None) -> None:
        assert isinstance(block, Block)
        self.block = block

        def pick(table: Mapping[str, Any]) -> Callable[..., Any]:
            return partial(table["triton"], chip) if chip else table["torch"]

        self.linear, self.latent, self.attention = pick(LINEAR), pick(LATENT), pick(ATTENTION)
        self.route, self.experts = pick(ROUTE), pick(EXPERTS)

    def __call__(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """(B, S, D) -> (B, S, D); the tokens' latents are written to `cache`."""
        flat = self.attend(x.flatten(0, 1).contiguous(), step, cache)  # (N, D)
        mlp = self.block.mlp
        return (self.mixture(flat, mlp) if isinstance(mlp, MoE) else self.dense(flat, mlp)).view_as(
            x
        )

    def attend(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """x + attention(norm(x)), (N, D)."""
        mla, norm = self.block.self_attn, self.block.input_layernorm
        a = self.linear(x, mla.qkv_a_proj.weight, norm=norm.weight, eps=norm.eps)
        q, kv = a.split([mla.a_split[0], sum(mla.a_split[1:])], dim=-1)  # (N, .), (N, C + R)
        if mla.low_rank_q:
            q = self.linear(
                q, mla.q_b_proj.weight, norm=mla.q_a_layernorm.weight, eps=mla.q_a_layernorm.eps
            )
        w_uk, w_uv = mla.up_projections()
        gain, eps = mla.kv_a_layernorm.weight, mla.kv_a_layernorm.eps
        q_c, q_pe = self.latent(
            q, kv, w_uk, gain, eps, step.cos, step.sin, step.positions, cache[0]
        )  # (N, H, C), (N, H, R)
        o = self.attention(q_c, q_pe, cache[0], step.positions, w_uv, mla.scale)  # (N, H, V)
        return self.linear(o.flatten(1), mla.o_proj.weight, residual=x)

    def dense(self, x: Tensor, mlp: MLP) -> Tensor:
        """x + mlp(norm(x)), (N, D)."""
        norm = self.block.post_attention_layernorm
        gate_up = self.linear(x, mlp.gate_up_proj.weight, norm=norm.weight, eps=norm.eps)  # (N, 2I)
        return self.linear(gate_up, mlp.down_proj.weight, swiglu=True, residual=x)

    def mixture(self, x: Tensor, moe: MoE) -> Tensor:
        """x + moe(norm(x)), (N, D)."""
        norm, shared = self.block.post_attention_layernorm, moe.shared_experts
        h, indices, weights = self.route(moe.gate, x, norm.weight, norm.eps)
        routed = Matrices(moe.experts.gate_up_proj, moe.experts.down_proj)
        always = Matrices(shared.gate_up_proj.weight, shared.down_proj.weight) if shared else None
        return self.experts(
            h, indices, weights, routed, always, residual=x, norm=norm.weight, eps=norm.eps
        )


def head(lm_head: nn.Linear, chip: Chip, x: Tensor) -> Tensor:
    """The output head of a decode step: normed hidden states (B, S, D) -> fp32 logits (B, S, W)."""
    return linear(chip, x.flatten(0, 1), lm_head.weight, dtype=torch.float32).view(
        *x.shape[:-1], -1
    )
