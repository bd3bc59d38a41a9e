"""Rows of a result, from made-up answers of the processes that measure."""

from __future__ import annotations

from typing import Any

from r1.bench.arms import Arm
from r1.bench.report.rows import row as make_row
from r1.bench.report.speedup import set_speedups
from r1.bench.workload import Workload
from r1.model.shapes import shape
from r1.switches.backend import Backend
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

WORK = Workload(None, "tiny", None, 1, 8, 4, 0, 0)


def findings(
    tpots: list[float], *, passes: bool = True, beside: list[float] | None = None
) -> dict[str, Any]:
    """A worker's answers for repetitions of four tokens with these TPOTs, in seconds.

    `beside`: the baseline's TPOTs in turn with them.
    """

    def repetition(tpot: float) -> dict[str, Any]:
        return {
            "ttft": 0.1, "total": 0.1 + 3 * tpot, "gaps": [tpot] * 3, "tokens": 4, "turns": 3,
            "accepted": 0, "memory": {"allocated": None, "reserved": None, "host": 10**9},
        }  # fmt: skip

    kl = {
        "passes": passes, "mean_kl": 1e-9, "median_kl": 1e-9, "max_logit_difference": 1e-6,
        "top1_agreement": 1.0, "positions": 4, "bound": 1e-6, "mean_bound": 1e-4, "excess": 0.5,
        "outliers": 0 if passes else 3, "outliers_bound": 2, "same_text": 1.0,
        "wrong_tokens": None,
    }  # fmt: skip
    machine = Machine(name="a CPU", memory=10**10)
    backend = resolve(Backend(device="cpu", compile=True), shape("tiny"), machine)
    return {
        "build": {"load_seconds": 1.0, "backend": vars(backend)}, "warm": {"start_seconds": 2.0},
        "cold": 10.0, "parity": kl, "kernels": {"count": None, "parts": None, "exchange_us": None},
        "moe_layer": {"seconds": 5e-4}, "measure": [repetition(tpot) for tpot in tpots],
        "beside": [repetition(tpot) for tpot in beside or []],
    }  # fmt: skip


REFERENCE: dict[str, Any] = {
    "reference": {"experts_hit": 4.0},
    "rates": {"fp32": {"copy": 1e10, "matmul": 1e11, "launch": 0.0, "replay": 0.0}},
}


def arm_row(name: str, tpots: list[float], **how: Any) -> dict[str, Any]:
    """A row of repetitions with these TPOTs, in seconds; "baseline" or a switch alone."""
    kind = "baseline" if name == "baseline" else "alone"
    answers = findings(tpots, **how)
    return make_row(Arm(name, kind, Backend()), WORK, answers, REFERENCE, shape("tiny"))


def made_row(*, passes: bool = True, beside: float = 0.04) -> dict[str, Any]:
    """A row of 20 ms a token; `beside`: the baseline's, in seconds."""
    return arm_row("compile", [0.02] * 3, passes=passes, beside=[beside] * 3)


def beside_baseline(row: dict[str, Any], tpot: float = 0.04) -> dict[str, Any]:
    """The row with its speed-up over a baseline of this TPOT, in seconds."""
    set_speedups([arm_row("baseline", [tpot] * 3), row])
    return row
