"""Places on the device for a prompt's experts that are not to stay, shared by all layers.

A prompt uses nearly all experts of every layer, more than the slots hold. They pass through here:
some are copied while others are computed. While a layer's last ones are computed, the next layer's
first ones are copied, so the link has work during that layer's attention and router too. They can't
take its own slots: what lies there is needed as well.

Shapes: E experts, W bytes of an expert (storage/rows.py).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from r1.model.moe import EXPERT_MATRICES, Experts
from r1.placement.link import Event
from r1.storage.rows import Rows

AHEAD = 2**27
"""Bytes that are copied at a time: a link's work of two milliseconds, which is more than a layer's
attention takes."""


def places_for(slots: int, experts: int, width: int) -> int:
    """Places that a layer gets at most, where it has so many slots and each expert so many bytes.

    None where all experts have slots.
    """
    return min(slots, max(1, AHEAD // width)) if slots < experts else 0


class Stack(Experts):
    """Experts whose bytes are rows of a buffer. What the strategies of dispatch.py ask for."""

    def __init__(self, like: Experts, rows: Tensor) -> None:
        """`like` has no memory. `rows`: uint8 (E, W)."""
        nn.Module.__init__(self)
        bare = copy.deepcopy(like)
        for name in EXPERT_MATRICES:
            setattr(self, name, getattr(bare, name))
        self.count, self.inner_numbers = len(rows), like.inner_numbers
        self.ids, self.partial = range(self.count), False
        Rows(self).place(rows)


class Ring:
    """Rows of the device that are taken in turn. A layer takes at most half of them at a time.

    So those of the layer that is being computed stay as they are.
    """

    def __init__(self, half: int, width: int, device: torch.device) -> None:
        self.half = half
        self.rows = torch.zeros(2 * half, width, dtype=torch.uint8, device=device)
        self.used: list[Event | None] = [None] * len(self.rows)
        """By place: when the device has computed, or moved, what lay there."""
        self.first = 0

    def take(self) -> int:
        """The next place."""
        place, self.first = self.first, (self.first + 1) % len(self.rows)
        return place


class Staging(Ring):
    """The places that layers share, as a stack of experts."""

    def __init__(self, like: Experts, half: int, device: torch.device) -> None:
        layout = Rows(like)
        super().__init__(half, layout.width, device)
        self.layout, self.stack = layout.layout, Stack(like, self.rows)
