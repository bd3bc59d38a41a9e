"""Routing for random weights: experts are drawn evenly instead of chosen by scores.

Random weights give all tokens much the same hidden state. So their router crowds on a few experts,
and a step reads fewer weights than a trained model's would.

"uniform" draws for a token's place in the call, so a step of one row chooses the same experts as
the one before. "fresh" draws anew for each token of a text: the worst case for experts that are
kept where they were used last.

Shapes: B rows, S tokens of a row, N = B S, M rows of draws, E routed experts.
"""

from __future__ import annotations

from typing import Any

import torch

from r1.model.moe import MoE
from r1.model.step import Step
from r1.model.transformer import Transformer

ROWS = 4096
"""Draws kept for a layer. Token n of a step takes row n: the same in every arm."""


APART = 997
"""Draws between the same position of two rows."""


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


def make_fresh(model: Transformer, seed: int) -> None:
    """Let every MoE layer draw its experts anew for each position of each row.

    A token has the same draws in every arm, however many tokens a call has. MTP layers choose by
    their own scores.
    """
    generator = torch.Generator().manual_seed(seed)
    experts, device = model.config.experts.n_routed_experts, model.norm.weight.device
    layers = [module for module in model.layers.modules() if isinstance(module, MoE)]
    tables = [
        torch.rand(ROWS, experts, dtype=torch.float32, generator=generator).to(device)
        for _ in layers
    ]

    def draw(_model: Any, inputs: tuple[Any, ...]) -> None:
        step: Step = inputs[1]
        place = (step.positions + APART * step.rows).flatten() % ROWS  # (N,)
        for layer, table in zip(layers, tables, strict=True):
            layer.draws = table[place]  # (N, E)

    model.register_forward_pre_hook(draw)


ROUTINGS = {"uniform": make_uniform, "fresh": make_fresh}
"""By the value of --routing; "model" changes nothing."""
