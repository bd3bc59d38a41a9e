"""Multi-head latent attention (DeepSeek-V2 paper, arXiv 2405.04434, section 2.1; DeepSeek-V3 paper,
section 2.1.1).

Keys and values of all heads are compressed into one latent `c_kv` per token, plus one rotated key
`k_pe` that the heads share; a cache needs no more than those. How queries then meet keys is the
slot `attend`: see attend.py.

Shapes: B batch, S sequence, D hidden_size, H heads, N qk_nope_head_dim, R qk_rope_head_dim, V
v_head_dim, C kv_lora_rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from r1.model.config import Config
from r1.model.layers import RMSNorm
from r1.model.rope import rotate, softmax_scale

if TYPE_CHECKING:
    from r1.model.attend import Attend
    from r1.model.cache import LayerCache
    from r1.model.transformer import Step

# The norms of the latents were trained with this epsilon, whatever config.json's rms_norm_eps says
# (Moonlight's is 1e-5).
LATENT_NORM_EPS = 1e-6


class MLA(nn.Module):
    """One layer's attention: projections, rotation, then the slot `attend`, then the output
    projection."""

    attend: dict[str, Attend]
    """The strategy for each phase, "prefill" and "decode"; filled by build.py."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config
        self.heads, self.nope, self.v_dim = (
            c.attention.num_attention_heads,
            c.attention.qk_nope_head_dim,
            c.attention.v_head_dim,
        )
        self.q_split = [c.attention.qk_nope_head_dim, c.attention.qk_rope_head_dim]
        self.kv_split = [c.attention.kv_lora_rank, c.attention.qk_rope_head_dim]
        self.scale = softmax_scale(c)
        q_dim = self.heads * c.attention.qk_head_dim
        if c.attention.q_lora_rank is None:
            self.a_split = [q_dim, c.attention.kv_lora_rank, c.attention.qk_rope_head_dim]
        else:
            self.a_split = [
                c.attention.q_lora_rank,
                c.attention.kv_lora_rank,
                c.attention.qk_rope_head_dim,
            ]
            self.q_a_layernorm = RMSNorm(c.attention.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(c.attention.q_lora_rank, q_dim, bias=False)
        self.low_rank_q = c.attention.q_lora_rank is not None
        # The checkpoint's q_a_proj (q_proj where queries have no low rank) above its
        # kv_a_proj_with_mqa, as one matrix.
        self.qkv_a_proj = nn.Linear(c.hidden_size, sum(self.a_split), bias=False)
        self.kv_a_layernorm = RMSNorm(c.attention.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(
            c.attention.kv_lora_rank,
            self.heads * (c.attention.qk_nope_head_dim + c.attention.v_head_dim),
            bias=False,
        )
        self.o_proj = nn.Linear(self.heads * c.attention.v_head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
        """(B, S, D) -> (B, S, D); the tokens' latents (or keys and values) are written to `cache`
        where there is one."""
        q, c_kv, k_pe = self.qkv_a_proj(x).split(
            self.a_split, dim=-1
        )  # (B, S, .), (B, S, C), (B, S, R)
        if self.low_rank_q:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q_nope, q_pe = q.unflatten(-1, (self.heads, -1)).split(
            self.q_split, dim=-1
        )  # (B, S, H, N), (B, S, H, R)
        c_kv = self.kv_a_layernorm(c_kv)
        pe = rotate(
            torch.cat((q_pe, k_pe[:, :, None]), dim=2), step.cos, step.sin
        )  # (B, S, H + 1, R): all at once
        q_pe, k_pe = pe[:, :, :-1], pe[:, :, -1]
        o = self.attend[step.phase](self, q_nope, q_pe, c_kv, k_pe, step, cache)  # (B, S, H, V)
        return self.o_proj(o.flatten(2))  # (B, S, D)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """kv_b_proj's weight seen by head: W_UK (H, N, C) and W_UV (H, V, C). Views: no second copy
        is kept."""
        return self.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split(
            [self.nope, self.v_dim], dim=1
        )
