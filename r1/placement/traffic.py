"""What experts off the device did: how often they were wanted, found and copied."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass
class Traffic:
    """What one layer's experts did, in calls of one number of tokens."""

    calls: int = 0
    visits: int = 0
    """Different experts that were chosen, added up over calls."""
    hits: int = 0
    """Of these, the ones that lay in a slot, or were guessed and on their way."""
    copied: int = 0
    """Bytes that were copied to the device."""
    read: int = 0
    """Bytes that were read from files."""
    computed: int = 0
    """Of the visits, those that the host multiplied where the experts lie."""
    multiplied: int = 0
    """Bytes of host memory that it read for them."""
    guessed: int = 0
    """Experts of the next layer that were fetched early."""
    right: int = 0
    """Of the experts fetched early for this layer, those that were chosen."""

    def add(
        self, chosen: Collection[int], held: Collection[int], missing: Collection[int],
        early: set[int], fetched: set[int], width: int,
    ) -> None:  # fmt: skip
        """One call. `held`: the chosen experts that need no copy any more; `missing`: those that
        do.

        `early`: those that came before a prompt's choices; `fetched`: those that were guessed. Both
        are emptied. `width`: bytes of an expert.
        """
        self.calls, self.visits = self.calls + 1, self.visits + len(chosen)
        self.hits += len(set(held) - early)
        self.copied += len(missing) * width
        self.right += len(fetched.intersection(chosen))
        fetched.clear()
        early.clear()
