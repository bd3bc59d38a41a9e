"""Experts whose inputs are rounded to FP8 (r1/storage/activations.py), around any strategy.

Shapes: N tokens, K experts per token, D hidden_size, I moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from r1.model.dispatch import Dispatch
from r1.model.moe import Experts
from r1.storage.activations import given
from r1.storage.matrix import Matrix


class RoundedExperts:
    """The same experts, with rounded inner values."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)

    def inner(self, product: Callable[[Matrix], Tensor]) -> Tensor:
        """(..., I), as down_proj takes it."""
        return given(self.experts.down_proj, self.experts.inner(product))


class Rounded(Dispatch):
    """Another strategy, which gets rounded inputs in calls of at least `least` tokens."""

    def __init__(self, strategy: Dispatch, least: int) -> None:
        self.strategy, self.least = strategy, least
        self.name, self.phases = strategy.name, strategy.phases

    def prepare(self) -> None:
        self.strategy.prepare()
        self.route = self.strategy.route

    def __call__(self, experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        if len(x) < self.least:
            return self.strategy(experts, x, indices, weights)
        # Kernels round x themselves, on its way to them.
        x = x if self.strategy.rounds else given(experts.gate_proj, x)
        return self.strategy(cast(Experts, RoundedExperts(experts)), x, indices, weights)
