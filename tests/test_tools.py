"""tools: every command starts from any folder, without an installed r1, and records no path."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_load
import bench_steps
import compare_peers
import pytest
import shared
from refusals import refused

TOOLS = Path(__file__).parents[1] / "tools"
FILES = [*TOOLS.glob("*.py"), *TOOLS.glob("*/*.py")]
COMMANDS = sorted(path for path in FILES if "__main__" in path.read_text())

RUN = """
import os, runpy, sys
found = lambda p: os.path.isdir(os.path.join(p or ".", "r1"))
sys.path = [p for p in sys.path if not found(p)]
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
clean, loaded = list(sys.path), set(sys.modules)
for tool in sys.argv[1:]:
    sys.path[:] = [os.path.dirname(tool), *clean]
    sys.argv = [tool, "--help"]
    for name in set(sys.modules) - loaded:
        if getattr(sys.modules[name], "__file__", None) and ROOT in sys.modules[name].__file__:
            del sys.modules[name]
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as error:
        assert error.code == 0, (tool, error.code)
"""


def test_every_command_has_help_from_any_folder(tmp_path: Path) -> None:
    """In one process, because each start of torch takes seconds. No r1 is on the path before."""
    script = f"ROOT = {str(shared.ROOT)!r}\n{RUN}"
    command = [sys.executable, "-c", script, *map(str, COMMANDS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(COMMANDS) == 24 and done.stdout.count("usage: ") == 24
    assert "not built yet" not in done.stdout


def test_a_wrong_flag_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a page of usage before it."""
    monkeypatch.setattr(sys, "argv", ["tools/train/eval.py"])
    with pytest.raises(SystemExit) as end:
        shared.parser("Examine a model.").parse_args(["--no-such"])
    assert end.value.code == 2
    wrong = "eval: unrecognized arguments: --no-such; --help lists the flags"
    assert capsys.readouterr().err.splitlines() == [wrong]


def test_the_page_lists_every_command() -> None:
    page = (TOOLS / "README.md").read_text(encoding="utf-8")
    assert all(f"python {path.relative_to(TOOLS.parent)}" in page for path in COMMANDS)
    assert page.count("\n") <= 80


def test_records_hold_no_path() -> None:
    tool = str(TOOLS / "measure" / "bench_kernels.py")
    words = ["--batch", "1,8", "-o", "/root/out/a.json", "--model=/data/tiny/", "-x", "a b"]
    assert shared.command(tool, words) == (
        "python tools/measure/bench_kernels.py --batch 1,8 -o a.json --model=tiny -x 'a b'"
    )
    given = argparse.Namespace(batch=1, output=Path("/root/out/a.json"), model=Path("x/tiny/"))
    assert shared.recorded(given) == {"batch": 1, "output": "a.json", "model": "tiny"}


@pytest.mark.parametrize("wrong", ["0", "1,", "1,x", "-1", "1.5", "1234567", ""])
def test_comma_lists_of_numbers(wrong: str) -> None:
    assert shared.numbers("--batch", "1,32,999999") == [1, 32, 999999]
    with refused(f"--batch {wrong}: give whole numbers from 1 to 999999"):
        shared.numbers("--batch", wrong)


def test_comma_lists_of_names() -> None:
    assert shared.names("--only", "b,a", ("a", "b")) == ["b", "a"]
    assert shared.names("--only", "", ("a", "b")) == []
    with refused("--only c: choose of a, b"):
        shared.names("--only", "a,c", ("a", "b"))


def test_a_result_file_is_checked_before_the_work(tmp_path: Path) -> None:
    shared.check_output(None)
    shared.check_output(tmp_path / "new.json")
    for wrong in (tmp_path, tmp_path / "none" / "new.json"):
        with refused("no file can be written there"):
            shared.check_output(wrong)


def test_the_table_of_peers() -> None:
    """Two rows. r1 takes 10, 20 and 30 ms a token; the peer, in turn with it, 40, 40 and 30."""
    ours = [{"ttft": 0.1 * i, "tpot": 0.01 * i} for i in (1, 2, 3)]
    theirs = [{"ttft": 0.5, "tpot": tpot} for tpot in (0.04, 0.04, 0.03)]
    ends = {"first_call_s": 3.0, "allocated_gb": 1.5}
    how = {"shape": "tiny", "batch": 2, "prompt": 8, "new": 4, "dtype": "bf16"}
    figures: dict[str, dict[str, Any]] = {
        "r1": {"repetitions": ours, **ends},
        "peer": {"repetitions": theirs, "beside": ours, **ends},
    }
    lines = compare_peers.table({"arguments": how, "figures": figures})
    assert lines[0].startswith("tiny, batch 2, 8 + 4 tokens; r1: ") and "bf16" in lines[0]
    assert lines[-2:] == [
        "| r1 | 200.0 | 20.00 (10.00-30.00) | 100.0 | 1 | 3.0 | 1.5 |",
        "| peer | 500.0 | 40.00 (30.00-40.00) | 50.0 | 0.50 (0.25-1.00) | 3.0 | 1.5 |",
    ]
    parity = {"passes": True, "median_kl": 2e-5, "bound": 1e-4}
    figures["r1"]["parity"] = parity
    assert compare_peers.table({"arguments": how, "figures": figures})[:-2] == lines
    parity |= {"passes": False, "median_kl": 2e-3}
    *_, last, _, verdict = compare_peers.table({"arguments": how, "figures": figures})
    assert "0.50" not in last and "parity fails" in last
    assert "FAILS: median KL 2.0e-03, and 1.0e-04 would pass" in verdict


def test_r1_beside_its_peer_is_an_arm_of_the_benchmark() -> None:
    """Built, held against the fp32 reference, and measured; what it refuses is one sentence."""
    line = ["--shape", "tiny", "--layers", "2", "--prompt", "8", "--new", "3", "--device", "cpu"]
    arguments = compare_peers.parser().parse_args([*line, "--moe", "gather"])
    with compare_peers.own_side(arguments) as ask:
        started, turn = ask("start"), ask("measure")
    assert started["parity"]["passes"]
    assert min(started["first_call_s"], turn["ttft"], turn["tpot"]) > 0


@pytest.mark.parametrize("in_turn", [True, False])
def test_peers_where_one_model_fits(in_turn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then r1 is measured and gone before transformers comes, and the table says so."""
    asked: list[str] = []

    def side(name: str, *_: Any) -> Any:
        def ask(command: str) -> dict[str, Any]:
            asked.append(f"{name} {command}")
            turn = {"ttft": 0.1, "tpot": 0.1 * len(asked)}
            return {"measure": turn, "memory": {"allocated_gb": 1.0}}.get(command, {})

        return contextlib.nullcontext(ask)

    monkeypatch.setattr(compare_peers, "own_side", lambda _: side("r1"))
    monkeypatch.setattr(compare_peers, "peer", side)
    arguments = compare_peers.parser().parse_args(["--shape", "tiny", "-r", "2"])
    *_, figures = compare_peers.compare(["a", "b"], arguments, in_turn=in_turn)
    own = [each for each in asked if each.startswith("r1")]
    assert len(figures["r1"]["repetitions"]) == (4 if in_turn else 2)
    assert len(figures["b"]["beside"]) == len(figures["b"]["repetitions"]) == 2
    measured = ["r1 measure", "r1 measure"]
    assert in_turn or own[:4] == asked[:4] == ["r1 start", *measured, "r1 quit"]
    assert asked[-3:] == ["b measure", "b memory", "r1 memory"]
    for each in figures.values():
        each["first_call_s"] = 1.0
    result = {"arguments": vars(arguments), "figures": figures, "in_turn": in_turn}
    assert (compare_peers.table(result)[-1] == compare_peers.ALONE) is not in_turn
    assert compare_peers.two_fit(arguments), "tiny fits twice"


def test_steps_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each storage and batch, and what can't be had in one sentence."""
    out, tiny = tmp_path / "steps.json", ["--shape", "tiny", "--layers", "2", "-r", "1"]
    assert bench_steps.main([*tiny, "--quant", "none,int8", "--batch", "1,2", "-o", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["quant"], row["batch"]) for row in rows] == [
        (quant, batch) for quant in ("none", "int8") for batch in (1, 2)
    ]
    assert all(row["least"] == row["us"] == row["most"] > 0 for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[3].startswith("tiny int8, batch 2: ")
    assert bench_steps.main(["--shape", "tiny", "--layers", "99"]) == 2
    assert capsys.readouterr().err.startswith("bench_steps: ")


@pytest.mark.skipif(sys.platform != "linux", reason="the tool reads /proc")
def test_memory_is_read_in_bytes() -> None:
    assert bench_load.memory("VmHWM") >= bench_load.memory("VmRSS") > 5 * 10**7


def test_run_says_what_is_wrong_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: argparse.Namespace) -> int:
        raise shared.InputError("no such thing: name another")

    assert shared.run("tools/x/some_tool.py", refuse, argparse.Namespace()) == 2
    assert capsys.readouterr().err == "some_tool: no such thing: name another\n"
