"""The machines that the guide knows: published figures, each with a source and a date (gpus.json).

A figure without a source is not there, and what needs it is not computed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from r1.errors import InputError
from r1.switches.machine import Machine

FILE = Path(__file__).parent / "gpus.json"
FIGURES = {
    "memory_gb": "memory of one GPU, in 10^9 bytes",
    "bandwidth_gb_s": "of its memory, as the maker says it",
    "bf16_tflop_s": "matrix products, dense, with fp32 sums",
    "fp8_tflop_s": "the same for FP8",
    "int8_top_s": "the same for INT8",
    "board_w": "the most power that the board takes",
    "link_both_ways_gb_s": "between GPUs of one host, both directions together",
    "link_latency_us": "of one small all-reduce between GPUs of one host, by NCCL",
    "link_kernel_latency_us": "the same by --allreduce triton",
    "host_link_gb_s": "from host memory to one GPU: 16 lanes of PCIe 4.0 move 32 GB/s, of 5.0 64",
    "host_copy_gb_s": "measured copies over that link",
    "purchase_usd": "price of one",
    "rent_usd_per_hour": "price of an hour of one",
}
"""The figures that a machine may have, and what they mean."""
MEASURED = "h100"
"""The machine whose measured links stand in where another has none: the share of its host link that
copies reach, and the latency of a sum."""
IN_HOST = 8
"""So many GPUs are in one host, if they are not computers themselves."""


@dataclass(frozen=True)
class Source:
    """Where a figure stands, and when it was published; "read DATE" where no date was given."""

    url: str
    date: str
    note: str = ""


@dataclass(frozen=True, eq=False)
class Gpu:
    """One kind of machine."""

    name: str
    title: str
    device: str
    """The switch `device` that r1 runs with on it."""
    figures: dict[str, float]
    sources: dict[str, Source]
    """By the name of the figure."""
    machine: str | None = None
    """The name that torch has for it, and so bench.py's result files."""
    capability: tuple[int, int] = (0, 0)
    arch: str = ""
    computer: bool = False
    """A whole computer, whose processors share its memory: there is no other memory beside it."""

    linked: int = IN_HOST
    """So many of them has a direct link between each other; the A40's joins two."""

    @property
    def most_in_host(self) -> int:
        """How many of them work in one host."""
        return 1 if self.computer else IN_HOST

    def get(self, figure: str) -> float | None:
        """A figure; None if there is no source for it."""
        assert figure in FIGURES
        return self.figures.get(figure)

    @property
    def capacity(self) -> int:
        """Bytes that a model may use.

        A card of N GB has N GiB, which is 7% more than N x 10^9 bytes. That rest is left to the
        driver, to the context of each process and to gaps between blocks.
        """
        return int(self.figures["memory_gb"] * 1e9)

    def as_machine(self) -> Machine:
        """What this machine can do, for the switches."""
        if self.device == "cpu":
            return Machine(name=self.title, memory=self.capacity)
        hip = "7" if self.device == "rocm" else None
        return Machine(
            True, hip, name=self.title, capability=self.capability, arch=self.arch,
            memory=self.capacity,
        )  # fmt: skip


@cache
def read() -> dict[str, Any]:
    """The file's content."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


@cache
def source(name: str) -> Source:
    """A source by its name in the file."""
    return Source(**read()["sources"][name])


@cache
def all_gpus() -> dict[str, Gpu]:
    """Every machine, by the name that --gpu takes."""
    gpus = {}
    for name, given in read()["gpus"].items():
        figures = {key: value for key, value in given.items() if key in FIGURES}
        gpus[name] = Gpu(
            name,
            given["title"],
            given["device"],
            {key: float(value) for key, (value, _) in figures.items()},
            {key: source(origin) for key, (_, origin) in figures.items()},
            given.get("machine"),
            tuple(given.get("capability", (0, 0))),
            given.get("arch", ""),
            given.get("computer", False),
            given.get("linked", IN_HOST),
        )
    return gpus


def gpu(name: str) -> Gpu:
    """The machine of this name, as in 4090, H100 or "RTX 4090". Raises InputError."""
    asked = name.lower().replace(" ", "").removeprefix("rtx").removeprefix("rx")
    if asked not in all_gpus():
        raise InputError(f"--gpu {name}: give all, or one of {', '.join(all_gpus())}")
    return all_gpus()[asked]


def chip_of(machine: str | None) -> object:
    """What a machine's processors are: an H200's are an H100's."""
    known = (gpu for gpu in all_gpus().values() if gpu.machine == machine and machine)
    return next(((gpu.device, gpu.capability) for gpu in known), machine)


def electricity() -> tuple[float, Source]:
    """The price of a kilowatt-hour in US dollars."""
    value, origin = read()["electricity"]["usd_per_kwh"]
    return float(value), source(origin)


def drive() -> tuple[float, Source]:
    """GB a second that a fast drive reads."""
    value, origin = read()["drive"]["read_gb_s"]
    return float(value), source(origin)
