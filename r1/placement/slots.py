"""Which expert of a layer lies in which slot of the device, and which slot is given away next.

A policy is one class and one entry in POLICIES.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence


class Slots:
    """The slots of one layer. Here: the expert that was used longest ago is given up first."""

    def __init__(self, slots: int, experts: int) -> None:
        self.expert: list[int | None] = [None] * slots
        """By slot."""
        self.slot: dict[int, int] = {}
        """By expert, of those that lie in one."""
        self.first = 0
        """Slots before this one are never given away."""
        self.used, self.clock = [0] * slots, 0
        self.counts: list[float] = [0] * experts
        """Tokens that chose each expert."""

    def worth(self, slot: int) -> tuple[float, ...]:
        """The slot with the least worth is given away first."""
        return (self.used[slot],)

    def room(self, keep: Collection[int] = ()) -> int:
        """How many slots may be given away, other than `keep`."""
        return len(self.expert) - self.first - sum(slot >= self.first for slot in keep)

    def order(self, missing: Iterable[int]) -> list[int]:
        """The order in which experts are fetched. What comes last stays longest."""
        return list(missing)

    def stay(self, missing: list[int]) -> list[int]:
        """Those of the experts of a prompt that shall lie in slots after it, where not all can.

        Here: as many as slots are empty.
        """
        return missing[: len(self.expert) - len(self.slot)]

    def count(self, chosen: Iterable[int], tokens: Iterable[int]) -> None:
        """So many tokens chose each of these experts."""
        for expert, number in zip(chosen, tokens, strict=True):
            self.counts[expert] += number

    def use(self, slots: Iterable[int]) -> None:
        """These slots are used in one pass."""
        self.clock += 1
        for slot in slots:
            self.used[slot] = self.clock

    def leaving(self, elsewhere: Container[int | None] = ()) -> list[int]:
        """The slots in the order in which they are given away: empty ones, then those of least
        worth. Experts that lie `elsewhere` too give theirs first.
        """

        def worth(slot: int) -> tuple[float, ...]:
            held = self.expert[slot]
            return (held is not None, held not in elsewhere, *self.worth(slot))

        return sorted(range(self.first, len(self.expert)), key=worth)

    def take(
        self, expert: int, keep: Collection[int], elsewhere: Container[int | None] = ()
    ) -> int:
        """The slot that `expert` gets, none of `keep`."""
        slot = next(slot for slot in self.leaving(elsewhere) if slot not in keep)
        self.put(expert, slot)
        return slot

    def put(self, expert: int, slot: int) -> None:
        """`slot` holds this expert from now on."""
        before = self.expert[slot]
        if before is not None:
            del self.slot[before]
        self.expert[slot], self.slot[expert] = expert, slot
        self.use([slot])

    def forget(self, expert: int) -> None:
        """Its slot does not hold it after all."""
        self.expert[self.slot.pop(expert)] = None


class MostUsed(Slots):
    """The expert that the fewest tokens chose is given up first, of equals the older one.

    A prompt's tokens count, so an answer begins with the experts that its prompt used most.
    """

    def worth(self, slot: int) -> tuple[float, ...]:
        expert = self.expert[slot]
        return (0 if expert is None else self.counts[expert], self.used[slot])

    def order(self, missing: Iterable[int]) -> list[int]:
        return sorted(missing, key=lambda expert: self.counts[expert])

    def stay(self, missing: list[int]) -> list[int]:
        every = sorted([*self.slot, *missing], key=lambda expert: -self.counts[expert])
        best = set(every[: len(self.expert)])
        return [expert for expert in missing if expert in best]


class Recorded(MostUsed):
    """The expert that was chosen least in a recording (profile.py) is given up first.

    So the most chosen ones stay, once they have come, and the others take turns.
    """

    def expect(self, counts: list[float]) -> None:
        """How often each expert was chosen there."""
        self.counts = counts

    def count(self, chosen: Iterable[int], tokens: Iterable[int]) -> None:
        pass


class Resident(Slots):
    """Some experts have slots for good. The others pass through the few slots that are left.

    A resident expert needs no copy in host memory. If all experts are chosen alike, the share that
    is found is the same as with slots that hold what was used last.
    """

    def settle(self, experts: Sequence[int]) -> None:
        """These have the first slots."""
        self.first = len(experts)
        self.expert[: self.first] = experts
        self.slot = {expert: slot for slot, expert in enumerate(experts)}


def residents(slots: int, experts: int, chosen: int) -> int:
    """How many of a layer's experts are resident on a device with so many slots for it.

    The others get slots for two tokens, which choose `chosen` experts each, but at most half of
    the slots. More slots that pass would cost host memory, and find no more. Where all experts have
    slots, all are resident.
    """
    return slots if slots >= experts else slots - min((slots + 1) // 2, 2 * chosen)


POLICIES: dict[str, type[Slots]] = {
    "last": Slots, "most": MostUsed, "pinned": Recorded, "resident": Resident,
}  # fmt: skip
"""By the value of the switch expert_policy."""
