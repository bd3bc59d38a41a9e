"""What a row says, number by number: from repetitions that are all different, by definition.

Holds r1/bench/report/rows.py, speedup.py and limits.py, and r1/bench/worker/timing.py to account.
test_bench.py has what becomes of rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from models import TINY

from r1.bench.arms import Arm
from r1.bench.report.rows import pair, row
from r1.bench.report.speedup import set_speedups
from r1.bench.worker import timing
from r1.bench.worker.subject import Subject
from r1.bench.workload import Workload
from r1.roofline import expected_experts, step_work
from r1.switches.backend import Backend
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

ARM = Arm("it", "alone", Backend())
WORK = Workload(None, "tiny", None, batch=2, prompt=6, new=5, depth=0, seed=0)
GAPS = ([0.07, 0.13, 0.09, 0.11], [0.05, 0.35, 0.21, 0.19], [1.7, 0.12, 0.1, 0.08])
TTFT = (0.2, 0.9, 0.4)
BASELINE = (0.4, 0.19, 1.0)
"""The baseline's seconds per token, in turn with the arm's 0.1, 0.2 and 0.5."""
PARITY = {
    "passes": True, "mean_kl": 1e-9, "median_kl": 2e-9, "max_logit_difference": 1e-6,
    "top1_agreement": 1.0, "positions": 4, "bound": 1e-6, "mean_bound": 1e-4, "excess": 0.5,
    "outliers": 1, "outliers_bound": 2, "same_text": 1.0, "wrong_tokens": 0,
}  # fmt: skip
COPY, MATMUL = 1e10, 1e13
REFERENCE = {
    "reference": {"experts_hit": 4.0},
    "rates": {"fp32": {"copy": COPY, "matmul": MATMUL, "launch": 0.0, "replay": 0.0}},
}


def backend(**switches: Any) -> Backend:
    return resolve(Backend(device="cpu", **switches), TINY, Machine())


def repetition(ttft: float, gaps: list[float], number: int, **more: Any) -> dict[str, Any]:
    memory = {"allocated": number * 10**9, "reserved": number * 2 * 10**9, "host": number * 10**8}
    return {
        "ttft": ttft, "total": ttft + sum(gaps), "gaps": gaps, "tokens": 5, "turns": 8,
        "accepted": 0, "memory": memory, "sm_mhz": 1000 * number, "power_w": 100 * number, **more,
    }  # fmt: skip


def answers(arm: Backend | None = None, **more: Any) -> dict[str, Any]:
    """Three repetitions: each with another time, memory, clock and power."""
    each = zip(TTFT, GAPS, (1, 3, 2), strict=True)
    return {
        "build": {"load_seconds": 1.0, "backend": vars(arm or backend())}, "cold": None,
        "warm": {"start_seconds": 6.0}, "parity": PARITY,
        "kernels": {"count": None, "parts": None, "exchange_us": None},
        "moe_layer": {"seconds": 5e-4}, "measure": [repetition(*it) for it in each],
        "beside": [{"ttft": 0.3, "total": 0.3 + 4 * tpot, "tokens": 5} for tpot in BASELINE],
    } | more  # fmt: skip


def made(found: dict[str, Any], work: Workload = WORK) -> dict[str, Any]:
    return row(ARM, work, found, REFERENCE, TINY)


def test_times_and_rates() -> None:
    """Two rows of 6 prompt tokens and 5 new ones."""
    found = made(answers())
    wanted = dict(ttft_ms=400, tpot_ms=200, decode_tok_s=2 / 0.2, prefill_tok_s=2 * 6 / 0.4)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    together = [gap for gaps in GAPS for gap in gaps]
    assert found["tpot_p90_ms"] == 1e3 * numpy.percentile(together, 90, method="lower")
    assert [each["ttft"] for each in found["repetitions"]] == list(TTFT)
    assert found["moe_layer_us"] == pytest.approx(500)


def test_one_new_token_has_no_time_per_token() -> None:
    once = [repetition(ttft, [], 1, tokens=1) for ttft in TTFT]
    found = made(answers(measure=once))
    names = ("tpot_p90_ms", "decode_tok_s", "mbu", "speedup")
    assert [found[name] for name in names] == [None] * 4 and found["tpot_ms"] == 0


def compared(found: dict[str, Any], baseline: tuple[float, ...] = BASELINE) -> dict[str, Any]:
    """The row, beside that of a baseline with these seconds per token in the whole run."""
    arm, base = made(found), made(answers()) | {"kind": "baseline"}
    base["tpot_ms"] = 1e3 * median(baseline)
    set_speedups([arm, base])
    return arm


@pytest.mark.parametrize("cold", [None, 10.0])
def test_speedup_and_break_even(cold: float | None) -> None:
    """Ratios 4, 0.95 and 2; 0.4 - 0.2 seconds a token are saved, and the start takes 6 or 10."""
    found = answers(backend(compile=True), cold=cold)
    names = ("speedup", "speedup_low", "speedup_high", "within_noise", "beside_ms")
    noise = compared(found)
    assert [noise[name] for name in names] == pytest.approx([2, 0.95, 4, True, 400])
    assert noise["break_even_tokens"] is None, "noise pays nothing"
    for beside in found["beside"]:
        beside["total"] += 0.4  # 0.1 seconds more for each of 4 tokens: ratios 5, 1.45 and 2.2
    clear = compared(found)
    assert [clear[name] for name in names] == pytest.approx([2, 1.45, 5, False, 500])
    assert clear["break_even_tokens"] == (30 if cold is None else 50)
    start = (clear["start_cold_s"], clear["start_warm_s"])
    assert start == ((6, None) if cold is None else (10, 6))


@pytest.mark.parametrize(
    ("ratios", "noise"), [((2, 3, 4), False), ((0.5, 0.6, 0.7), False), ((0.5, 2, 3), True)]
)
def test_noise_is_on_both_sides_of_1(ratios: tuple[float, ...], noise: bool) -> None:
    found = answers()
    for beside, own, ratio in zip(found["beside"], found["measure"], ratios, strict=True):
        beside["total"] = beside["ttft"] + ratio * (own["total"] - own["ttft"])
    tpots = tuple((beside["total"] - beside["ttft"]) / 4 for beside in found["beside"])
    assert compared(found, tpots)["within_noise"] is noise


@pytest.mark.parametrize("switch", ["compile", "cuda_graphs", "prefill_graphs", None])
def test_only_what_is_compiled_or_captured_has_a_start(switch: str | None) -> None:
    switched: dict[str, Any] = {switch: True} if switch else {}
    arm = dataclasses.replace(backend(), **switched)
    assert made(answers(arm))["start_cold_s"] == (6 if switch else None)


def test_peaks_and_clocks_are_the_last_repetitions() -> None:
    found = made(answers())
    names = ("allocated_gb", "reserved_gb", "host_gb", "sm_mhz", "power_w")
    assert [found[name] for name in names] == pytest.approx([2, 4, 0.2, 2000, 200])


def test_a_pair_says_its_mean_kl() -> None:
    assert pair(ARM, WORK, {"parity": PARITY})["mean_kl"] == PARITY["mean_kl"]


# --------------------------------------------------------------------------------- the limits
def test_shares_of_the_limits() -> None:
    """A step's bytes over its time, a prompt's operations over its time, the least time itself."""
    found, arm = made(answers()), backend()
    nbytes = step_work(TINY, arm, 2, 1, 6 + 5 / 2, 4.0).nbytes
    prompt = step_work(TINY, arm, 2, 6, 0, 0).flops
    wanted = {
        "step_gb": nbytes / 1e9, "floor_ms": 1e3 * nbytes / COPY, "mbu": nbytes / 0.2 / COPY,
        "mfu_prefill": prompt / 0.4 / MATMUL,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)


def test_the_depth_is_read_by_steps_and_prompts() -> None:
    deep = made(answers(), dataclasses.replace(WORK, depth=100))
    shape, flat = TINY.attention, made(answers())
    entries = 2 * 100 * TINY.num_hidden_layers * shape.latent_dim * 4
    assert deep["step_gb"] - flat["step_gb"] == pytest.approx(entries / 1e9)
    assert deep["mfu_prefill"] > flat["mfu_prefill"]


def test_a_dense_model_has_no_floor_of_a_moe_layer() -> None:
    reference = REFERENCE | {"reference": {"experts_hit": 0.0}}
    found = row(ARM, WORK, answers(moe_layer={"seconds": None}), reference, TINY)
    assert found["moe_layer_us"] is found["moe_layer_floor_us"] is None


def test_turns_of_speculation() -> None:
    """Two drafts a turn: 24 turns in all, which accepted 4 + 6 + 8; 4 tokens in 2, 4 or 1 steps."""
    work = dataclasses.replace(WORK, assumed=0.5)
    arm = backend(speculate="mtp", draft_tokens=2)
    gaps = ([0.2, 0.2], [0.2] * 4, [2.0])
    measure = [
        repetition(ttft, each, 1, accepted=accepted)
        for ttft, each, accepted in zip(TTFT, gaps, (4, 6, 8), strict=True)
    ]
    found = made(answers(arm, measure=measure), work)
    assert found["acceptance"] == pytest.approx(18 / 24 / 2) and found["assumed"] == 0.5
    assert found["tokens_per_step"] == pytest.approx(1 + 18 / 24)
    seconds, nbytes = median((0.2, 0.2, 2.0)), found["step_gb"] * 1e9
    assert found["mbu"] == pytest.approx(nbytes / seconds / COPY)
    assert found["floor_ms"] == pytest.approx(1e3 * nbytes / COPY * median((2 / 4, 4 / 4, 1 / 4)))
    verified = step_work(TINY, arm, 2, 3, 6 + 5 / 2, 4.0, verify=True).nbytes
    assert nbytes > verified, "a turn reads the drafter too"
    plain = step_work(TINY, arm, 2, 1, 6 + 5 / 2, expected_experts(TINY, 2)).nbytes
    assert found["predicted_speedup"] == pytest.approx((1 + 18 / 24) * plain / nbytes)


# --------------------------------------------------------------------------------- the clock
class Clock:
    """Time that the test decides: each call of `time.perf_counter` gives the next of `times`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: Any) -> None:
        following = iter(times)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: next(following))


def subject_of(written: list[list[list[int]]], new: int) -> Any:
    """A subject that writes these steps, by step and row."""
    return SimpleNamespace(
        workload=dataclasses.replace(WORK, new=new),
        engine=SimpleNamespace(steps=lambda *_: iter(written), model=torch.nn.Module()),
        fill=lambda: None, device=SimpleNamespace(type="cpu"), prompts=[], cache=None, text=[],
    )  # fmt: skip


def test_what_a_repetition_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, 5 new tokens each; the first has them after 2 of 3 turns, the second after 3.

    A turn after a row's last token does not count, nor do tokens after the 5th.
    """
    written = [[[1], [2]], [[3, 4], [5]], [[6, 7], [9, 9]], [[0, 0], [7, 7]]]
    subject = subject_of(written, 5)
    Clock(monkeypatch, [100.0, 100.5, 100.75, 101.75, 103.75])
    found = timing.measure(subject)
    assert (found["ttft"], found["total"], found["gaps"]) == (0.5, 3.75, [0.25, 1.0, 2.0])
    assert found["second_token"] == 0.25 and found["tokens"] == 5
    assert (found["turns"], found["accepted"]) == (2 + 3, (1 + 1) + (0 + 1 + 1))
    assert subject.text == [[1, 3, 4, 6, 7], [2, 5, 9, 9, 7]]
    assert found["memory"]["allocated"] is None and found["memory"]["host"] > 10**8


def test_the_start_is_what_the_first_run_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the prompt and in the first decode step; never less than nothing."""
    cases = (((5.0, 3.0), (1.0, 1.0), 6.0), ((5.0, 1.0), (1.0, 2.0), 4.0), ((1, 1), (2, 2), 0.0))
    for *runs, wanted in cases:
        following = iter(dict(zip(("ttft", "second_token"), run, strict=True)) for run in runs)
        monkeypatch.setattr(timing, "repetition", lambda _, runs=following: (next(runs), []))
        assert timing.warm(subject_of([], 5)) == {"start_seconds": wanted}


def test_the_time_of_a_moe_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Seven rounds of 8 calls of all MoE layers; the first two rounds are warm-up."""
    calls: list[list[int]] = []
    monkeypatch.setattr(timing.steps, "moe_chain", lambda _, layers: lambda: calls.append(layers))
    rounds = [90.0, 80.0, 8.0, 8.8, 7.2, 9.6, 40.0]
    Clock(monkeypatch, itertools.chain.from_iterable((0.0, seconds) for seconds in rounds))
    subject: Any = Subject(Backend(device="cpu"), WORK, tmp_path)
    subject.engine = SimpleNamespace(
        config=TINY,
        backend=subject.backend,
        model=SimpleNamespace(first_layer=0, layers=range(TINY.num_hidden_layers)),
        runner=SimpleNamespace(device=SimpleNamespace(type="cpu")),
    )
    sparse = TINY.num_hidden_layers - TINY.experts.first_k_dense_replace
    assert timing.moe_layer(subject)["seconds"] == pytest.approx(8.8 / 8 / sparse)
    assert len(calls) == 7 * 8 and {len(layers) for layers in calls} == {sparse}
