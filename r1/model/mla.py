"""Multi-head latent attention (V2 paper, arXiv 2405.04434, section 2.1; V3 paper, section 2.1.1).

The keys and values of all heads are compressed into one latent `c_kv` for each token. One rotated
key `k_pe`, which all heads share, carries its position. A cache needs only those two. The slot
`attend` computes the attention itself: see attend.py.

Shapes: B rows, S tokens of a row, D hidden_size, H heads, P qk_nope_head_dim, R qk_rope_head_dim,
V v_head_dim, C kv_lora_rank, Q q_lora_rank.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from r1.model.attend import Attend, UpProjection
from r1.model.cache import LayerCache
from r1.model.config import Config
from r1.model.layers import Linear, RMSNorm, project
from r1.model.rope import rotate_each, softmax_scale
from r1.model.step import Step

# The latents' norms were trained with this epsilon, whatever rms_norm_eps says (Moonlight's: 1e-5).
LATENT_NORM_EPS = 1e-6


class MLA(nn.Module):
    """One layer's attention: projections, rotation, the slot `attend`, the output projection."""

    attend: dict[str, Attend]  # the strategy of each phase, "prefill" and "decode"; from build.py
    rotate: Callable[[Tensor, Tensor, Step], tuple[Tensor, Tensor]] = staticmethod(rotate_each)
    """Rotates queries and key. build.py may put in `rotate_jointly` (rope.py), which is faster."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        a = self.shape = config.latent
        q_dim = a.num_attention_heads * a.qk_head_dim
        if a.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, q_dim)
        else:
            self.q_a_proj = Linear(config.hidden_size, a.q_lora_rank)
            self.q_a_layernorm = RMSNorm(a.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(a.q_lora_rank, q_dim)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, a.latent_dim)
        self.kv_a_layernorm = RMSNorm(a.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = UpProjection(a)
        self.o_proj = Linear(a.num_attention_heads * a.v_head_dim, config.hidden_size)
        self.scale = softmax_scale(a)

    def forward(self, x: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
        """(B, S, D) -> (B, S, D). Writes the tokens' cache entries where there is a cache."""
        a, multiply = self.shape, step.multiply
        if a.q_lora_rank is None:
            # (B, S, H (P + R)), (B, S, C + R)
            q, kv = project(x, multiply, self.q_proj, self.kv_a_proj_with_mqa)
        else:
            # (B, S, Q), (B, S, C + R)
            c_q, kv = project(x, multiply, self.q_a_proj, self.kv_a_proj_with_mqa)
            q = self.q_b_proj(self.q_a_layernorm(c_q), multiply)  # (B, S, H (P + R))
        q = q.unflatten(-1, (a.num_attention_heads, -1))  # (B, S, H, P + R)
        # (B, S, H, P), (B, S, H, R)
        q_nope, q_pe = q.split([a.qk_nope_head_dim, a.qk_rope_head_dim], dim=-1)
        c_kv, k_pe = kv.split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)  # (B, S, C), (B, S, R)
        c_kv = self.kv_a_layernorm(c_kv)  # (B, S, C)
        q_pe, k_pe = self.rotate(q_pe, k_pe, step)  # (B, S, H, R), (B, S, R)
        attend, up = self.attend[step.phase], self.kv_b_proj
        o = attend(q_nope, q_pe, c_kv, k_pe, up, self.scale, step, cache)  # (B, S, H, V)
        return self.o_proj(o.flatten(2), multiply)  # (B, S, H V) -> (B, S, D)
