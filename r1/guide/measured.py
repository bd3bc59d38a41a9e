"""Rows that bench.py measured, as predictions need them.

measured.json holds those of the committed results (tools/measure/make_guide.py writes it). A file
of the user's own machine gives more: --calibrate.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from r1 import roofline
from r1.bench.load_result import load
from r1.bench.rates import Rates
from r1.files.config_json import parse_config
from r1.guide.gpus import all_gpus, chip_of
from r1.guide.links import LEAST_STEP_GB, exchange_seconds
from r1.guide.steps import Packed, Read, packed
from r1.model.config import AttentionShape, Config
from r1.switches.backend import Backend

FILE = Path(__file__).parent / "measured.json"
LEAST_NEW = 16
"""Fewer new tokens measure prompts: they are too few for the time of a step."""


@dataclass(frozen=True)
class Measured:
    """One row of a result: what ran, and how long it took."""

    file: str
    """The result's name."""
    machine: str
    model: str
    arm: str
    quant: str
    """The resolved switch: none, fp8, int4, ..."""
    latent: bool
    """Latent attention, not grouped-query attention."""
    ranks: int
    device: str
    captured: bool
    """Steps ran as CUDA graphs."""
    fused: bool
    """Steps ran in hand-written blocks: kernels=triton."""
    prompt_captured: bool
    batch: int
    prompt: int
    new: int
    layers: int
    copy_gb_s: float
    matmul_tflop_s: float
    tpot_ms: float | None
    floor_ms: float
    ttft_ms: float
    prompt_floor_ms: float
    step_gb: float
    packed_gb: float
    """Of these, the bytes of packed weights."""
    packed_giga_elements: float
    """How many numbers these are, in 10^9."""
    kernels: int | None
    """Of one decode step."""
    mean_power_w: float | None = None
    """Over decode steps; None in older results."""
    experts: str = "device"
    """Where routed experts lie: the switch."""
    pp: int = 1
    exchange_ms: float = 0.0
    """What the sums between devices take in a step, by the link's figures."""
    link_gb_s: float | None = None
    """Measured copies from host memory, where experts come from there."""

    @property
    def kind(self) -> tuple[bool, str, bool]:
        """Rows of one kind only say something about each other.

        A CPU or a GPU, where experts lie, and whether stages take turns.
        """
        return self.device == "cpu", self.experts, self.pp > 1

    @property
    def whole(self) -> bool:
        """Whether all weights lie on GPUs that work at the same time: then its parts are known."""
        return self.kind == (False, "device", False)

    @property
    def decodes(self) -> bool:
        """Whether it tells the speed of decode steps. On a GPU, uncaptured ones wait for a host.

        Experts elsewhere, and stages, can't be captured: so that wait is a part of their speed.
        """
        runs = self.captured or not self.whole
        large = self.new >= LEAST_NEW and self.step_gb >= LEAST_STEP_GB
        return bool(self.tpot_ms) and runs and large

    @property
    def read(self) -> Read:
        """What a step reads."""
        numbers = Packed(self.packed_gb * 1e9, self.packed_giga_elements * 1e9)
        copy = self.copy_gb_s * 1e9
        return Read(self.step_gb * 1e9, numbers, copy, self.quant, self.batch)

    @property
    def layer_ms(self) -> float:
        """What a layer takes beside its bytes, or beside the copies that it waits for where experts
        lie elsewhere; and without the sums between devices.
        """
        assert self.tpot_ms
        known = self.read.ms if self.whole else self.floor_ms
        return max(0.0, self.tpot_ms - self.exchange_ms - known) / self.layers

    @property
    def share(self) -> float:
        """The floor's share of a step's time, without the sums between devices."""
        assert self.tpot_ms
        return self.floor_ms / (self.tpot_ms - self.exchange_ms)

    @property
    def prompt_share(self) -> float:
        """The floor's share of the time to the first token."""
        return self.prompt_floor_ms / self.ttft_ms

    @property
    def work(self) -> tuple[Any, ...]:
        """What was to be done, and whether by fused blocks, whatever the other switches were."""
        shared = (self.ranks, self.pp, self.experts)
        return (self.machine, self.model, self.quant, shared, self.batch, self.fused)

    def describe(self) -> str:
        """The row in words."""
        stored = "" if self.quant == "none" else f", {self.quant}"
        stored += "" if self.experts == "device" else f", experts on {self.experts}"
        return (
            f"{self.model}{stored}, batch {self.batch}, prompt {self.prompt}, new {self.new}: "
            f"{self.arm} ({self.machine}, {self.file})"
        )


def rows_of(path: Path) -> list[Measured]:
    """The rows of a result file that pass parity, without speculation. Raises InputError."""
    found = load(path, complete=True)
    config = parse_config(found["config"], f"{path}: config")
    machine, model = found["machine"], str(found["workload"]).split(": batch")[0]
    return [
        _row(path.stem, machine, model, config, row)
        for row in found["rows"]
        if not row["refused"] and row["parity"] and row["acceptance"] is None
    ]


def _row(
    file: str, machine: dict[str, Any], model: str, config: Config, row: dict[str, Any]
) -> Measured:
    known = {name: value for name, value in row["backend"].items() if hasattr(Backend, name)}
    backend = Backend(**known)
    copy = machine["copy_gb_s"]
    matmul = machine["matmul_tflop_s"].get(backend.compute) or max(
        machine["matmul_tflop_s"].values()
    )
    rates = Rates(copy * 1e9, matmul * 1e12, 0.0, 0.0)
    read = packed(config, backend, row["experts_hit"])
    prompt = prompt_work(config, backend, row["batch"], row["prompt"], row["depth"])
    return Measured(
        file,
        machine["name"],
        model,
        row["arm"],
        "none" if backend.quant == "auto" else backend.quant,
        isinstance(config.attention, AttentionShape),
        backend.ranks,
        backend.device,
        backend.cuda_graphs,
        backend.kernels == "triton",
        backend.prefill_graphs,
        row["batch"],
        row["prompt"],
        row["new"],
        config.num_hidden_layers,
        round(copy, 1),
        round(matmul, 1),
        row["tpot_ms"],
        row["floor_ms"],
        _ttft_ms(row),
        round(max(1e3 * rates.seconds(prompt), _prompt_link_ms(row)), 4),
        row["step_gb"],
        round(read.nbytes / 1e9, 5),
        round(read.elements / 1e9, 5),
        row["kernels"],
        row["mean_power_w"],
        backend.experts,
        backend.pp,
        _exchange_ms(config, backend, machine["name"], row["batch"]),
        _link_gb_s(row),
    )


def _ttft_ms(row: dict[str, Any]) -> float:
    """The lower median: the mean of two repetitions is useless if the host paused in one."""
    return 1e3 * statistics.median_low(each["ttft"] for each in row["repetitions"])


def _prompt_link_ms(row: dict[str, Any]) -> float:
    """A prompt's copies at the link's rate."""
    return (row.get("prompt_link_share") or 0.0) * float(row["ttft_ms"])


def _link_gb_s(row: dict[str, Any]) -> float | None:
    """The link's measured rate, of which a step's copies reached a share."""
    share, mega = row.get("link_share"), row.get("link_mb")
    return round(mega / row["tpot_ms"] / share, 2) if share and mega else None


def _exchange_ms(config: Config, backend: Backend, machine: str, rows: int) -> float:
    """Of a decode step; 0 where no link of that machine is known, for then its share has it."""
    gpu = next((each for each in all_gpus().values() if each.machine == machine), None)
    seconds = gpu and exchange_seconds(config, backend, gpu, rows)
    return round(1e3 * (seconds or 0.0), 4)


def prompt_work(
    config: Config, backend: Backend, rows: int, prompt: int, depth: int = 0
) -> roofline.Work:
    """The work of reading prompts, if each token chooses its experts uniformly."""
    hit = roofline.expected_experts(config, rows * prompt)
    return roofline.step_work(config, backend, rows, prompt, depth, hit)


def best(rows: Iterable[Measured]) -> list[Measured]:
    """Of the rows that tell a step's speed, the fastest for each work."""
    fastest: dict[Any, Measured] = {}
    for row in rows:
        if row.decodes:
            kept = fastest.get(row.work)
            if kept is None or (row.tpot_ms or 0) < (kept.tpot_ms or 0):
                fastest[row.work] = row
    return list(fastest.values())


def best_prompts(rows: Iterable[Measured]) -> list[Measured]:
    """The fastest for each work and length of prompt, of those that were not captured.

    Most wait for the host, whose speed belongs to no GPU: machines with the same processors count
    as one.
    """
    fastest: dict[Any, Measured] = {}
    for row in rows:
        if not row.prompt_captured and row.step_gb >= LEAST_STEP_GB:
            key = (chip_of(row.machine), *row.work[1:], row.prompt)
            if key not in fastest or row.ttft_ms < fastest[key].ttft_ms:
                fastest[key] = row
    return list(fastest.values())


@cache
def committed() -> tuple[Measured, ...]:
    """Those of the committed results."""
    return tuple(Measured(**each) for each in json.loads(FILE.read_text(encoding="utf-8")))


def dump(rows: Iterable[Measured]) -> str:
    """Rows as the file's text."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    return f"[\n{lines}\n]\n"
