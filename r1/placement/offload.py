"""The placement of `experts=host`, `cpu` and `disk`: routed experts in host memory, or in files
behind a cache there. Everything else lies as before. With `expert_policy=resident` the experts that
lie on the device for good have no place in host memory.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from r1.device import available_bytes
from r1.errors import InputError, setting
from r1.model.moe import Experts, MoE
from r1.placement import host
from r1.placement.link import Link, host_rows
from r1.placement.placement import Part, Placement
from r1.placement.profile import Profile
from r1.placement.slots import POLICIES, Recorded, Resident, Slots, residents
from r1.placement.sources import THREADS, InFiles, InMemory
from r1.placement.staging import Staging, places_for
from r1.placement.streamed import StreamedExperts
from r1.storage.matrix import Matrix
from r1.storage.rows import Rows

CPU = torch.device("cpu")
LEFT = 2**30
"""Bytes of the device that are left to activations and the cache, where slots take what is free."""
SHARE = 0.1
"""The same as a share of what is free: the larger one counts."""


@dataclasses.dataclass(frozen=True)
class Slotted:
    """How experts are fetched: the switches."""

    slots: int = 0
    """Of each layer; 0: as many as the device has memory for."""
    policy: str = "last"
    profile: Profile | None = None
    """What the policies "pinned" and "resident" keep."""
    guess: bool = False
    files: bool = False
    """Experts stay in the checkpoint's files."""
    host: bool = False
    """What a decode step misses is multiplied in host memory."""
    repacked: bool = False
    """It is int4 there, in the order of the CPU's operator (host.py), once it is loaded."""
    cache: int = 0
    """Bytes of host memory in front of them; 0: what is free."""
    sharers: int = 1
    """Processes of this host that share its memory, each with so much as this one."""


class Offloaded(Placement):
    """Experts outside the device, which has some slots for them; the rest as `base` has it."""

    def __init__(self, base: Placement, how: Slotted) -> None:
        self.base, self.how, self.mesh = base, how, base.mesh

    @property
    def complete(self) -> bool:
        return self.base.complete

    def arrange(self, model: Any) -> None:
        self.base.arrange(model)

    def matrix(self, path: str, matrix: Matrix) -> Matrix:
        return self.base.matrix(path, matrix)

    def holds(self, key: str) -> bool:
        return self.base.holds(key)

    def part(self, key: str, shape: tuple[int, ...]) -> Part:
        return self.base.part(key, shape)

    def sizes(self, model: nn.Module, device: torch.device) -> Counter[str]:
        """The device has the fewest slots that are asked for, one if their number is free. But
        what is resident is counted as it will be: the host has the rest.
        """
        slots = self.how.slots or 1
        if self._keeps and not self.how.slots:
            slots = self.slots(model, self.free(model, device))
        needed = Counter({device.type: rest_bytes(model)})
        needed[device.type] += staging_bytes(model, slots)
        for layer in sparse(model):
            width = Rows(layer.experts).width
            needed[device.type] += slots * width
            more = host.order_bytes(layer.experts) if self.how.repacked else 0
            there = layer.experts.count - self.residents(layer, slots)
            needed["cpu"] += (1 if self.how.files else there) * (width + more)
        if self.how.repacked:  # the layer that is being repacked; and where experts arrive
            needed["cpu"] += 2 * layer.experts.count * (width + more)
            needed[device.type] += self._landing(model, slots)
        if self.how.files and self.how.cache:
            needed["cpu"] += (self.cached(model, 0) - 1) * expert_width(model)
        return needed

    @property
    def _keeps(self) -> bool:
        """Whether some experts are resident."""
        return POLICIES[self.how.policy] is Resident

    def residents(self, layer: MoE, slots: int) -> int:
        """How many of a layer's experts lie in its slots and nowhere else."""
        chosen = layer.gate.shape.num_experts_per_tok
        return residents(slots, layer.experts.count, chosen) if self._keeps else 0

    def slots(self, model: nn.Module, free: int) -> int:
        """Slots of each layer, of a device with so many bytes free for everything."""
        layers = sparse(model)
        most = max(layer.experts.count for layer in layers)
        if self.how.slots:
            return min(self.how.slots, most)
        free -= rest_bytes(model) + max(LEFT, int(SHARE * free))
        each = expert_width(model)
        slots = max(1, min(most, free // each))
        while slots > 1 and (
            slots * each + staging_bytes(model, slots) + self._landing(model, slots) > free
        ):
            slots -= 1
        return slots

    def _landing(self, model: nn.Module, slots: int) -> int:
        """Bytes of the device where experts in the host's order arrive."""
        if not self.how.repacked:
            return 0
        experts = sparse(model)[0].experts
        half = host.landing_places(slots, staging_places(model, slots))
        return 2 * half * (Rows(experts).width + host.order_bytes(experts))

    def cached(self, model: nn.Module, free: int) -> int:
        """Experts of each layer in the cache of a host with so many bytes free. Raises InputError.

        Where they stay in files; otherwise the host has all.
        """
        most = max(layer.experts.count for layer in sparse(model))
        if not self.how.files:
            return most
        if not self.how.cache:
            return max(1, min(most, (free - max(LEFT, int(SHARE * free))) // expert_width(model)))
        if self.how.cache < (least := expert_width(model)):
            asked = setting("expert_cache_gb", f"{self.how.cache / 1e9:.3g}")
            raise InputError(
                f"{asked} can't hold one expert of each layer, which are {least / 1e9:.3g} GB: "
                "give more, or leave it out for what is free"
            )
        return min(most, self.how.cache // expert_width(model))

    def allocate(self, model: Any, device: torch.device) -> None:
        """Memory for the tensors; each layer's experts become StreamedExperts."""
        count = self.slots(model, self.free(model, device))
        half, ahead = staging_places(model, count), staging_bytes(model, count)
        taken = rest_bytes(model) + count * expert_width(model) + ahead if device == CPU else 0
        for module in _rest(model):
            module.to_empty(device=device, recurse=False)
        link = Link(device)
        cached = self.cached(model, available_bytes(CPU) // self.how.sharers - taken)
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="experts")
        bares: list[Experts] = []
        for layer in sparse(model):
            whole, slots = layer.experts, self._slots(count, layer, model)
            bare = copy.deepcopy(whole)
            near = CPU if self.how.repacked else device  # what is given back is not pinned
            there = [expert for expert in range(whole.count) if expert not in slots.slot]
            rows = host_rows(min(cached, len(there)), Rows(whole).width, near)
            source = InMemory(rows, there)
            held = copy.deepcopy(whole) if self.how.files else whole
            Rows(held).place(rows)
            if self.how.files:
                cache = POLICIES[self.how.policy](len(rows), whole.count)
                source = InFiles(held, rows, cache, slots, pool)
            streamed = StreamedExperts(bare, whole, slots, source, device, link)
            streamed.multiply = host.multiply if self.how.host else None
            layer.experts = streamed
            bares.append(bare)
        self._chain(model, bares, Staging(bares[0], half, device) if half else None)
        link.begin()

    def _slots(self, count: int, layer: MoE, model: Any) -> Slots:
        """The slots of one layer, with what the policy knows of its experts."""
        slots = POLICIES[self.how.policy](count, layer.experts.count)
        number = next((n for n, block in enumerate(model.layers) if block.mlp is layer), None)
        counts = [0.0] * layer.experts.count
        if self.how.profile and number is not None:
            recorded = self.how.profile.counts[number]
            counts = [recorded[expert] for expert in layer.experts.ids]
        if isinstance(slots, Recorded):
            slots.expect(counts)
        elif isinstance(slots, Resident):
            best = sorted(range(len(counts)), key=lambda expert: -counts[expert])
            slots.settle(sorted(best[: self.residents(layer, count)]))
        return slots

    def _chain(self, model: Any, bares: list[Experts], staging: Staging | None) -> None:
        """Tell each layer the next one, and give them the staging that they share.

        `bares`: the layers' stacks without memory.
        """
        layers = sparse(model.layers)
        for layer, bare in zip(sparse(model), bares, strict=True):
            if staging and Rows(bare).layout == staging.layout:
                cast(StreamedExperts, layer.experts).staging = (staging,)
        for layer, following in pairwise(layers):
            streamed, other = layer.experts, following.experts
            assert isinstance(streamed, StreamedExperts) and isinstance(other, StreamedExperts)
            streamed.following = (other,)
            if self.how.guess:
                streamed.next = (following.gate, other)

    def free(self, model: nn.Module, device: torch.device) -> int:
        """Bytes that the device has for all but the experts in host memory."""
        free = available_bytes(device)
        if device.type == "cpu":  # the host's memory is the device's
            free //= self.how.sharers
            if not self._keeps:  # what is resident takes as much of it on either side
                free -= self.cached(model, free // 2) * expert_width(model)
        return free


def sparse(model: nn.Module) -> list[MoE]:
    """The layers that have experts, in order."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def expert_width(model: nn.Module) -> int:
    """Bytes of one expert of each layer."""
    return sum(Rows(layer.experts).width for layer in sparse(model))


def staging_places(model: nn.Module, slots: int) -> int:
    """How many experts of a prompt pass through the staging at a time."""
    experts = sparse(model)[0].experts
    return places_for(slots, experts.count, Rows(experts).width)


def staging_bytes(model: nn.Module, slots: int) -> int:
    """Bytes of the device for these: one half is copied while the other is computed."""
    return 2 * staging_places(model, slots) * Rows(sparse(model)[0].experts).width


def _rest(model: nn.Module) -> list[nn.Module]:
    """The modules that are no part of routed experts."""
    inside = {id(part) for layer in sparse(model) for part in layer.experts.modules()}
    return [module for module in model.modules() if id(module) not in inside]


def rest_bytes(model: nn.Module) -> int:
    """Bytes of everything but the routed experts."""
    tensors = (
        tensor
        for module in _rest(model)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )
    return sum(tensor.nbytes for tensor in tensors)
