"""Experts that lie in host memory or in files, and are copied to a few slots when chosen.

The strategies of dispatch.py and the kernels see a stack of as many experts as there are slots.
A call makes passes. The first one computes the chosen experts that lie in a slot already; meanwhile
the missing ones are copied. Where they are more than the slots, they come in batches: one is
copied while the one before is computed. So a prompt copies each expert at most once, for all its
tokens. The host has to know the choices, so it waits for the router in each layer.

Shapes: N tokens, K experts per token, E experts, D hidden_size, M choices of a pass.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from r1.model.moe import Experts, Run
from r1.model.router import Router
from r1.placement.link import Event, Link
from r1.placement.slots import Slots
from r1.placement.sources import InMemory
from r1.storage.matrix import Matrix
from r1.storage.rows import Rows

MATRICES = ("gate_proj", "up_proj", "down_proj")
FEW = 64
"""Tokens of a call up to which the next layer's experts are guessed: a prompt uses nearly all."""


@dataclass
class Traffic:
    """What one layer's experts did, in calls of one number of tokens."""

    calls: int = 0
    visits: int = 0
    """Different experts that were chosen, added up over calls."""
    hits: int = 0
    """Of these, the ones that lay in a slot, or were on their way."""
    copied: int = 0
    """Bytes that were copied to the device."""
    read: int = 0
    """Bytes that were read from files."""
    guessed: int = 0
    """Experts of the next layer that were fetched early."""
    right: int = 0
    """Of the experts fetched early for this layer, those that were chosen."""


class StreamedExperts(Experts):
    """The experts of one layer: all in host memory or in files, some also on the device."""

    def __init__(
        self, whole: Experts, slots: Slots, source: InMemory, device: torch.device, link: Link
    ) -> None:
        """`whole` has the layer's stacks; without memory where they lie in files."""
        nn.Module.__init__(self)
        held = copy.deepcopy(whole)
        for name in MATRICES:
            setattr(self, name, getattr(held, name))
        count = len(slots.expert)
        self.ids, self.leads, self.inner_numbers = whole.ids, whole.leads, whole.inner_numbers
        self.count = count
        self.every = type(whole) is Experts  # no rank has only some of them
        # Zeros: a slot that holds no expert yet must not make NaN of 0 times its numbers.
        self.places = torch.zeros(count, source.rows.shape[1], dtype=torch.uint8, device=device)
        Rows(self).place(self.places)
        self.outside = (whole, source)  # in a tuple: no part of this module
        self.slots, self.link = slots, link
        self.arrived: list[Event | None] = [None] * count
        self.used: list[Event | None] = [None] * count
        self.traffic: defaultdict[int, Traffic] = defaultdict(Traffic)
        self.next: tuple[Router, StreamedExperts] | None = None
        """The next sparse layer, where its experts are to be guessed."""
        self.guess: Tensor | None = None
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
        for table in self._passes(choices):
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
        for table in self._passes(choices):
            slots = table[choices]  # (N, K), -1: not in this pass
            if bool((slots >= 0).all()):
                y = run(self, x, slots.to(device, non_blocking=True), weights)
                continue  # there is no other pass; but this one's end is still to be noted
            token, place = (slots >= 0).nonzero().unbind(dim=1)  # (M,) each
            chosen = slots[token, place].to(device, non_blocking=True)[:, None]  # (M, 1)
            token = token.to(device, non_blocking=True)
            place = place.to(device, non_blocking=True)
            part = run(self, x[token], chosen, weights[token, place][:, None])  # (M, D)
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

    def _passes(self, choices: Tensor) -> Iterator[Tensor]:
        """Fetch the chosen experts. Each pass gives a table: a slot for each expert, -1 for none.

        While a pass is computed, its slots stay as they are.
        """
        slots, counted = self.slots, Counter(choices.flatten().tolist())
        counted.pop(len(self.ids), None)
        chosen = sorted(counted)
        slots.count(chosen, (counted[expert] for expert in chosen))
        current = {expert: slots.slot[expert] for expert in chosen if expert in slots.slot}
        source = self.outside[1]
        missing = source.begin(slots.order(e for e in chosen if e not in current))
        most = self.count - len(current)
        if len(missing) > most:
            most = max(1, self.count // 2)
        self._note(len(choices), chosen, current)
        while True:
            room = min(most, self.count - len(current))
            coming, missing = self._fetch(missing[:room], current.values()), missing[room:]
            if not missing and self.next is not None and self.expected:
                self._fetch_next(len(choices))
            if current:
                yield self._ready(current)
                done = self.link.now()
                for slot in current.values():
                    self.used[slot] = done
            if not coming and not missing:
                break
            current = coming
        self.traffic[len(choices)].read += source.read_bytes()

    def _note(self, tokens: int, chosen: Collection[int], held: Collection[int]) -> None:
        note = self.traffic[tokens]
        note.calls, note.visits = note.calls + 1, note.visits + len(chosen)
        note.hits += len(held)
        note.copied += (len(chosen) - len(held)) * self.places.shape[1]
        note.right += len(self.fetched.intersection(chosen))
        self.fetched.clear()

    # ------------------------- slots
    def _ready(self, current: dict[int, int]) -> Tensor:
        """Let the device wait for these experts' copies, and give their table, int64 (E + 1,)."""
        self.slots.use(current.values())
        for event in {self.arrived[slot] for slot in current.values()}:
            self.link.wait(event)
        table = torch.full((len(self.ids) + 1,), -1)
        for expert, slot in current.items():
            self.arrived[slot] = None
            table[expert] = slot
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

    def _fetch_next(self, tokens: int) -> None:
        """Fetch what the next layer is expected to choose, once."""
        assert self.next is not None
        other, expected, self.expected = self.next[1], self.expected, []
        expected = [e - other.ids.start for e in expected if e in other.ids]
        held = {e: other.slots.slot[e] for e in expected if e in other.slots.slot}
        early = [expert for expert in expected if expert not in held][: other.count - len(held)]
        other.fetched.update(early)
        note = self.traffic[tokens]
        note.guessed += len(early)
        source = other.outside[1]
        early = [e for e in source.begin(early) if source.ready(e)]  # none that a drive has
        note.copied += len(early) * other.places.shape[1]
        other._fetch(early, held.values())
