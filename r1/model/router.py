"""The router chooses each token's experts: grouped top-k, in fp32 whatever the model runs in.

R1 and V3 (`topk_method` "noaux_tc", V3 paper, section 2.1.2): scores are sigmoids. To *choose*
experts, a bias is added, which training adjusted to balance the experts' load. The weights come
from the scores without the bias. A group of experts has as its score the sum of its two best biased
scores, and only experts of the `topk_group` best groups can be chosen. V2 ("group_limited_greedy",
V2 paper, section 2.2): scores are a softmax, there is no bias, and a group's score is its best one.
V2-Lite ("greedy") has no groups.

Shapes: N tokens, D hidden_size, E routed experts, G groups, K experts per token, M rows of draws.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r1.model.config import Config

Route = Callable[["Router", Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""What Router.forward does with a router, x and draws."""


class Router(nn.Module):
    """The gate of one MoE layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        e = self.shape = config.experts
        # Weight and bias stay fp32 under every dtype switch. The weight is small, and its logits
        # are computed in fp32 anyway. Rounding the bias to bf16 would change choices.
        weight = torch.empty(e.n_routed_experts, config.hidden_size, dtype=torch.float32)
        self.weight = nn.Parameter(weight)
        if e.topk_method == "noaux_tc":
            bias = torch.zeros(e.n_routed_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def forward(
        self, x: Tensor, draws: Tensor | None = None, route: Route | None = None
    ) -> tuple[Tensor, Tensor]:
        """(N, D) -> expert indices, int64 (N, K), and weights, fp32 (N, K), in no particular order.

        With `draws`, fp32 (M, E), token n chooses by row n % M of them instead of by its scores.
        `route` does all of it in another way, by kernels.
        """
        if route is not None:
            return route(self, x, draws)
        device = x.device.type
        if torch.is_autocast_enabled(device):  # asked first: the context costs as much as 3 kernels
            with torch.autocast(device, enabled=False):
                return self.forward(x, draws)
        e = self.shape
        logits = F.linear(x.float(), self.weight)  # (N, E)
        sigmoid = e.scoring_func == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)  # (N, E)
        ranking = scores  # (N, E)
        if draws is not None:
            ranking = draws[torch.arange(len(x), device=x.device) % len(draws)]  # (N, E)
        indices = self.choose(ranking)  # (N, K)
        weights = scores.gather(1, indices)  # (N, K)
        if e.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # (N, K)
        return indices, weights * e.routed_scaling_factor

    def choose(self, scores: Tensor) -> Tensor:
        """fp32 scores (N, E) -> indices (N, K) of the best experts within the best groups."""
        e = self.shape
        if e.topk_method == "noaux_tc":
            scores = scores + self.e_score_correction_bias  # (N, E)
        if e.topk_method != "greedy" and e.n_group > 1:
            grouped = scores.unflatten(-1, (e.n_group, -1))  # (N, G, E / G)
            best = 2 if e.topk_method == "noaux_tc" else 1
            group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)  # (N, G)
            groups = group_scores.topk(e.topk_group, dim=-1).indices  # (N, topk_group)
            closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, groups, False)
            # -inf and not 0: biased scores may be negative, and a closed group's 0 would then win.
            scores = grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)  # (N, E)
        return scores.topk(e.num_experts_per_tok, dim=-1, sorted=False).indices
