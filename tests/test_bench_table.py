"""What bench.py says to people: speed-ups that agree with the milliseconds, the table's columns, a
busy machine, progress, where the result goes, and the number of threads.

Holds to account: r1/bench/report/speedup.py and table.py, r1/bench/busy.py, progress.py and
output.py, r1/threads.py.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_rows import WORK, arm_row
from cases import ROOT

import bench
from r1 import threads
from r1.__main__ import main
from r1.bench import busy, measure, output
from r1.bench.arms import Arm
from r1.bench.flags import parser
from r1.bench.load_result import load
from r1.bench.progress import Progress, left, weight
from r1.bench.report import text
from r1.bench.report.fields import FIELDS, SCHEMA
from r1.bench.report.render import render
from r1.bench.report.speedup import set_speedups
from r1.bench.report.table import COLUMNS, USUAL, number, table
from r1.bench.worker.serve import Setup, serve
from r1.model.shapes import shape
from r1.placement.ranks import Crew
from r1.switches.backend import Backend

TINY = ROOT / "weights" / "tiny-r1"


def drifting() -> list[dict[str, Any]]:
    """Three arms of one speed, while the baseline beside them gets slower and faster again."""
    slow = [[0.077, 0.076], [0.065, 0.066], [0.103, 0.104]]
    rows = [arm_row("baseline", [0.073] * 3)]
    rows += [arm_row(f"arm {i}", [0.0022, 0.0022], beside=slow[i]) for i in range(3)]
    set_speedups(rows)
    return rows


# ---------------------------- speed-ups
def test_rows_of_the_same_milliseconds_have_the_same_speedup() -> None:
    """It is the ratio of two cells of the table, and the range shows what the baseline did."""
    rows = drifting()
    assert [r["speedup"] for r in rows[1:]] == [pytest.approx(73 / 2.2)] * 3
    assert [r["beside_ms"] for r in rows[1:]] == pytest.approx([76.5, 65.5, 103.5])
    ranges = [(r["speedup_low"], r["speedup_high"]) for r in rows[1:]]
    assert ranges == [
        pytest.approx((73 / 2.2, 77 / 2.2)),
        pytest.approx((65 / 2.2, 73 / 2.2)),
        pytest.approx((73 / 2.2, 104 / 2.2)),
    ]
    assert [line.strip("| ") for line in table(rows, ["ms/token"])[2:]] == ["73.0"] + ["2.20"] * 3


OLD = [
    path
    for path in sorted((ROOT / "tools" / "measure" / "results").glob("**/*.json"))
    if '"schema"' in path.read_text("utf-8")
]


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_old_results_get_speedups_that_their_milliseconds_give(path: Path) -> None:
    """Also as they are printed: who divides two cells finds the third, within rounding."""
    rows = load(path, complete=True)["rows"]
    before = copy.deepcopy(rows)
    set_speedups(rows)
    assert rows == before, "setting them again changes nothing"
    if all(row["kind"] != "baseline" for row in rows):
        assert not any(row["speedup"] for row in rows), "there is nothing to be faster than"
        return
    base: dict[int, float] = {}
    for line in table(rows, ["batch", "ms/token", "speed-up"])[2:]:
        batch, milliseconds, speedup = (cell.strip() for cell in line.strip("|").split("|"))
        if speedup == "1":
            base[int(batch)] = float(milliseconds)
        elif milliseconds:
            ratio = base[int(batch)] / float(milliseconds)
            assert float(speedup.split()[0]) == pytest.approx(ratio, rel=0.011)
    for r in (r for r in rows if r["speedup_low"]):
        assert r["speedup_low"] <= r["speedup"] <= r["speedup_high"]


def test_an_arm_that_is_slower_than_the_baseline_is_called_no_faster() -> None:
    """The baseline happened to be slow beside it. The start-up of such an arm never pays."""
    rows = [arm_row("baseline", [0.0031] * 3), arm_row("a", [0.0033] * 3, beside=[0.0036] * 3)]
    rows += [arm_row("b", [0.003] * 3, beside=[0.0029] * 3), arm_row("c", [0.002] * 2)]
    rows[3] |= {"speedup_low": 1.5, "speedup_high": 1.6}
    set_speedups(rows)
    assert [r["within_noise"] for r in rows[1:]] == [True, True, False]
    assert [r["break_even_tokens"] for r in rows[1:]] == [None, None, round(10 / 0.0011)]
    shown = table(rows, ["speed-up", "pays after"])[2:]
    assert "0.94 (0.94-1.09) noise |            |" in shown[1] and "1.03" in shown[2]


def test_one_repetition_has_a_speedup_and_no_range() -> None:
    rows = [arm_row("baseline", [0.04]), arm_row("a", [0.02], beside=[0.04])]
    set_speedups(rows)
    assert (rows[1]["speedup"], rows[1]["break_even_tokens"]) == (pytest.approx(2), 500)
    assert {rows[1][name] for name in ("speedup_low", "speedup_high", "within_noise")} == {None}
    assert table(rows, ["speed-up"])[3] == "| 2.00     |"
    assert "1 repetition" in markdown(rows, repetitions=1).splitlines()[0]


@pytest.mark.parametrize("what", [{"parity": False}, {"refused": "why"}, {"batch": 2}])
def test_no_speedup_without_a_baseline_of_the_same_work(what: dict[str, Any]) -> None:
    rows = drifting()
    rows[0] |= what
    set_speedups(rows)
    assert all(r["speedup"] is None and r["speedup_low"] is None for r in rows)


# ---------------------------- the table
def result_of(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    machine = {"name": "a CPU, 2 CPUs", "torch": "2", "python": "3", **fields.pop("machine", {})}
    return {
        "schema": SCHEMA, "machine": machine, "config": {}, "repetitions": 2, "workload": "w",
        "rows": rows, "notes": [], "pairs": [], **fields,
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]], **fields: Any) -> str:
    return text.markdown(result_of(rows, **fields))


def test_the_usual_columns_fit_a_terminal() -> None:
    rows = drifting()
    head, _, first, *_ = table(rows, [name for name in USUAL if name != "batch"])
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    assert columns == [
        "arm", "TTFT ms", "ms/token", "tok/s", "speed-up", "memory GB", "correct?"
    ]  # fmt: skip
    assert " yes " in first and all(len(line) < 100 for line in markdown(rows).splitlines()[:-1])
    assert "KL" not in markdown(rows) and "KL (bound)" in text.markdown(result_of(rows), wide=True)


def test_a_batch_that_varies_has_a_column() -> None:
    rows = [*drifting(), {**drifting()[0], "batch": 8}]
    assert " batch " in markdown(rows) and " batch " not in markdown(rows[:-1])


def test_a_wrong_arm_is_not_correct() -> None:
    rows = [*drifting()[:1], arm_row("a", [0.02], passes=False)]
    set_speedups(rows)
    assert " parity fails | 1.00      | NO " in markdown(rows)


def test_numbers_have_three_digits() -> None:
    values = (0.0, 0.001757, 0.1242, 0.9996, 9.994, 33.18, 99.96, 377.0, 6540.1)
    wanted = ["0.000", "0.00176", "0.124", "1.00", "9.99", "33.2", "100", "377", "6540"]
    assert [number(value) for value in values] == wanted


def test_every_column_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--explain", "columns"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, column in COLUMNS.items():
        assert (name + " *" * column.wide) in lines
        for field in column.fields:
            assert any(line.startswith(f"  {field}: {FIELDS[field][:40]}") for line in lines)
    assert all(len(line) <= 100 for line in lines)


# ---------------------------- a busy machine, progress
@pytest.mark.parametrize(
    ("load", "cpus", "used", "said"),
    [
        (17.2, 2, 1, "BUSY: load 17 on 2 CPUs: timings mean little"),
        (1.6, 2, 1, "BUSY: load 1.6 on 2 CPUs: timings mean little"),
        (1.2, 2, 1, None),  # one CPU is busy, and one is enough
        (1.2, 2, 2, "BUSY: load 1.2 on 2 CPUs: timings mean little"),
        (17.0, 64, None, None),  # a GPU does the work
        (None, None, None, None),  # an older result
    ],
)
def test_a_busy_machine_is_said(
    load: float | None, cpus: int | None, used: int | None, said: str | None
) -> None:
    machine = {"load": load, "cpus": cpus, "threads": used}
    assert text.busy(machine) == said
    assert ("BUSY" in markdown(drifting(), machine=machine)) == (said is not None)


def test_load_is_what_others_run_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "SECONDS", 0.0)
    assert busy.load(lambda: "9.00 9.00 9.00 3/212 4711") == 2  # 3 with the one that reads
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 2.0, 3.0))

    def none() -> str:
        raise FileNotFoundError

    assert busy.load(none) == 1.5


def test_each_arm_has_a_line_of_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """Where stderr is no terminal. The time left comes from the arms that are done."""
    now = [0.0]
    arms = [Arm("baseline", "baseline", Backend()), Arm("compile", "alone", Backend(compile=True))]
    arms += [Arm("amp=bf16", "alone", Backend(amp="bf16")), Arm("a & b", "pairs", Backend())]
    progress = Progress([weight(arm) for arm in arms], clock=lambda: now[0])
    now[0] += 1000  # the reference, which is made before the first arm
    for name, seconds in (("baseline", 30.0), ("compile", 90.0), ("amp=bf16", 60.0), ("a & b", 9)):
        progress.begin(name)
        now[0] += seconds
    assert capsys.readouterr().err.splitlines() == [
        "bench: arm 1 of 4: baseline",
        "bench: arm 2 of 4, about 2 min left: compile",  # 4.5 times the baseline's 30 s
        "bench: arm 3 of 4, about 40 s left: amp=bf16",
        "bench: arm 4 of 4, about 20 s left: a & b",
    ]


def test_arms_of_a_refused_workload_are_skipped() -> None:
    progress = Progress([1.0] * 5)
    progress.begin("baseline")
    progress.skip_to(3)
    assert progress.begin("baseline").startswith("arm 4 of 5, about ")
    assert left(20 * 60.0) == "about 20 min left" and left(3.0) == "about 10 s left"


# ---------------------------- where the result goes
@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The result that bench.py measures in no time."""
    result = result_of(drifting())
    monkeypatch.setattr(measure, "run", lambda *_: (result, False))
    return result


@pytest.mark.parametrize(
    ("options", "name", "form"),
    [
        ([], "a.json", "json"),
        ([], "a.csv", "csv"),
        (["-o", "json"], "a.txt", "json"),
        (["-o", "md"], "a.json", "json"),
    ],
)
def test_an_output_file_holds_the_result_and_the_table_is_printed(
    options: list[str],
    name: str,
    form: str,
    measured: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_text("an older result")
    assert bench.main([*options, "--output-file", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().decode() == render(measured, form) + "\n"
    assert capsys.readouterr().out == render(measured, "md") + "\n"
    assert [each.name for each in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none/a.json", "No such file or directory"),
        ("folder.json", "it is a folder, not a file"),
        ("pipe.json", "it is a pipe, not a file"),
        ("a" * 300 + ".json", "the name is too long"),
        ("folder", "it is a folder, not a file"),
        ("a.txt", "give it one of the endings .md, .json, .jsonl, .csv, or say with -o"),
    ],
)
def test_an_output_file_is_checked_before_measuring(
    name: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(measure, "run")
    for folder in ("folder.json", "folder"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    assert bench.main(["--output-file", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert len(list(tmp_path.iterdir())) == 3


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_became_full_loses_no_result(
    measured: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The table is printed, and the result is kept elsewhere; without any room, on stderr."""
    write: Callable[[Path, str], None] = output._write
    wanted, elsewhere = tmp_path / "a.json", tmp_path / "elsewhere"
    elsewhere.mkdir()

    def only_elsewhere(path: Path, content: str) -> None:
        write(path, content) if path.parent == elsewhere else full()

    monkeypatch.setattr(output, "_write", only_elsewhere)
    monkeypatch.setattr(output.tempfile, "gettempdir", lambda: str(elsewhere))
    assert bench.main(["--output-file", str(wanted)]) == 2
    out, err = capsys.readouterr()
    (kept,) = elsewhere.iterdir()
    assert out == render(measured, "md") + "\n" and not wanted.exists()
    assert json.loads(kept.read_text()) == measured
    assert f"{wanted} can't be written (No space left on device); the result is in {kept}" in err
    monkeypatch.setattr(output, "_write", full)
    assert bench.main(["--output-file", str(wanted)]) == 2
    err = capsys.readouterr().err
    assert json.loads(err[: err.rindex("bench: ")]) == measured and "the result is above" in err


def test_a_link_keeps_leading_to_the_file(measured: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("")
    (tmp_path / "link.json").symlink_to("real.json")
    assert bench.main(["--output-file", str(tmp_path / "link.json")]) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == measured


def test_no_row_overwrites_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An interrupt before the first arm is complete leaves an older file as it is."""
    (tmp_path / "a.json").write_text("an older result")
    arguments = parser(TINY).parse_args(["--output-file", str(tmp_path / "a.json")])
    output._write_file(result_of([]), arguments)
    assert (tmp_path / "a.json").read_text() == "an older result"
    assert "is not written" in capsys.readouterr().err


def test_a_flag_that_would_be_ignored_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    explain, compare, show = ["--explain"], ["--compare", "a.json"], ["--show", "a.json"]
    for flag, value, commands in (
        ("--output-file", "b.json", (explain, compare)),
        ("-o", "json", (explain, compare)),
        ("--plot", "b.png", (explain, compare)),
        ("--profile", "b", (explain, compare, show)),
        ("--price", "1", (explain, show, [])),
    ):
        for command in commands:
            assert bench.main([*command, flag, value]) == 2
            assert capsys.readouterr().err.strip().startswith(f"bench: {flag} goes with ")


# ---------------------------- threads
def test_a_small_model_gets_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU; a number that is asked for holds everywhere, and so does OMP_NUM_THREADS."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    tiny, large = shape("tiny"), shape("moonlight-16b")
    assert threads.choose(None, "cpu", tiny, "auto") == 1
    assert threads.choose(None, "cpu", large, "bf16") == 16
    assert threads.choose(None, "cuda", tiny, "auto") is None
    assert threads.choose(3, "cuda", tiny, "auto") == threads.choose(3, "cpu", tiny, "auto") == 3
    monkeypatch.setattr(threads, "count_parameters", lambda _: 5 * threads.BYTES_PER_THREAD // 4)
    assert [threads.choose(None, "cpu", tiny, dtype) for dtype in ("fp32", "bf16")] == [5, 2]
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert threads.choose(None, "cpu", tiny, "auto") == 16


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "10000000", ""])
def test_a_number_of_threads_that_can_not_be(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (bench.main, main):
        with pytest.raises(SystemExit) as caught:
            command([f"--threads={value}"])
        assert caught.value.code == 2
        assert "give a whole number from 1 to" in capsys.readouterr().err


class Closed:
    """A pipe on which nothing is asked."""

    def recv(self) -> str:
        return "quit"


def test_an_arms_process_has_its_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    pipe: Any = Closed()
    for number_of_threads in (3, None):
        serve(pipe, Backend(), WORK, tmp_path, "c", Setup(number_of_threads), Crew())
    assert asked == [3]


def test_a_chat_has_its_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    question = ["--device", "cpu", "--new", "2", "2+3=?"]
    assert main(question) == 0 and asked == [1]
    assert main(["--threads", str(os.cpu_count()), *question]) == 0
    assert asked == [1, os.cpu_count()]


def test_threads_are_stated() -> None:
    for count, words in ((1, " · 1 thread · "), (2, " · 2 threads · ")):
        assert words in markdown(drifting(), machine={"threads": count}).splitlines()[0]
    assert "thread" not in markdown(drifting()).splitlines()[0]
