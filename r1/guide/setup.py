"""A model on some machines: the switches that suit them, the layout, and its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from r1.build import placement_of, weight_bytes
from r1.device import torch_device
from r1.errors import InputError
from r1.files.config_json import load_config
from r1.files.quantized import methods
from r1.footprint import Footprint, Sizes, footprint, module_bytes
from r1.guide.gpus import Gpu
from r1.model.config import Config
from r1.model.shapes import SHAPES
from r1.model.transformer import Transformer
from r1.placement.offload import expert_width
from r1.roofline import model_of
from r1.storage.kinds import USUAL
from r1.switches.backend import Backend

PRECISIONS = ("none", "fp8", "int8", "int4")
"""How matrices are stored if nobody says how, the most exact first. none: plain, in bf16."""
QUANTS = ("none", *USUAL)
"""All that may be asked for."""
COUNTS = (1, 2, 4, 8, 16, 32)
"""How many GPUs may share a model."""


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
        one = self.gpu.capacity - self.with_slots(sizes, 1).total
        experts = self.config.experts.n_routed_experts // self.backend.ep
        slots = max(0, min(experts, 1 + one // self.expert_bytes))
        while slots > 1 and self.with_slots(sizes, slots).total > self.gpu.capacity:
            slots -= 1  # what the placement keeps beside them
        return slots

    def cached(self) -> int:
        """Experts of each layer that host memory holds, before the files on disk."""
        experts, ram = self.config.experts.n_routed_experts, self.places.ram_bytes
        if ram is None:
            return 1 if self.places.experts == "disk" else experts
        return int(min(experts, ram // (self.expert_bytes * self.backend.tp)))

    def memory(self, sizes: Sizes) -> Footprint:
        """On the device with the largest share, as the loader counts it."""
        return self.with_slots(sizes, self.slots(sizes) if self.streams else 0)

    def with_slots(self, sizes: Sizes, slots: int) -> Footprint:
        """The same with so many slots a layer, where experts lie elsewhere."""
        model = model_of(self.config, self.on_device, False)
        if self.streams:
            weights = _placed(self.config, replace(self.backend, expert_slots=slots))
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
def _placed(config: Config, backend: Backend) -> int:
    """The bytes on the device where experts lie elsewhere, as the loader counts them."""
    model = model_of(config, replace(backend, experts="device", expert_slots=0), False)
    device = torch_device(backend.device)
    return placement_of(config, backend).sizes(model, device)[device.type]


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
