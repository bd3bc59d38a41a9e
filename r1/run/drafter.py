"""The MTP layer as a drafter, with its own layer of the cache.

R1 has one MTP layer; of a model with several, the first is used.

Shapes: B rows, S tokens of a row, D hidden_size.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from r1.model.cache import Cache, LayerCache
from r1.model.mtp import MTPLayer
from r1.model.step import Step
from r1.run.runner import Runner


class Drafter:
    """Drafts `count` tokens for each decode step of a runner."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.count = runner, runner.backend.draft_tokens
        layer = cast(MTPLayer, runner.model.mtp[0])
        self.layers = {phase: way.mtp(layer) for phase, way in runner.ways.items()}

    def cache(self, rows: int, tokens: int) -> Cache:
        """A cache for the model and the drafter, with room for what a last step drafts."""
        return self.runner.cache(rows, tokens + self.count, extra_layers=1)

    def cache_size(self, rows: int, tokens: int) -> tuple[int, int]:
        """The rows and the capacity of `cache`."""
        return self.runner.cache_size(rows, tokens + self.count)

    def run(
        self, following: Tensor, hidden: Tensor, step: Step, layers: list[LayerCache]
    ) -> Tensor:
        """One pass over int64 (B, S): each token follows one of the hidden states (B, S, D).

        Returns hidden states (B, S, D), of which `lm_head` makes logits for the token after it.
        `layers` are the cache's; the drafter's is the last.
        """
        embedding = self.runner.model.embed_tokens(following)
        return self.layers[step.phase](embedding, hidden, step, layers[-1])
