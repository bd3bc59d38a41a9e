"""An arm's answers -> its row. The fields are in fields.py."""

from __future__ import annotations

import os
import statistics
from typing import Any

from r1.bench import exchange
from r1.bench.arms import FILES, Arm
from r1.bench.process import Answer
from r1.bench.report.fields import FIELDS
from r1.bench.report.interval import interval
from r1.bench.report.limits import against_limits, speculation
from r1.bench.report.speedup import beside
from r1.bench.workload import Workload
from r1.model.config import Config
from r1.switches.backend import Backend

MOST_TTFT_S, MOST_TPOT_S = 1.5, 0.015
"""MLPerf Inference's limits for DeepSeek-R1, interactive."""


def row(
    arm: Arm, workload: Workload, answers: Answer, reference: Answer, config: Config
) -> dict[str, Any]:
    """One arm's row. `answers` and `reference` are answers of the two processes, by command.

    Its speed-up is set later, by `set_speedups`: it needs the baseline's row.
    """
    identity = {"arm": arm.name, "kind": arm.kind, "model": workload.name, **workload.sizes}
    if "refused" in answers:
        crashed = answers.get("crashed", False)
        return identity | {"refused": answers["refused"], "crashed": crashed}
    built = answers["build"]
    backend = Backend(**built["backend"])
    repetitions = answers["measure"]
    if workload.assumed is not None and backend.speculate != "off":
        identity["arm"] = f"{arm.name} (acceptance of {workload.assumed:g} assumed)"
    kernels, moe_layer = answers["kernels"], answers["moe_layer"]["seconds"]
    fields = {
        **identity,
        "refused": None,
        "crashed": False,
        **_times(workload, repetitions),
        **speculation(workload, backend, config, built, repetitions),
        **against_limits(
            workload, backend, config, reference, built, kernels["count"], repetitions
        ),
        "kernel_times": kernels["parts"],
        **exchange.fields(workload, config, backend, kernels),
        "moe_layer_us": moe_layer and 1e6 * moe_layer,
        **_memory(repetitions[-1]["memory"]),
        **_start_up(answers, backend),
        **_numerics(answers),
        "load_s": built["load_seconds"],
        "sm_mhz": repetitions[-1].get("sm_mhz"),
        "power_w": repetitions[-1].get("power_w"),
        **answers.get("energy", {}),
        "backend": built["backend"]
        | {f: os.path.basename(built["backend"].get(f, "")) for f in FILES},
        "repetitions": [{"ttft": r["ttft"], "total": r["total"]} for r in repetitions],
        **_beside(answers),
    }
    return {name: fields.get(name) for name in FIELDS}


def _times(workload: Workload, repetitions: list[Answer]) -> dict[str, Any]:
    """Latency and throughput."""
    tpot = statistics.median(_tpot(r) for r in repetitions)
    ttft = statistics.median(r["ttft"] for r in repetitions)
    gaps = sorted(gap for r in repetitions for gap in r["gaps"])
    low, high = interval([r["gaps"] for r in repetitions], workload.new - 1)
    return {
        "ttft_ms": 1e3 * ttft,
        "tpot_ms": 1e3 * tpot,
        "tpot_p90_ms": 1e3 * gaps[int(0.9 * (len(gaps) - 1))] if gaps else None,
        "tpot_p99_ms": 1e3 * gaps[int(0.99 * (len(gaps) - 1))] if gaps else None,
        "tpot_low_ms": low and 1e3 * low,
        "tpot_high_ms": high and 1e3 * high,
        "interactive": (ttft <= MOST_TTFT_S and tpot <= MOST_TPOT_S) if gaps else None,
        "decode_tok_s": workload.batch / tpot if tpot else None,
        "prefill_tok_s": workload.batch * workload.prompt / ttft,
    }


def _memory(memory: dict[str, Any]) -> dict[str, Any]:
    """Peaks in GB. None, on a CPU, stays None."""
    return {
        "allocated_gb": memory["allocated"] and memory["allocated"] / 1e9,
        "reserved_gb": memory["reserved"] and memory["reserved"] / 1e9,
        "host_gb": memory["host"] / 1e9,
    }


def _start_up(answers: Answer, backend: Backend) -> dict[str, Any]:
    """Seconds of compilation and capture."""
    cold, last = answers["cold"], answers["warm"]["start_seconds"]
    if cold is not None:  # started twice: with a cold cache, then with a warm one
        return {"start_cold_s": cold, "start_warm_s": last}
    starts = backend.compile or backend.cuda_graphs or backend.prefill_graphs
    return {"start_cold_s": last if starts else None, "start_warm_s": None}


def _numerics(answers: Answer) -> dict[str, Any]:
    """Distance from the reference, and right answers."""
    parity, accuracy = answers["parity"], answers.get("accuracy", {})
    cost = parity.get("quantizing")
    return {
        "parity": parity["passes"],
        "kl_bound": parity["bound"],
        "mean_kl_bound": parity["mean_bound"],
        "median_kl": parity["median_kl"],
        "mean_kl": parity["mean_kl"],
        "excess": parity["excess"],
        "outliers": parity["outliers"],
        "outliers_bound": parity["outliers_bound"],
        "max_logit_diff": parity["max_logit_difference"],
        "top1": parity["top1_agreement"],
        "positions": parity["positions"],
        "quant_kl": cost and cost["mean_kl"],
        "quant_top1": cost and cost["top1_agreement"],
        "same_text": parity["same_text"],
        "wrong_tokens": parity["wrong_tokens"],
        "accuracy": accuracy.get("share"),
        "problems": accuracy.get("problems"),
    }


def _beside(answers: Answer) -> dict[str, Any]:
    """What the baseline's repetitions that ran in turn with these say, if the arm passes parity."""
    ours, theirs = ([_tpot(r) for r in answers[name]] for name in ("measure", "beside"))
    if not theirs or not answers["parity"]["passes"] or not min(ours):
        return {}
    return beside(ours, theirs)


def pair(arm: Arm, workload: Workload, answers: Answer) -> dict[str, Any]:
    """Two switches together: do they pass parity, or why can't they run?"""
    fields = {
        "pair": arm.name,
        **workload.sizes,
        "refused": answers.get("refused"),
        "crashed": answers.get("crashed", False),
    }
    if "parity" in answers:
        parity = answers["parity"]
        fields |= {"parity": parity["passes"], "mean_kl": parity["mean_kl"]}
    return fields


def _tpot(repetition: Answer) -> float:
    """Seconds per output token after the first, or 0 if there is only one."""
    more = repetition["tokens"] - 1
    return (repetition["total"] - repetition["ttft"]) / more if more else 0.0
