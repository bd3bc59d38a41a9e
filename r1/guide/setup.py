"""A model on some machines: the switches that suit them, the layout, and its memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from r1.errors import InputError
from r1.files.config_json import load_config
from r1.footprint import Footprint, Sizes, footprint, module_bytes
from r1.guide.gpus import Gpu
from r1.model.config import Config
from r1.model.shapes import SHAPES
from r1.model.transformer import Transformer
from r1.placement import cuts
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
HOST = 8
"""So many GPUs are in one host."""
FASTEST: tuple[dict[str, Any], ...] = (
    {"kernels": "triton", "prefill_moe": "triton"},
    {"attention": "triton", "moe": "triton", "prefill_moe": "triton"},
    {},
)
"""Switches for GPUs, the fastest first. All capture their steps."""


@dataclass(frozen=True)
class Setup:
    """A model, how it is stored, and the machines that hold it."""

    name: str
    config: Config
    gpu: Gpu
    backend: Backend
    """Resolved for this machine."""

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
        ways = {"tp": "TP", "ep": "EP"}
        parts = [f"{word} {n}" for name, word in ways.items() if (n := _of(self.backend, name)) > 1]
        return " x ".join(parts) or "one device"

    def memory(self, sizes: Sizes) -> Footprint:
        """On the device with the largest share, as the loader counts it."""
        model = model_of(self.config, self.backend, False)
        return footprint(model, self.backend, sizes, _weights(model))

    def fits(self, sizes: Sizes) -> bool:
        """Whether the memory is enough."""
        return self.memory(sizes).total <= self.gpu.capacity


def _of(backend: Backend, name: str) -> int:
    return int(getattr(backend, name))


@cache
def _weights(model: Transformer) -> int:
    """The model's bytes, counted once: sketches are kept."""
    return module_bytes(model)


def find_model(name: str) -> tuple[str, Config]:
    """A named shape, a folder with config.json, or that file. Raises InputError."""
    if name in SHAPES:
        return name, SHAPES[name]
    path = Path(name)
    if path.name == "config.json":
        path = path.parent
    if not path.exists():
        shapes = ", ".join(SHAPES)
        raise InputError(f"--model {name} is no folder: give one, or a shape: {shapes}")
    return path.resolve().name, load_config(path)


def precisions(config: Config, gpu: Gpu) -> list[str]:
    """The ways to store a model that this machine computes with, the most exact first.

    What is published as FP8 gains nothing by plain numbers.
    """
    kind = config.files.kind or ("fp8" if config.files.fp8_block else None)
    found = PRECISIONS[PRECISIONS.index(kind) :] if kind in PRECISIONS else PRECISIONS
    return [each for each in found if computes(gpu, each)]


def computes(gpu: Gpu, quant: str) -> bool:
    """Whether this machine multiplies by matrices that are stored so."""
    return quant != "fp8" or gpu.as_machine().why_not("fp8") is None


def setups(name: str, config: Config, gpu: Gpu, quant: str, count: int) -> Iterator[Setup]:
    """Every layout of a model on `count` machines of a kind, stored as `quant` says."""
    for tp in (2**n for n in range(count.bit_length()) if count % 2**n == 0):
        ep = count // tp
        if ep > 1 and (config.experts.n_routed_experts == 0 or gpu.device == "cpu"):
            continue
        if cuts.why_not(config, tp, ep):
            continue
        if backend := switches(config, gpu, quant, tp, ep):
            yield Setup(name, config, gpu, backend)


@cache
def switches(config: Config, gpu: Gpu, quant: str, tp: int, ep: int) -> Backend | None:
    """The switches to expect of somebody who wants speed; None where the storage can't be cut."""
    machine = gpu.as_machine()
    common: dict[str, Any] = {"dtype": "bf16", "quant": quant, "tp": tp, "ep": ep}
    if not machine.cuda:
        return resolve(Backend(device="cpu", **common), config, machine)
    for fast in FASTEST:
        sparse = config.experts.n_routed_experts > 0
        more = {name: value for name, value in fast.items() if sparse or "moe" not in name}
        try:
            backend = resolve(Backend(cuda_graphs=True, **common, **more), config, machine)
            model_of(config, backend, False)  # raises where the storage can't be cut so
            return backend
        except InputError:  # the next ones ask for less
            continue
    return None
