"""Experts that lie in host memory or in files, and are copied to a few slots when chosen.

Some may be resident: they lie in slots for good, and nowhere else.

The strategies of dispatch.py and the kernels see a stack of as many experts as there are slots.
A call makes passes. The first one computes the chosen experts that lie in a slot already, and those
that come before the last one. Meanwhile the missing ones are copied. Where they are more than the
slots, they come in batches: one is copied while the one before is computed. So a prompt copies each
expert at most once, for all its tokens: most of them through the staging (staging.py), so that the
slots keep what their policy wants. When its last batch of a layer is on its way, the next layer's
first experts follow, before that layer has chosen. The host has to know the choices, so it waits
for the router in each layer.

Shapes: N tokens, K experts per token, E experts, D hidden_size, M choices of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from r1.model.moe import Experts, Run
from r1.placement.guessing import FEW
from r1.placement.holding import Arrivals, Pass
from r1.placement.link import Link
from r1.placement.slots import Slots
from r1.placement.sources import InMemory
from r1.placement.stepping import Stepping
from r1.placement.traffic import Traffic

Multiply = Callable[[Experts, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Experts, x, and of each choice its token, its expert and its weight -> fp32 sums: host.py."""
MANY = 0.875
"""A call that chooses this share of a layer's experts will choose nearly all of the next one's."""


class StreamedExperts(Stepping):
    """The experts of one layer: in host memory or in files, and some on the device."""

    def __init__(
        self,
        bare: Experts,
        whole: Experts,
        slots: Slots,
        source: InMemory,
        device: torch.device,
        link: Link,
    ) -> None:
        """`whole` has the layer's stacks, without resident experts; without memory where they lie
        in files. `bare` is the same without memory.
        """
        super().__init__(bare, slots, source, device, link)
        self.leads = whole.leads
        self.outside = (whole, source)  # in a tuple: no part of this module
        self.multiply: Multiply | None = None
        """Multiplies on the host what a step misses, where that is asked for."""
        self.sent: tuple[Tensor, Tensor] | None = None
        """A step's input (N, D) and weights (N, K), on the host."""
        self.input: Tensor | None = None
        self.back: Tensor | None = None
        """What the host has made, fp32 (N, D), on the device."""
        self.following: tuple[StreamedExperts] | None = None
        """The next sparse layer, for prompts; in a tuple: no part of this module."""

    def home(self, number: int) -> tuple[Experts, int]:
        whole, source = self.outside
        slot = self.slots.slot.get(number, self.count)
        return (self, slot) if slot < self.slots.first else (whole, source.home(number))

    def combine(self, y: Tensor) -> Tensor:
        back, self.back = self.back, None
        return self.outside[0].combine(y if back is None else (y + back).to(y.dtype))

    # ------------------------- one call
    def look_ahead(self, x: Tensor) -> None:
        """Guess the next layer's choices. Keep the input of a step whose missing experts the host
        multiplies.
        """
        self.input = x if self.multiply and len(x) <= FEW else None
        self.ask_next(x)

    def here(self, indices: Tensor, weights: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """A pass for each group of experts. A choice of another pass is of no expert.

        There is always a pass, also where other devices have all that was chosen: a fused step adds
        the residual in it.
        """
        ((indices, weights),) = self.outside[0].here(indices, weights)
        if self.link.cut is not None:
            yield from self.cut(indices, weights)
            return
        choices, none = self._read(indices, weights), True
        self.staged.clear()  # a call that failed may have left some
        for _, table, ready in self._passes(choices):
            none = False
            slots = table[choices]  # (N, K), -1: not in this pass
            slots = slots.where(slots >= 0, self.count).to(indices.device, non_blocking=True)
            ready()
            yield slots, weights
        if none:
            yield torch.full_like(indices, self.count), weights

    def forward(self, run: Run, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """As the base's. Where there are several passes, each computes its own choices only."""
        self.look_ahead(x)
        if self.link.cut is not None:
            return super().forward(run, x, indices, weights)
        ((indices, weights),) = self.outside[0].here(indices, weights)
        choices, device = self._read(indices, weights), x.device
        y = torch.zeros(x.shape, dtype=torch.float32, device=device)
        for stack, table, ready in self._passes(choices, apart=True):
            slots = table[choices]  # (N, K), -1: not in this pass
            if bool((slots >= 0).all()):
                slots = slots.to(device, non_blocking=True)
                ready()
                y = run(stack, x, slots, weights)
                continue  # there is no other pass; but this one's end is still to be noted
            token, place = (slots >= 0).nonzero().unbind(dim=1)  # (M,) each
            chosen = slots[token, place].to(device, non_blocking=True)[:, None]  # (M, 1)
            token = token.to(device, non_blocking=True)
            place = place.to(device, non_blocking=True)
            ready()
            part = run(stack, x[token], chosen, weights[token, place][:, None])  # (M, D)
            y.index_add_(0, token, part.float())
        return self.combine(y.to(x.dtype))

    def _read(self, indices: Tensor, weights: Tensor) -> Tensor:
        """The choices on the host, int64 (N, K); E where another device has the expert.

        The guess of the next layer's experts is read with them, in the same wait; so is what the
        host needs to multiply.
        """
        self.sent = self.back = None
        if self.input is not None:
            x = self.input.to("cpu", non_blocking=True)
            self.sent = x, weights.to("cpu", non_blocking=True)
        return self.apart(self.link.ask(self.with_guess(indices))(), indices.shape[1])

    # ------------------------- passes
    def _passes(self, choices: Tensor, apart: bool = False) -> Iterator[Pass]:
        """Fetch the chosen experts, and give the passes. While one is computed, its places stay as
        they are. `apart`: passes may be over other stacks than this one.
        """
        slots, (counted, current) = self.slots, self._chosen(choices.flatten().tolist())
        chosen = list(counted)
        came, self.staged = self.staged, {}
        staged = {e: place for e, place in came.items() if e in counted and e not in current}
        note, source = self.traffic[len(choices)], self.source
        missing = source.begin(slots.order(e for e in chosen if e not in current | staged))
        there: list[int] = []
        if self.sent is not None:
            missing, there = self._divide(missing)
        held, width = current.keys() | staged, self.places.shape[1]
        if apart and self.staging and (staged or len(missing) > slots.room(current.values())):
            ahead = len(chosen) >= MANY * len(self.ids)
            passes = self._stream(current, staged, missing, len(choices) if ahead else 0)
        else:
            passes = self._in_slots(current, missing, note)
        first = list(islice(passes, 1))  # copies begin, and then there is time for the rest
        note.add(chosen, held, missing, self.early, self.fetched, width)
        yield from first
        yield from passes
        note.read += source.read_bytes(len(choices))
        if there:
            self._multiply(choices, there)
            note.computed += len(there)
            note.multiplied += len(there) * source.rows.shape[1]

    def _divide(self, missing: list[int]) -> tuple[list[int], list[int]]:
        """Of a step's missing experts: those that empty slots get, and those for the host."""
        empty = min(self.free, self.landing[0].half) if self.landing else self.free
        best = sorted(missing, key=lambda expert: -self.slots.counts[expert])[:empty]
        return best, [expert for expert in missing if expert not in best]

    def _multiply(self, choices: Tensor, experts: list[int]) -> None:
        """On the host, while the device computes what it has. `combine` adds the result."""
        assert self.multiply is not None and self.sent is not None
        marked = torch.zeros(len(self.ids) + 1, dtype=torch.bool)
        marked[experts] = True
        token, place = marked[choices].nonzero().unbind(dim=1)  # (M,) each
        x, weights = self.sent
        y = self.multiply(
            self.outside[0], x, token, choices[token, place], weights[token, place]
        )  # (N, D)
        self.back = y.to(self.places.device)

    def _in_slots(
        self, current: dict[int, int], missing: list[int], note: Traffic
    ) -> Iterator[Pass]:
        """Passes over slots only. Where the missing experts are too many, they take turns.

        Nothing is copied after the last one has come, until the next layer has chosen. So that one
        is computed by itself, and all others before, while it is copied.
        """
        slots = self.slots
        most = slots.room(current.values())
        if len(missing) > most:
            most = max(1, slots.room() // 2)
        if self.landing:
            most = min(most, self.landing[0].half)
        while True:
            room = min(most, slots.room(current.values()))
            coming, missing = self.fetch(missing[:room], current.values()), missing[room:]
            if not missing:
                self.fetch_next(note)
            if not missing and coming:
                *others, last = coming
                current = current | {expert: coming[expert] for expert in others}
                coming = {last: coming[last]}
            yield from self.compute(current)
            if not coming and not missing:
                break
            current = coming

    def _stream(
        self, current: dict[int, int], staged: Arrivals, missing: list[int], ahead: int
    ) -> Iterator[Pass]:
        """Passes over more experts than fit the slots. Those that shall stay come to slots, the
        others pass through the staging, and what is best in slots stays there.

        `ahead`: tokens of a call that needs nearly all experts, so the next layer will need them
        too; else 0.
        """
        assert self.staging is not None
        stay, half = set(self.slots.stay([*missing, *staged])), self.staging[0].half
        held = self.compute(current)
        now = [held, self.compute_staged(staged, [e for e in staged if e in stay])]
        for first in range(0, len(missing), half):
            to_slots: dict[int, int] = {}
            through: Arrivals = {}
            for expert in missing[first : first + half]:  # in the source's order
                if expert in stay:
                    yield from held  # what the slot holds is needed before
                    to_slots |= self.fetch([expert], to_slots.values())
                else:
                    through |= self.stage([expert])
            for each in now:
                yield from each
            now = [self.compute(to_slots), self.compute_staged(through)]
        if ahead and self.following is not None:
            self.following[0].fetch_early(ahead)
        for each in now:
            yield from each
