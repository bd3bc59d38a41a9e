"""A model on some machines: the switches that suit them, the layout, and its memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from r1.build import weight_bytes
from r1.errors import InputError
from r1.files.config_json import load_config
from r1.files.quantized import methods
from r1.footprint import Footprint, Sizes, footprint, module_bytes
from r1.guide.gpus import Gpu
from r1.model.config import Config
from r1.model.shapes import SHAPES
from r1.model.transformer import Transformer
from r1.placement import cuts
from r1.placement.offload import expert_width, rest_bytes
from r1.roofline import model_of
from r1.storage.kinds import USUAL
from r1.switches.backend import Backend
from r1.switches.resolve import resolve

PRECISIONS = ("none", "fp8", "int8", "int4")
"""How matrices are stored if nobody says how, the most exact first. none: plain, in bf16."""
QUANTS = ("none", *USUAL)
"""All that may be asked for."""
COUNTS = (1, 2, 4, 8, 16, 32)
"""How many GPUs may share a model."""
FASTEST: tuple[dict[str, Any], ...] = (
    {"kernels": "triton", "prefill_moe": "triton"},
    {"attention": "triton", "moe": "triton", "prefill_moe": "triton"},
    {},
)
"""Switches for GPUs, the fastest first. They capture their steps where a step can be captured."""


@dataclass(frozen=True)
class Places:
    """Where routed experts lie, and what there is for them beside the device."""

    experts: str = "device"
    """As the switch: device, host or disk."""
    ram_bytes: float | None = None
    """Host memory that experts may take. None: with `host` as much as they need, with `disk` none
    but for one expert of each layer."""


ON_DEVICE = Places()
"""All experts on the device, as anything else."""


@dataclass(frozen=True)
class Setup:
    """A model, how it is stored, and the machines that hold it."""

    name: str
    config: Config
    gpu: Gpu
    backend: Backend
    """Resolved for this machine."""
    places: Places = ON_DEVICE

    @property
    def count(self) -> int:
        """How many machines."""
        return self.backend.ranks

    @property
    def stored(self) -> str:
        """How most numbers are stored, in a word."""
        return self.backend.dtype if self.backend.quant == "none" else self.backend.quant

    @property
    def layout(self) -> str:
        """Who holds what, in words."""
        ways = {"tp": "TP", "ep": "EP", "pp": "PP"}
        parts = [f"{word} {n}" for name, word in ways.items() if (n := _of(self.backend, name)) > 1]
        layout = " x ".join(parts) or "one device"
        if self.streams:
            layout += f", experts {self.place}"
        return layout

    @property
    def place(self) -> str:
        """Where experts lie that are not on the device, in words."""
        ram = f"in {self.elsewhere_bytes / 1e9:.0f} GB of RAM"
        return ram if self.places.experts == "host" else "on disk"

    @property
    def hosts(self) -> int:
        """How many hosts these machines are in."""
        return math.ceil(self.count / self.gpu.most_in_host)

    @property
    def streams(self) -> bool:
        """Whether experts lie elsewhere, and are copied to slots of the device."""
        return self.places.experts != "device"

    @property
    def on_device(self) -> Backend:
        """The same switches with all experts on the device: what a step computes is the same."""
        return replace(self.backend, experts="device", expert_slots=0)

    @property
    def expert_bytes(self) -> int:
        """Of one expert of each layer, on the device with the largest share."""
        return _expert_bytes(model_of(self.config, self.on_device, False))

    @property
    def file_bytes(self) -> int:
        """Of the same in the checkpoint's files, as they are published: `quant` packs them anew."""
        files = replace(self.on_device, quant=published(self.config) or "none")
        return _expert_bytes(model_of(self.config, files, False))

    @property
    def elsewhere_bytes(self) -> int:
        """Of all routed experts, on all ranks together."""
        return self.config.experts.n_routed_experts * self.expert_bytes * self.backend.tp

    def slots(self, sizes: Sizes) -> int:
        """Experts of each layer that the device has room for, beside everything else."""
        free = self.gpu.capacity - self._memory(sizes, 0).total
        experts = self.config.experts.n_routed_experts // self.backend.ep
        return max(0, min(experts, free // self.expert_bytes))

    def cached(self) -> int:
        """Experts of each layer that host memory holds, before the files on disk."""
        experts, ram = self.config.experts.n_routed_experts, self.places.ram_bytes
        if ram is None:
            return 1 if self.places.experts == "disk" else experts
        return int(min(experts, ram // (self.expert_bytes * self.backend.tp)))

    def memory(self, sizes: Sizes) -> Footprint:
        """On the device with the largest share, as the loader counts it."""
        return self._memory(sizes, self.slots(sizes) if self.streams else 0)

    def _memory(self, sizes: Sizes, slots: int) -> Footprint:
        model = model_of(self.config, self.on_device, False)
        if self.streams:
            weights = _rest(model) + slots * self.expert_bytes
        elif self.backend.pp > 1:
            weights = _largest_stage(self.config, self.backend)
        else:
            weights = _weights(model)
        return footprint(model, self.on_device, sizes, weights)

    def fits(self, sizes: Sizes) -> bool:
        """Whether the memory is enough."""
        if self.streams:
            least = 1 if self.places.experts == "disk" else self.config.experts.n_routed_experts
            return self.cached() >= least and self.slots(sizes) > 0
        return self.memory(sizes).total <= self.gpu.capacity


def _of(backend: Backend, name: str) -> int:
    return int(getattr(backend, name))


@cache
def _weights(model: Transformer) -> int:
    """The model's bytes, counted once: sketches are kept."""
    return module_bytes(model)


@cache
def _rest(model: Transformer) -> int:
    """The bytes of all but routed experts, counted once."""
    return rest_bytes(model)


@cache
def _expert_bytes(model: Transformer) -> int:
    """The bytes of one expert of each layer, counted once."""
    return expert_width(model)


@cache
def _largest_stage(config: Config, backend: Backend) -> int:
    """The weights of the stage that has most of them."""
    return weight_bytes(config, backend)


def find_model(name: str, quant: str | None = None) -> tuple[str, Config]:
    """A named shape, a folder with config.json, or that file. Raises InputError.

    `quant`: what was asked for. A quantized checkpoint's config.json alone does not tell its own.
    """
    path = Path(name)
    if path.name == "config.json":
        path = path.parent
    if name in SHAPES or (name.lower() in SHAPES and not path.exists()):
        return name.lower(), SHAPES[name.lower()]
    if not path.exists():
        shapes = ", ".join(SHAPES)
        raise InputError(f"--model {name} is no folder: give one, or a shape: {shapes}")
    config = load_config(path)
    declared = methods.declared_in(path)
    if declared and not quant and published(config) is None:
        raise InputError(
            f"--model {name} is quantized ({declared.method}), and only the headers of its files "
            "tell how: give a folder with *.safetensors, or --quant"
        )
    return path.resolve().name, config


def published(config: Config) -> str | None:
    """How the checkpoint's files store most matrices; None: as plain numbers."""
    return config.files.kind or ("fp8" if config.files.fp8_block else None)


def precisions(config: Config, gpu: Gpu) -> list[str]:
    """The ways to store a model that this machine computes with, the most exact first.

    What is published as FP8 gains nothing by plain numbers.
    """
    kind = published(config)
    found = PRECISIONS[PRECISIONS.index(kind) :] if kind in PRECISIONS else PRECISIONS
    return [each for each in found if computes(gpu, each)]


def computes(gpu: Gpu, quant: str) -> bool:
    """Whether this machine multiplies by matrices that are stored so."""
    return quant != "fp8" or gpu.as_machine().why_not("fp8") is None


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
    machine = gpu.as_machine()
    common: dict[str, Any] = {"dtype": "bf16", **vars(shares)}
    fastest = FASTEST if machine.cuda else ({},)
    graphs = machine.cuda and shares.pp == 1 and shares.experts == "device"
    for fast in fastest:
        sparse = config.experts.n_routed_experts > 0
        more = {name: value for name, value in fast.items() if sparse or "moe" not in name}
        try:
            backend = resolve(Backend(cuda_graphs=graphs, **common, **more), config, machine)
            model_of(config, replace(backend, experts="device"), False)  # can it be cut so?
            return backend
        except InputError:  # the next ones ask for less
            continue
    return None
