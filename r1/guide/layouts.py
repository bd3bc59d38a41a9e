"""The layouts of a model on some machines: who shares a layer, which stages, which switches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from r1.errors import InputError
from r1.guide.gpus import Gpu
from r1.guide.setup import ON_DEVICE, Places, Setup
from r1.model.config import Config
from r1.placement import cuts
from r1.roofline import model_of
from r1.switches.backend import Backend
from r1.switches.resolve import resolve

FASTEST: tuple[dict[str, Any], ...] = (
    {"kernels": "triton", "prefill_moe": "triton"},
    {"attention": "triton", "moe": "triton", "prefill_moe": "triton"},
    {},
)
"""Switches for GPUs, the fastest first. They capture their steps where a step can be captured."""


def setups(
    name: str, config: Config, gpu: Gpu, quant: str, count: int, places: Places = ON_DEVICE
) -> Iterator[Setup]:
    """Every layout of a model on `count` machines of a kind, stored as `quant` says.

    Layers are shared inside a host only. Hosts, and GPUs that can't share a layer, are stages.
    """
    inside = min(count, gpu.most_in_host)
    for parts in (n for n in range(inside, 0, -1) if count % n == 0 and _is_power(n)):
        found = list(_cut(name, config, gpu, quant, (parts, count // parts), places))
        yield from found
        if found:
            return


def _cut(
    name: str, config: Config, gpu: Gpu, quant: str, sizes: tuple[int, int], places: Places
) -> Iterator[Setup]:
    """The layouts of `sizes`: devices that share a layer, and stages."""
    parts, pp = sizes
    for tp in (2**n for n in range(parts.bit_length()) if parts % 2**n == 0):
        ep = parts // tp
        if ep > 1 and (config.experts.n_routed_experts == 0 or gpu.device == "cpu"):
            continue
        if cuts.why_not(config, tp, ep, pp):
            continue
        shares = Shares(quant, tp, ep, pp, places.experts)
        if backend := switches(config, gpu, shares):
            yield Setup(name, config, gpu, backend, places)


def _is_power(n: int) -> bool:
    return n & (n - 1) == 0


@dataclass(frozen=True)
class Shares:
    """The switches that say how a model is stored, and where."""

    quant: str
    tp: int
    ep: int
    pp: int
    experts: str


@cache
def switches(config: Config, gpu: Gpu, shares: Shares) -> Backend | None:
    """The switches to expect of somebody who wants speed; None where the storage can't be cut."""
    try:
        return fastest(config, gpu, shares)
    except InputError:
        return None


def fastest(config: Config, gpu: Gpu, shares: Shares) -> Backend:
    """The same. Raises InputError, which says why the ones that ask for least can't be."""
    machine = gpu.as_machine()
    common: dict[str, Any] = {"dtype": "bf16", **vars(shares)}
    tried = FASTEST if machine.cuda else ({},)
    graphs = machine.cuda and shares.pp == 1 and shares.experts == "device"
    reasons: list[InputError] = []
    for fast in tried:
        sparse = config.experts.n_routed_experts > 0
        more = {name: value for name, value in fast.items() if sparse or "moe" not in name}
        if "kernels" in fast and shares.tp * shares.ep > 1 and not machine.hip:
            more["allreduce"] = "triton"
        try:
            backend = resolve(Backend(cuda_graphs=graphs, **common, **more), config, machine)
            model_of(config, replace(backend, experts="device"), False)  # can it be cut so?
            return backend
        except InputError as error:  # the next ones ask for less
            reasons.append(error)
    raise reasons[-1]
