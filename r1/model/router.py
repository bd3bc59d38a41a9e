"""Which experts a token visits: grouped top-k, in fp32 whatever the rest of the model runs in.

R1 and V3 (`noaux_tc`, V3 paper section 2.1.2): sigmoid scores; a learned bias is added to *choose*
experts, which balances their load without an auxiliary loss, and the weights come from the unbiased
scores. A group of experts is worth its two best biased scores. V2 (`greedy`,
`group_limited_greedy`, V2 paper section 2.2): softmax, no bias, a group is worth its best.

Shapes: N tokens, D hidden_size, E routed experts, G groups, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r1.model.config import Config


class Router(nn.Module):
    """The gate of one MoE layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = self.config = config
        # Both stay fp32 under every dtype switch. The weight is small, and the logits are computed
        # in fp32 anyway; bf16 steps of the bias are as large as the gaps that it decides.
        self.weight = nn.Parameter(
            torch.empty(c.experts.n_routed_experts, c.hidden_size, dtype=torch.float32)
        )
        if c.experts.topk_method == "noaux_tc":
            self.e_score_correction_bias = nn.Parameter(
                torch.zeros(c.experts.n_routed_experts, dtype=torch.float32), requires_grad=False
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) -> expert indices, int64 (N, K), and their weights, fp32 (N, K), in no particular
        order."""
        if torch.is_autocast_enabled(
            x.device.type
        ):  # entering a context costs the host as much as three kernels
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x)
        logits = F.linear(x.float(), self.weight)  # (N, E)
        scores = (
            logits.sigmoid()
            if self.config.experts.scoring_func == "sigmoid"
            else logits.softmax(dim=-1)
        )
        indices = self.choose(scores)
        weights = scores.gather(1, indices)  # (N, K)
        if self.config.experts.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return indices, weights * self.config.experts.routed_scaling_factor

    def choose(self, scores: Tensor) -> Tensor:
        """fp32 scores (N, E) -> indices (N, K) of the best experts within the best groups."""
        c = self.config
        if c.experts.topk_method == "noaux_tc":
            scores = scores + self.e_score_correction_bias
        if c.experts.topk_method != "greedy" and c.experts.n_group > 1:
            grouped = scores.unflatten(-1, (c.experts.n_group, -1))  # (N, G, E / G)
            best = 2 if c.experts.topk_method == "noaux_tc" else 1
            groups = (
                grouped.topk(best, dim=-1)
                .values.sum(dim=-1)
                .topk(c.experts.topk_group, dim=-1)
                .indices
            )  # (N, topk_group)
            shut = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(
                1, groups, False
            )  # (N, G)
            # -inf and not 0: biased scores may be negative, and then a shut group's 0 would win.
            scores = grouped.masked_fill(shut[..., None], float("-inf")).flatten(1)
        return scores.topk(c.experts.num_experts_per_tok, dim=-1, sorted=False).indices
