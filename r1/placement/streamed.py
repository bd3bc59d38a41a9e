"""Experts that lie in host memory or in files, and are copied to a few slots when chosen.

The strategies of dispatch.py and the kernels see a stack of as many experts as there are slots.
A call makes passes. The first one computes the chosen experts that lie in a slot already; meanwhile
the missing ones are copied. Where they are more than the slots, they come in batches: one is
copied while the one before is computed. So a prompt copies each expert at most once, for all its
tokens. When its last batch of a layer is on its way, the next layer's first experts follow, before
that layer has chosen (staging.py). The host has to know the choices, so it waits for the router in
each layer.

Shapes: N tokens, K experts per token, E experts, D hidden_size, M choices of a pass.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import cast

import torch
from torch import Tensor

from r1.model.moe import Experts, Run
from r1.model.router import Router
from r1.placement.link import Event, Link
from r1.placement.slots import Slots
from r1.placement.sources import InMemory
from r1.placement.staging import Stack, Staging
from r1.placement.traffic import Traffic
from r1.storage.matrix import Matrix

FEW = 64
"""Tokens of a call up to which the next layer's experts are guessed: a prompt uses nearly all."""
MANY = 0.875
"""A call that chooses this share of a layer's experts will choose nearly all of the next one's."""


class StreamedExperts(Stack):
    """The experts of one layer: all in host memory or in files, some also on the device."""

    def __init__(
        self,
        bare: Experts,
        whole: Experts,
        slots: Slots,
        source: InMemory,
        device: torch.device,
        link: Link,
    ) -> None:
        """`whole` has the layer's stacks; without memory where they lie in files. `bare` is the
        same without memory.
        """
        count = len(slots.expert)
        # Zeros: a slot that holds no expert yet must not make NaN of 0 times its numbers.
        places = torch.zeros(count, source.rows.shape[1], dtype=torch.uint8, device=device)
        super().__init__(bare, places)
        self.ids, self.leads, self.places = whole.ids, whole.leads, places
        self.every = type(whole) is Experts  # no rank has only some of them
        self.outside = (whole, source)  # in a tuple: no part of this module
        self.slots, self.link = slots, link
        self.arrived: list[Event | None] = [None] * count
        self.used: list[Event | None] = [None] * count
        self.traffic: defaultdict[int, Traffic] = defaultdict(Traffic)
        self.next: tuple[Router, StreamedExperts] | None = None
        """The next sparse layer, where its experts are to be guessed."""
        self.guess: Tensor | None = None
        self.following: tuple[StreamedExperts] | None = None
        """The next sparse layer, for prompts; in a tuple: no part of this module."""
        self.staging: tuple[Staging] | None = None
        self.staged: dict[int, tuple[int, Event | None]] = {}
        """By expert: its place in the staging, and when it has arrived there."""
        self.early: set[int] = set()
        """Experts that came before a prompt's choices, into slots or the staging."""
        self.fetched: set[int] = set()
        """Experts that were fetched early since this layer's last call."""

    def whole(self, name: str) -> Matrix:
        return cast(Matrix, getattr(self.outside[0], name))

    def combine(self, y: Tensor) -> Tensor:
        return self.outside[0].combine(y)

    # ------------------------- one call
    def look_ahead(self, x: Tensor) -> None:
        """Ask the next layer's router for this layer's input: hidden states change slowly."""
        if self.next is not None and len(x) <= FEW:
            self.guess = self.next[0](x)[0]  # (N, K)

    def here(self, indices: Tensor, weights: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """A pass for each group of experts. A choice of another pass gets weight 0.

        There is always a pass, also where other devices have all that was chosen: a fused step adds
        the residual in it.
        """
        ((indices, weights),) = self.outside[0].here(indices, weights)
        choices, none = self._read(indices, weights), True
        self.staged.clear()  # a call that failed may have left some
        for _, table in self._passes(choices):
            none = False
            slots = table[choices]  # (N, K), -1: not in this pass
            held = (slots >= 0).to(indices.device, non_blocking=True)
            some = int(slots.max())
            slots = slots.where(slots >= 0, some).to(indices.device, non_blocking=True)
            yield slots, weights * held
        if none:
            yield torch.zeros_like(indices), torch.zeros_like(weights)

    def forward(self, run: Run, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """As the base's. Where there are several passes, each computes its own choices only."""
        self.look_ahead(x)
        ((indices, weights),) = self.outside[0].here(indices, weights)
        choices, device = self._read(indices, weights), x.device
        y = torch.zeros(x.shape, dtype=torch.float32, device=device)
        for stack, table in self._passes(choices, ahead=True):
            slots = table[choices]  # (N, K), -1: not in this pass
            if bool((slots >= 0).all()):
                y = run(stack, x, slots.to(device, non_blocking=True), weights)
                continue  # there is no other pass; but this one's end is still to be noted
            token, place = (slots >= 0).nonzero().unbind(dim=1)  # (M,) each
            chosen = slots[token, place].to(device, non_blocking=True)[:, None]  # (M, 1)
            token = token.to(device, non_blocking=True)
            place = place.to(device, non_blocking=True)
            part = run(stack, x[token], chosen, weights[token, place][:, None])  # (M, D)
            y.index_add_(0, token, part.float())
        return self.combine(y.to(x.dtype))

    def _read(self, indices: Tensor, weights: Tensor) -> Tensor:
        """The choices on the host, int64 (N, K); E where another device has the expert.

        The guess of the next layer's experts is read with them, in the same wait.
        """
        if not self.every:  # weight 0: RankExperts' mark of what another rank holds
            indices = indices.masked_fill(weights == 0, len(self.ids))
        guess, self.guess = self.guess, None
        if guess is None:
            self.expected: list[int] = []
            return indices.cpu()
        both = torch.cat((indices, guess), dim=1).cpu()
        self.expected = both[:, indices.shape[1] :].unique().tolist()
        return both[:, : indices.shape[1]]

    def _passes(self, choices: Tensor, ahead: bool = False) -> Iterator[tuple[Experts, Tensor]]:
        """Fetch the chosen experts. Each pass gives a stack and a table: a place in it for each
        expert, -1 for none.

        While a pass is computed, its places stay as they are. `ahead`: after a call that needs
        nearly all experts, those of the next layer may be fetched before it has chosen.
        """
        slots, counted = self.slots, Counter(choices.flatten().tolist())
        counted.pop(len(self.ids), None)
        chosen = sorted(counted)
        slots.count(chosen, (counted[expert] for expert in chosen))
        current = {expert: slots.slot[expert] for expert in chosen if expert in slots.slot}
        staged = {e: place for e, place in self.staged.items() if e in counted and e not in current}
        source, note = self.outside[1], self.traffic[len(choices)]
        missing = source.begin(slots.order(e for e in chosen if e not in current | staged))
        width = self.places.shape[1]
        note.add(chosen, current.keys() | staged, self.early, self.fetched, width)
        ahead = ahead and self.following is not None and len(chosen) >= MANY * len(self.ids)
        most = self.count - len(current)
        if len(missing) > most:
            most = max(1, self.count // 2)
        if missing and staged:  # slots must be free while the staged ones still arrive
            current, first = _split(current, self.count - most)
            yield from self._compute(first)
        yield from self._compute_staged(staged)
        while True:
            room = min(most, self.count - len(current))
            coming, missing = self._fetch(missing[:room], current.values()), missing[room:]
            if not missing and self.next is not None and self.expected:
                self._fetch_next(note)
            if not missing and ahead:
                ahead = cast(tuple[StreamedExperts], self.following)[0]._fetch_early(len(choices))
            yield from self._compute(current)
            if not coming and not missing:
                break
            current = coming
        note.read += source.read_bytes()

    def _compute(self, current: dict[int, int]) -> Iterator[tuple[Experts, Tensor]]:
        """A pass over experts in slots, unless there are none."""
        if current:
            yield self, self._ready(current)
            done = self.link.now()
            for slot in current.values():
                self.used[slot] = done

    def _compute_staged(
        self, staged: dict[int, tuple[int, Event | None]]
    ) -> Iterator[tuple[Experts, Tensor]]:
        """The same over experts in the staging."""
        self.staged = {}
        if staged:
            assert self.staging is not None
            for event in {event for _, event in staged.values()}:
                self.link.wait(event)
            places = {expert: place for expert, (place, _) in staged.items()}
            yield self.staging[0].stack, self._table(places)
            done = self.link.now()
            for place in places.values():
                self.staging[0].used[place] = done

    # ------------------------- slots
    def _ready(self, current: dict[int, int]) -> Tensor:
        """Let the device wait for these experts' copies, and give their table, int64 (E + 1,)."""
        self.slots.use(current.values())
        for event in {self.arrived[slot] for slot in current.values()}:
            self.link.wait(event)
        for slot in current.values():
            self.arrived[slot] = None
        return self._table(current)

    def _table(self, places: dict[int, int]) -> Tensor:
        """These experts' places, and -1 for all others, int64 (E + 1,)."""
        table = torch.full((len(self.ids) + 1,), -1)
        for expert, place in places.items():
            table[expert] = place
        return table

    def _fetch(self, experts: Collection[int], keep: Collection[int]) -> dict[int, int]:
        """Begin to copy experts to slots other than `keep`; their slots."""
        source, coming, kept = self.outside[1], {}, set(keep)
        for expert in experts:
            row = source.row(expert)  # may raise: then no slot has been taken for it
            slot = self.slots.take(expert, kept)
            kept.add(slot)
            self.link.copy(self.places[slot], row, self.used[slot])
            self.arrived[slot] = self.link.arrival()
            source.sent(expert, self.arrived[slot])
            coming[expert] = slot
        return coming

    def _fetch_next(self, note: Traffic) -> None:
        """Fetch what the next layer is expected to choose, once."""
        assert self.next is not None
        other, expected, self.expected = self.next[1], self.expected, []
        expected = [e - other.ids.start for e in expected if e in other.ids]
        held = {e: other.slots.slot[e] for e in expected if e in other.slots.slot}
        early = [expert for expert in expected if expert not in held][: other.count - len(held)]
        other.fetched.update(early)
        note.guessed += len(early)
        source = other.outside[1]
        early = [e for e in source.begin(early) if source.ready(e)]  # none that a drive has
        note.copied += len(early) * other.places.shape[1]
        other._fetch(early, held.values())

    def _fetch_early(self, tokens: int) -> bool:
        """Begin to copy experts before a prompt of so many tokens has chosen: those that the most
        tokens chose so far, to empty slots and to the staging. False: it has begun.
        """
        source, held, counts = self.outside[1], self.slots.slot, self.slots.counts
        free = self.count - len(held)
        room = free + (self.staging[0].half if self.staging else 0)
        missing = [expert for expert in range(len(counts)) if expert not in held]
        missing.sort(key=lambda expert: -counts[expert])
        wanted = source.begin(source.ahead(missing)[:room])
        for expert in [each for each in wanted if source.ready(each)]:
            if len(held) < self.count:
                self._fetch([expert], held.values())
            elif self.staging is not None:
                self._stage(expert, self.staging[0])
            self.early.add(expert)
        self.traffic[tokens].copied += len(self.early) * self.places.shape[1]
        return False

    def _stage(self, expert: int, staging: Staging) -> None:
        place = staging.take()
        self.link.copy(staging.rows[place], self.outside[1].row(expert), staging.used[place])
        arrived = self.link.arrival()
        self.outside[1].sent(expert, arrived)
        self.staged[expert] = place, arrived


def _split(current: dict[int, int], most: int) -> tuple[dict[int, int], dict[int, int]]:
    """The last ones of these experts, at most so many; and the others."""
    experts = list(current)
    cut = max(0, len(experts) - most)
    last, first = experts[cut:], experts[:cut]
    return {e: current[e] for e in last}, {e: current[e] for e in first}
