"""A layer's experts in a step that is recorded in pieces (r1/run/pieces.py): the host acts between
them.

Such a step takes as long as its copies, and from a layer's choice to its first copy the link has
nothing to do. So the host prepares what it can before it waits for the choice, starts the first
copy, and does all else while that one is under way.

A layer takes two pieces. The first computes the chosen experts that lie in slots, and those that
come before the last one, while the last one is copied. The second has only that one left to do.

Shapes: N tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from r1.errors import InputError, setting
from r1.model.moe import Experts
from r1.placement.guessing import Guessing
from r1.placement.link import Link
from r1.placement.slots import Slots
from r1.placement.sources import InMemory


class Stepping(Guessing):
    """The slots of one layer, in steps that are recorded."""

    def __init__(
        self, bare: Experts, slots: Slots, source: InMemory, device: torch.device, link: Link
    ) -> None:
        super().__init__(bare, slots, source, device, link)
        self.place = torch.zeros(2, len(bare.ids) + 1, dtype=torch.int64, device=device)
        """Where each expert lies for the next two pieces; `count`: the piece does not need it."""
        self.place_there = link.host(self.place)
        self.late: list[int] = []
        """Slots whose experts the second piece waits for."""

    def cut(self, indices: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Two passes, each in a piece of its own. All chosen experts must have slots at a time.

        Raises InputError where slots are too few.
        """
        assert self.link.cut is not None
        most = min(indices.numel(), len(self.ids) - self.slots.first)
        if self.slots.room() < most:
            graphs = setting("cuda_graphs")
            raise InputError(
                f"{graphs} computes all experts of a layer at once: up to {most} have to come, and "
                f"there are slots for {self.slots.room()}: give {setting('expert_slots')} or fewer "
                f"rows, or leave {graphs} out"
            )
        self.link.cut(partial(self._serve, self.with_guess(indices), indices.shape[1]))
        yield self.place[0][indices], weights
        self.link.cut(partial(self._finish, len(indices)))
        yield self.place[1][indices], weights

    def _serve(self, chosen: Tensor, own: int) -> None:
        """What the host does before the first piece.

        `chosen`, int64 (N, K) or more columns: after `own` of them comes the next layer's guess.
        """
        slots, source, link = self.slots, self.source, self.link
        read = link.ask(chosen)
        leaving = slots.leaving()
        with link.copying():
            numbers = read()
            counted, current = self._chosen(e for row in numbers.tolist() for e in row[:own])
            missing = source.begin(slots.order(e for e in counted if e not in current))
            coming = self.slots_for(missing, current.values(), leaving)
            copies = list(coming.items())
            self.bring(copies[:1])
        held = current | coming
        self.late = [coming[expert] for expert in missing[-1:]]
        self._send_places(held)  # before the other copies: a small one may wait for those
        with link.copying():
            self.bring(copies[1:])
        slots.use(held.values())
        self.arrive([slot for slot in held.values() if slot not in self.late])
        self.expect(numbers[:, own:])
        note = self.traffic[len(chosen)]
        width = self.places.shape[1]
        note.add(list(counted), current.keys(), missing, self.early, self.fetched, width)
        note.read += source.read_bytes(len(chosen))

    def _finish(self, tokens: int) -> None:
        """What it does before the second piece, while the device computes the first one."""
        self.fetch_next(self.traffic[tokens])
        self.arrive(self.late)

    def _chosen(self, choices: Iterable[int]) -> tuple[Counter[int], dict[int, int]]:
        """How many tokens chose each expert, in order, and the slots of those that have one."""
        chosen = Counter(sorted(choices))
        chosen.pop(len(self.ids), None)  # another device has it
        self.slots.count(chosen, chosen.values())
        return chosen, {e: self.slots.slot[e] for e in chosen if e in self.slots.slot}

    def _send_places(self, held: dict[int, int]) -> None:
        """Tell the pieces in which slots the chosen experts lie, or will lie."""
        places = self.place_there.fill_(self.count)
        for expert, slot in held.items():
            places[int(slot in self.late), expert] = slot
        self.place.copy_(places, non_blocking=True)
