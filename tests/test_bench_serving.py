"""What serving benchmarks print: p99, intervals, energy, acceptance by place, a block for an issue.

Holds to account: r1/bench/report (interval, issue, limits, rows), r1/bench/worker/energy.py.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_rows import WORK, arm_row, made_row

import bench
from r1.bench.load_result import load
from r1.bench.report.interval import interval
from r1.bench.report.issue import SHOWN
from r1.bench.report.limits import by_place
from r1.bench.report.table import COLUMNS
from r1.bench.report.text import drafts
from r1.bench.worker import energy as worker
from r1.bench.worker.subject import Subject
from r1.bench.worker.timing import _turns
from r1.switches.backend import Backend

RESULTS = Path(__file__).parents[1] / "tools" / "measure" / "results" / "h100"


# ---------------------------- an interval
def test_an_interval_holds_the_mean_and_narrows() -> None:
    """More repetitions, a narrower interval; without spread it is a point."""
    draws = random.Random(0)

    def measured(repetitions: int) -> list[list[float]]:
        return [[draws.gauss(2.0, 0.1) for _ in range(50)] for _ in range(repetitions)]

    few, many = interval(measured(3), 50), interval(measured(60), 50)
    assert few[0] and few[1] and many[0] and many[1]
    assert few[0] < 2.0 < few[1] and many[0] < 2.0 < many[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 2
    assert interval([[0.5] * 4] * 2, 4) == (0.5, 0.5)


def test_repetitions_that_differ_widen_it() -> None:
    """However many steps each has: steps of one repetition are no independent measurements."""
    low, high = interval([[1.0] * 500, [2.0] * 500, [1.5] * 500], 500)
    assert low == 1.0 and high == 2.0


@pytest.mark.parametrize("given", [([[1.0]], 1), ([[1.0, 2.0], [1.0]], 2), ([[], []], 0)])
def test_there_is_none(given: Any) -> None:
    """Of one repetition, of speculation (other numbers of steps), of one token."""
    assert interval(*given) == (None, None)


def test_a_row_has_it() -> None:
    row = arm_row("compile", [0.02, 0.03])
    assert row["tpot_low_ms"] == pytest.approx(20) and row["tpot_high_ms"] == pytest.approx(30)
    assert row["tpot_p99_ms"] == pytest.approx(30) and row["tpot_p90_ms"] == pytest.approx(30)
    assert COLUMNS["95% interval ms"].cell(row) == "20.0-30.0"
    assert COLUMNS["95% interval ms"].cell(arm_row("compile", [0.02])) == ""


def test_the_interactive_limits() -> None:
    """15 ms a token: 20 ms are too slow, 10 are not; 100 ms to the first token are fine."""
    assert made_row()["interactive"] is False and arm_row("x", [0.010])["interactive"] is True
    assert [COLUMNS["interactive?"].cell(r) for r in (made_row(), arm_row("x", [0.01]))] == [
        "no", "yes",
    ]  # fmt: skip


# ---------------------------- speculation
def test_acceptance_by_place() -> None:
    """Of 10 steps of 2 drafts 4 accepted none, 2 one, 4 both: 6 of 10, then 4 of 6."""
    repetitions = [{"accepted_counts": {0: 4, 1: 1}}, {"accepted_counts": {1: 1, 2: 4}}]
    assert by_place(repetitions, 2) == [0.6, 4 / 6]
    assert by_place([{"accepted_counts": {0: 3}}], 2) == [0.0], "no step came to the second"
    assert by_place([{}], 2) == []


def test_counts_of_accepted_drafts() -> None:
    """Steps after a row is done do not count: here of the second row, which has its 3 tokens."""
    written = [[[1], [1]], [[2, 3], [2]], [[4], [3]], [[5], [4, 5]]]
    assert _turns(written, 2, 3) == {1: 1, 0: 2}
    assert _turns(written, 1, 9) == {1: 1, 0: 2}


def test_acceptance_by_place_is_said() -> None:
    row = made_row() | {
        "assumed": None, "acceptance": 0.6, "tokens_per_step": 2.2, "predicted_speedup": 1.1,
        "pays_from": 0.5, "acceptance_by_place": [0.7, 0.5], "wrong_tokens": 0,
    }  # fmt: skip
    assert "2.20 tokens a step (by place: 70%, 50%); by bytes" in drafts(row, [row])
    row["acceptance_by_place"] = [0.7]
    assert "2.20 tokens a step; by bytes" in drafts(row, [row])


# ---------------------------- energy
@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    made = Subject(Backend(device="cpu"), WORK, tmp_path)
    made.build()
    return made


def test_energy_of_steps(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that rises by 6 joules while 3 steps of one row are repeated: 2 a token."""
    readings = iter([100.0, 106.0])
    monkeypatch.setattr(worker, "meter", lambda _: lambda: next(readings))
    monkeypatch.setattr(worker, "SECONDS", 0.0)
    found = worker.energy(subject)
    assert WORK.new == 4 and found["joules_per_token"] == 2.0 and found["mean_power_w"] > 0
    assert int(subject.cache.lengths[0]) == WORK.prompt + 3


def test_energy_repeats_without_overflow(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass begins where the prompt ends, so the cache never fills."""
    ticks = iter([0.0, *(0.1 * n for n in range(1, 500))])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(worker, "meter", lambda _: lambda: 0.0)
    monkeypatch.setattr(worker, "SECONDS", 0.5)
    worker.energy(subject)
    assert int(subject.cache.lengths[0]) == WORK.prompt + 3


def test_no_counter_no_energy(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"mean_power_w": None, "joules_per_token": None}
    assert worker.energy(subject) == nothing
    monkeypatch.setattr(worker, "LIBRARY", "libnothing.so")
    assert worker.meter(torch.device("cuda")) is None


# ---------------------------- a block for an issue
def test_a_block_for_an_issue(capsys: pytest.CaptureFixture[str]) -> None:
    """Machine, rates, clocks, the baseline and the fastest row of each workload, the switches."""
    path = RESULTS / "ladder.json"
    assert bench.main(["--show", str(path), "-o", "issue"]) == 0
    text = capsys.readouterr().out
    found = load(path, complete=True)
    fastest = min(found["rows"], key=lambda row: row["tpot_ms"])
    assert text.startswith("```\nmachine: NVIDIA H100 80GB HBM3, 85 GB, Linux")
    assert text.endswith("```\n") and text.count("```") == 2
    for words in (
        f"command: {found['command']}", f"copy {found['machine']['copy_gb_s']:.0f} GB/s",
        "MHz", fastest["arm"], "kernels=triton, ",
    ):  # fmt: skip
        assert words in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 4, "heading, rule, baseline, the fastest"
    assert set(SHOWN) <= COLUMNS.keys()


def test_a_failing_row_is_in_the_block(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = json.loads((RESULTS / "kernels" / "batch-1.json").read_text(encoding="utf-8"))
    found["rows"][1]["parity"] = False
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(found))
    assert bench.main(["--show", str(file), "-o", "issue"]) == 0
    text = capsys.readouterr().out
    assert "parity fails" in text and "| NO" in text
