"""Routing for random weights: experts are drawn evenly instead of chosen by scores.

Random weights give all tokens much the same hidden state. So their router crowds on a few experts,
and a step reads fewer weights than a trained model's would.

Shapes: M rows of draws, E routed experts.
"""

from __future__ import annotations

import torch

from r1.model.moe import MoE
from r1.model.transformer import Transformer

ROWS = 4096
"""Draws kept for a layer. Token n of a step takes row n: the same in every arm."""


def make_uniform(model: Transformer, seed: int) -> None:
    """Let every MoE layer choose by fixed random scores, fp32 (M, E); weights stay the token's own.

    The draws come from the CPU's generator: the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    experts = model.config.experts.n_routed_experts
    for module in model.modules():
        if isinstance(module, MoE):
            draws = torch.rand(ROWS, experts, dtype=torch.float32, generator=generator)
            module.draws = draws.to(module.gate.weight.device)
