"""Routing for random weights: experts drawn for each row of a step, evenly, instead of chosen by
its scores.

Random weights give all tokens much the same hidden state, so their router crowds on a few experts
and a step reads fewer weights than a trained model's would. Swapped in from outside, as storage is:
the model's files know nothing of it.

Shapes: N tokens, E routed experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.model.config import Config
from r1.model.moe import MoE
from r1.model.router import Router
from r1.model.transformer import Transformer

ROWS = 4096
"""Draws kept for a layer; token n of a step takes the n-th, and so it is the same in every arm,
whatever its numerics."""


class UniformRouter(Router):
    """A router that chooses by fixed random scores and weighs by the token's own: the same work,
    another choice."""

    draws: Tensor
    """fp32 (ROWS, E)."""

    def __init__(self, config: Config, router: Router, draws: Tensor) -> None:
        super().__init__(config)
        self.weight = router.weight
        if hasattr(router, "e_score_correction_bias"):
            self.e_score_correction_bias = router.e_score_correction_bias
        self.register_buffer("draws", draws, persistent=False)

    def choose(self, scores: Tensor) -> Tensor:
        """fp32 (N, E) -> (N, K), by the same rule as the model's own choice."""
        return super().choose(
            self.draws[torch.arange(scores.shape[0], device=scores.device) % ROWS]
        )


def make_uniform(model: Transformer, seed: int) -> None:
    """Swap every router. The draws come from the CPU's generator: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, MoE):
            draws = torch.rand(ROWS, model.config.experts.n_routed_experts, generator=generator)
            with torch.device("meta"):
                module.gate = UniformRouter(
                    model.config, module.gate, draws.to(module.gate.weight.device)
                )
