"""What drafts tokens for a turn of speculation, and the MTP layer as one that does.

The other drafter is a small model: draft_model.py.

Shapes: B rows, S tokens of a row, k drafts, D hidden_size, W vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from r1.model.cache import Cache, LayerCache
from r1.model.mtp import MTPLayer
from r1.model.step import Step
from r1.run.runner import Runner
from r1.run.ways import Block


@dataclass(frozen=True)
class Judged:
    """What a verification leaves for the drafter."""

    tokens: Tensor
    """int64 (B, k + 1): what the model has read, each row's last token and its drafts."""
    hidden: Tensor
    """(B, k + 1, D): the model's hidden states there."""
    following: Tensor
    """int64 (B, k + 1): the token after each of them, true up to the place `last`."""
    last: Tensor
    """int64 (B,): the place of the last token that was kept. The one after it is new."""
    step: Step
    """The step that read them: it has their positions."""


class Drafter(Protocol):
    """Drafts `count` tokens for each decode step of `runner`.

    Its entries of the cache are further layers, after the model's.
    """

    runner: Runner
    count: int

    def cache(self, rows: int, tokens: int) -> Cache:
        """A cache for the model and the drafter, with room for what a last step drafts."""
        ...

    def cache_size(self, rows: int, tokens: int) -> tuple[int, int]:
        """The rows and the capacity of `cache`."""
        ...

    def along(
        self, tokens: Tensor, following: Tensor, hidden: Tensor, step: Step,
        layers: list[LayerCache],
    ) -> None:  # fmt: skip
        """Read the chunk of a prompt that the model reads: see runner.Along."""
        ...

    def first(self, judged: Judged, cache: Cache) -> Tensor:
        """Read what was kept. Returns the state (B, 1, ...) that `logits` makes a draft of.

        `cache` has its new lengths, which count the tokens that were kept.
        """
        ...

    def again(self, draft: Tensor, state: Tensor, number: int, cache: Cache) -> Tensor:
        """Read draft number `number`, 1 or more, int64 (B, 1), which `state` made.

        Returns the next state (B, 1, ...).
        """
        ...

    def logits(self, state: Tensor) -> Tensor:
        """fp32 (B, 1, W): logits of the next draft, in the model's vocabulary."""
        ...


class MTPDrafter:
    """The MTP layer as a drafter, with its own layer of the cache.

    R1 has one MTP layer; of a model with several, the first is used.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner, self.count = runner, runner.backend.draft_tokens
        self.layers: dict[str, Block] = {}
        """By phase. Empty where another stage has the layer: of it, only logits come from there."""
        if len(runner.model.mtp):
            layer = cast(MTPLayer, runner.model.mtp[0])
            self.layers = {phase: way.mtp(layer) for phase, way in runner.ways.items()}

    def cache(self, rows: int, tokens: int) -> Cache:
        """See Drafter, as for the other methods."""
        extra_layers = 1 if self.layers else 0
        return self.runner.cache(rows, tokens + self.count, extra_layers)

    def cache_size(self, rows: int, tokens: int) -> tuple[int, int]:
        return self.runner.cache_size(rows, tokens + self.count)

    def along(
        self, tokens: Tensor, following: Tensor, hidden: Tensor, step: Step,
        layers: list[LayerCache],
    ) -> None:  # fmt: skip
        self.run(following, hidden, step, layers)

    def first(self, judged: Judged, cache: Cache) -> Tensor:
        x = self.run(judged.following, judged.hidden, judged.step, cache.layers)  # (B, k + 1, D)
        return x.gather(1, judged.last[:, None, None].expand(-1, 1, x.shape[2]))  # (B, 1, D)

    def again(self, draft: Tensor, state: Tensor, number: int, cache: Cache) -> Tensor:
        positions = cache.lengths[:, None] + number - 1  # (B, 1)
        step = self.runner.model.step("decode", positions, cache.capacity)
        return self.run(draft, state, step, cache.layers)

    def logits(self, state: Tensor) -> Tensor:
        return self.runner.lm_head(state).float()

    def run(
        self, following: Tensor, hidden: Tensor, step: Step, layers: list[LayerCache]
    ) -> Tensor:
        """One pass over int64 (B, S): each token follows one of the hidden states (B, S, D).

        Returns hidden states (B, S, D), of which `logits` makes logits for the token after it.
        `layers` are the cache's; the drafter's is the last.
        """
        if not self.layers:
            return hidden
        embedding = self.runner.model.embed_tokens(following)
        return self.layers[step.phase](embedding, hidden, step, layers[-1])
