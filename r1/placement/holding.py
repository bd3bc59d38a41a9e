"""A layer's experts that lie on the device or are on their way there: slots, copies, events.

Shapes: E experts of a layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from r1.model.moe import Experts
from r1.placement.link import Event, Link
from r1.placement.slots import Slots
from r1.placement.sources import InMemory
from r1.placement.staging import Stack, Staging
from r1.placement.traffic import Traffic
from r1.storage.rows import Rows

Pass = tuple[Experts, Tensor, Callable[[], None]]
"""A stack, the place in it of each expert, int64 (E + 1,), -1 for those of other passes, and what
waits until they have come. Call it last: what is sent to the device before is there by then."""
Arrivals = dict[int, tuple[int, Event | None]]
"""By expert: its place in the staging, and when it has arrived there."""


class Landing(Protocol):
    """Rows of the device where experts arrive, to be moved to slots (host.py)."""

    rows: Tensor
    used: list[Event | None]
    half: int

    def take_for(self, lose: Callable[[], None]) -> int: ...

    def move(self, place: int, slot: Tensor, to: Rows) -> None: ...


class Holding(Stack):
    """The slots of one layer, as a stack, and its part of the staging."""

    def __init__(
        self, bare: Experts, slots: Slots, source: InMemory, device: torch.device, link: Link
    ) -> None:
        """`bare` has the layer's stacks without memory."""
        count = len(slots.expert)
        # Zeros: a slot that holds no expert yet must not make NaN of 0 times its numbers.
        places = torch.zeros(count, source.rows.shape[1], dtype=torch.uint8, device=device)
        super().__init__(bare, places)
        self.ids, self.places, self.source = bare.ids, places, source
        self.views = places.unbind()
        self.partial = True
        self.slots, self.link, self.layout = slots, link, Rows(self)
        self.arrived: list[Event | None] = [None] * count
        self.used: list[Event | None] = [None] * count
        self.traffic: defaultdict[int, Traffic] = defaultdict(Traffic)
        """By the number of a call's tokens."""
        self.staging: tuple[Staging] | None = None
        """What all layers share; in a tuple: no part of this module."""
        self.landing: tuple[Landing] | None = None
        """Where experts arrive that are not in the device's order; likewise."""
        self.landed: dict[int, int] = {}
        """By expert: its place there, until it is moved."""
        self.staged: Arrivals = {}
        """Experts there that came before a prompt's choices."""
        self.early: set[int] = set()
        """These, and those that came so into slots."""

    @property
    def free(self) -> int:
        """How many slots are empty."""
        return self.count - len(self.slots.slot)

    def table(self, places: dict[int, int]) -> Tensor:
        """These experts' places, and -1 for all others, int64 (E + 1,)."""
        table = torch.full((len(self.ids) + 1,), -1)
        for expert, place in places.items():
            table[expert] = place
        return table

    # ------------------------- copies
    def fetch(self, experts: Collection[int], keep: Collection[int]) -> dict[int, int]:
        """Begin to copy experts to slots other than `keep`; their slots."""
        coming = self.slots_for(experts, keep, self.slots.leaving())
        with self.link.copying():
            self.bring(coming.items())
        return coming

    def slots_for(
        self, experts: Collection[int], keep: Collection[int], leaving: list[int]
    ) -> dict[int, int]:
        """The slots that experts will get: the first that are `leaving`, but for `keep`."""
        kept = set(keep)
        free = (slot for slot in leaving if slot not in kept)
        return dict(zip(experts, islice(free, len(experts)), strict=True))

    def bring(self, coming: Iterable[tuple[int, int]]) -> None:
        """Begin to copy experts to these slots, within `link.copying`."""
        for expert, slot in coming:
            row = self.source.row(expert)  # may raise: then no slot has been taken for it
            self._send(row, expert, self.views[slot], self.used[slot])
            self.slots.put(expert, slot)
            self.used[slot] = None  # the next copy to this slot comes after this one
            self.arrived[slot] = self.link.arrival()
            self.source.sent(expert, self.arrived[slot])

    def stage(self, experts: Collection[int]) -> Arrivals:
        """Begin to copy experts to the staging."""
        assert self.staging is not None
        (staging,), coming = self.staging, {}
        with self.link.copying():
            for expert in experts:
                row, place = self.source.row(expert), staging.take()
                self._send(row, expert, staging.rows[place], staging.used[place])
                coming[expert] = place, self.link.arrival()
                self.source.sent(expert, coming[expert][1])
        return coming

    def _send(self, row: Tensor, expert: int, target: Tensor, after: Event | None) -> None:
        """Begin to copy an expert to `target`, or to where it lands before."""
        if not self.landing:
            self.link.copy(target, row, after)
            return
        (landing,) = self.landing
        place = self.landed[expert] = landing.take_for(lambda: self._forget(expert))
        self.link.copy(landing.rows[place], row, landing.used[place])

    def _land(self, expert: int, target: Tensor) -> None:
        """Move an expert that has arrived to `target`, if it has landed elsewhere."""
        if self.landing and expert in self.landed:
            (landing,), place = self.landing, self.landed.pop(expert)
            landing.move(place, target, self.layout)
            landing.used[place] = self.link.now()

    def _forget(self, expert: int) -> None:
        """An expert that nobody asked for is overwritten where it landed."""
        self.landed.pop(expert, None)
        self.staged.pop(expert, None)
        if expert in self.slots.slot:
            self.slots.forget(expert)

    def fetch_early(self, tokens: int) -> None:
        """Begin to copy experts before a prompt of so many tokens has chosen: those that the most
        tokens chose so far, to empty slots and to the staging.
        """
        held, counts = self.slots.slot, self.slots.counts
        room = self.free + (self.staging[0].half if self.staging else 0)
        missing = [expert for expert in range(len(counts)) if expert not in held]
        missing.sort(key=lambda expert: -counts[expert])
        if self.landing:
            room = min(room, self.landing[0].half)
        wanted = self.source.begin(self.source.ahead(missing)[:room])
        ready = [expert for expert in wanted if self.source.ready(expert)]
        free = self.free
        self.fetch(ready[:free], set(held.values()))
        if self.staging:
            self.staged = self.stage(ready[free:])
        self.early.update(ready)
        self.traffic[tokens].copied += len(ready) * self.places.shape[1]

    def arrive(self, slots: Collection[int]) -> None:
        """The device's arithmetic goes on when these slots have what was last copied to them."""
        for event in {self.arrived[slot] for slot in slots}:
            self.link.wait(event)
        for slot in slots:
            self.arrived[slot] = None

    # ------------------------- passes
    def compute(self, current: dict[int, int]) -> Iterator[Pass]:
        """A pass over experts in slots, once they have come; none if there are none."""
        if not current:
            return
        self.slots.use(current.values())

        def ready() -> None:
            self.arrive(current.values())
            for expert, slot in current.items():
                self._land(expert, self.places[slot])

        yield self, self.table(current), ready
        done = self.link.now()
        for slot in current.values():
            self.used[slot] = done

    def compute_staged(self, staged: Arrivals, stay: Collection[int] = ()) -> Iterator[Pass]:
        """The same over experts in the staging. Those that `stay` move to slots then."""
        if not staged or self.staging is None:
            return
        (staging,) = self.staging
        places = {expert: place for expert, (place, _) in staged.items()}

        def ready() -> None:
            for event in {event for _, event in staged.values()}:
                self.link.wait(event)
            for expert, place in places.items():
                self._land(expert, staging.rows[place])

        yield staging.stack, self.table(places), ready
        for expert in stay:
            slot = self.slots.take(expert, ())
            self.link.wait(self.arrived[slot])  # of what is given up, which nobody used
            self.arrived[slot] = None
            self.places[slot].copy_(staging.rows[places[expert]])
            self.used[slot] = self.link.now()
        done = self.link.now()
        for place in places.values():
            staging.used[place] = done
