"""Routing for random weights: experts are drawn instead of chosen by scores.

Random weights give all tokens much the same hidden state. So their router crowds on a few experts,
and a step reads fewer weights than a trained model's would.

"uniform" draws for a token's place in the call, so a step of one row chooses the same experts as
the one before. "fresh" draws anew for each token of a text, all experts alike: the worst case for
experts that are kept where they were used. A recording (r1/placement/profile.py) is drawn likewise,
each expert as often as it was chosen there; that neighbouring tokens share experts is not recorded.

Shapes: B rows, S tokens of a row, N = B S, M rows of draws, E routed experts.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from r1.model.moe import MoE
from r1.model.router import Router
from r1.model.step import Step
from r1.model.transformer import Transformer
from r1.placement.profile import Profile, load

ROWS = 4096
"""Draws kept for a layer. Token n of a step takes row n: the same in every arm."""


APART = 997
"""Draws between the same position of two rows."""
FITTED, FITS = 1024, 12
"""Draws, and repetitions, by which a recording's frequencies are met."""


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
    experts = model.config.experts.n_routed_experts
    draw_from(
        model,
        [
            torch.rand(ROWS, experts, dtype=torch.float32, generator=generator)
            for _ in sparse_layers(model)
        ],
    )


def make_recorded(model: Transformer, seed: int, profile: Profile) -> None:
    """The same, with each expert as often as it was chosen in a recording."""
    generator = torch.Generator().manual_seed(seed)
    experts, tables = model.config.experts.n_routed_experts, []
    for layer, module in sparse_layers(model).items():
        noise = torch.rand(ROWS, experts, dtype=torch.float32, generator=generator)
        races = -(-noise.clamp(min=1e-7).log()).log()  # Gumbel's distribution
        tables.append(races + _leads(races, module.gate, profile.shares(layer)))
    draw_from(model, tables)


def _leads(races: Tensor, gate: Router, shares: list[float]) -> Tensor:
    """What to add to each expert's draws (M, E), fp32 (E,), so that the router chooses it as often
    as `shares` says. Found by repetition: choices are few, and may be bound to groups.
    """
    races, wanted = races[:FITTED].to(gate.weight.device), torch.tensor(shares, dtype=torch.float32)
    wanted = wanted.to(races.device).clamp(min=0.1 / FITTED)
    leads = wanted.log()
    for _ in range(FITS):
        counts = gate.choose(races + leads).flatten().bincount(minlength=len(wanted))
        leads = leads + (wanted / (counts / len(races)).clamp(min=0.1 / FITTED)).log()
    return leads.to("cpu")


def sparse_layers(model: Transformer) -> dict[int, MoE]:
    """The layers that have experts, by number; without MTP layers."""
    layers = {number: getattr(block, "mlp", None) for number, block in enumerate(model.layers)}
    return {number: mlp for number, mlp in layers.items() if isinstance(mlp, MoE)}


def draw_from(model: Transformer, tables: list[Tensor]) -> None:
    """Choose by these scores, fp32 (M, E) of each layer: a token by its position and its row."""
    every = torch.stack(tables).to(model.norm.weight.device)  # (layers, M, E)
    layers = sparse_layers(model)

    def draw(_model: Any, inputs: tuple[Any, ...]) -> None:
        step: Step = inputs[1]
        place = (step.positions + APART * step.rows).flatten() % ROWS  # (N,)
        draws = every[:, place].unbind()  # once for all layers: it counts as time of the step
        for layer, own in zip(layers.values(), draws, strict=True):
            layer.draws = own  # (N, E)

    model.register_forward_pre_hook(draw)


ROUTINGS = {"uniform": make_uniform, "fresh": make_fresh}
"""By the value of --routing; "model" changes nothing, and any other value is a recording's file."""


def is_file(routing: str) -> bool:
    """Whether a value of --routing is a recording's path."""
    return routing not in ("model", *ROUTINGS)


def named(routing: str) -> str:
    """A value of --routing as a row names it: a file by its own name alone."""
    return os.path.basename(routing) if is_file(routing) else routing


def make(routing: str, model: Transformer, seed: int) -> None:
    """Let a model choose as a value of --routing says. Raises InputError for a wrong recording."""
    if routing in ROUTINGS:
        ROUTINGS[routing](model, seed)
    elif is_file(routing):
        make_recorded(model, seed, load(routing, model.config))
