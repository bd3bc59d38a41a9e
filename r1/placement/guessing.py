"""Experts that are fetched before their layer has chosen: the next layer's router is asked early.

Hidden states change slowly from layer to layer, so the next router says something about this
layer's input, too. A wrong guess costs the link's time.

Shapes: N tokens, K experts per token, D hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.model.moe import Experts
from r1.model.router import Router
from r1.placement.holding import Holding
from r1.placement.link import Link
from r1.placement.slots import Slots
from r1.placement.sources import InMemory
from r1.placement.traffic import Traffic

FEW = 64
"""Tokens of a call up to which the next layer's experts are guessed: a prompt uses nearly all."""


class Guessing(Holding):
    """The slots of one layer, which may get experts before it chooses."""

    def __init__(
        self, bare: Experts, slots: Slots, source: InMemory, device: torch.device, link: Link
    ) -> None:
        super().__init__(bare, slots, source, device, link)
        self.next: tuple[Router, Guessing] | None = None
        """The next sparse layer, where its experts are to be guessed."""
        self.guess: Tensor | None = None
        self.expected: list[int] = []
        """The guess, on the host."""
        self.fetched: set[int] = set()
        """Experts that were guessed and fetched since this layer's last call."""

    def ask_next(self, x: Tensor) -> None:
        """Ask the next layer's router for this layer's input (N, D)."""
        if self.next is not None and len(x) <= FEW:
            self.guess = self.next[0](x)[0]  # (N, K)

    def with_guess(self, indices: Tensor) -> Tensor:
        """The choices (N, K), and beside them the guess, if there is one: the host reads both in
        one wait.
        """
        guess, self.guess = self.guess, None
        return indices if guess is None else torch.cat((indices, guess), dim=1)

    def apart(self, both: Tensor, own: int) -> Tensor:
        """The first `own` columns of what `with_guess` gave, on the host. It keeps the guess."""
        self.expect(both[:, own:])
        return both[:, :own]

    def expect(self, guess: Tensor) -> None:
        """The guess, on the host (N, any)."""
        self.expected = guess.unique().tolist()

    def fetch_next(self, note: Traffic) -> None:
        """Fetch what the next layer is expected to choose, once."""
        if self.next is None or not self.expected:
            return
        other, expected, self.expected = self.next[1], self.expected, []
        expected = [e - other.ids.start for e in expected if e in other.ids]
        held = {e: other.slots.slot[e] for e in expected if e in other.slots.slot}
        early = [expert for expert in expected if expert not in held]
        early = early[: other.slots.room(held.values())]
        other.fetched.update(early)
        note.guessed += len(early)
        early = [e for e in other.source.begin(early) if other.source.ready(e)]  # not from a drive
        note.copied += len(early) * other.places.shape[1]
        other.fetch(early, held.values())
