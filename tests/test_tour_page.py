"""r1/README.md, the tour: its excerpts, its output, its commands, its measurements and its links.

Holds to account: r1/README.md and tools/measure/rungs.py.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from typing import Any

import make_tables
import pytest
import rungs
from cases import ROOT

from r1.bench import timeline

TOUR = ROOT / "r1" / "README.md"
TOUR_TEXT = TOUR.read_text(encoding="utf-8")
EXCERPT = re.compile(r"# (?:before: |after: )?(r1/\S+\.py)")
"""The line above the lines of a file, in a block of Python code."""


def blocks(language: str) -> list[str]:
    """The contents of the tour's blocks of a language."""
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", TOUR_TEXT, re.DOTALL)
    return found


def test_the_tours_excerpts_are_in_the_files() -> None:
    """In this order, between the lines "..."; white space aside."""
    excerpts = [code for code in blocks("python") if EXCERPT.match(code)]
    assert len(excerpts) > 15
    for code in excerpts:
        rest = ""
        for piece in re.split(r"^\.\.\.\n|^(?=# )", code, flags=re.MULTILINE):
            if found := EXCERPT.match(piece):
                rest = " ".join((ROOT / found[1]).read_text(encoding="utf-8").split())
                piece = piece[found.end() :]
            wanted = " ".join(piece.split())
            assert wanted in rest, f"not in the file, or not behind the lines before: {wanted}"
            rest = rest[rest.index(wanted) + len(wanted) :]


def test_the_tours_output_is_what_is_printed() -> None:
    """Each line is one of tests/tour.txt, which test_tour.py compares with the command's."""

    def plain(line: str) -> str:
        return " ".join(re.sub(r"(\.py):\d+", r"\1", line).split())

    recorded = (ROOT / "tests" / "tour.txt").read_text(encoding="utf-8").splitlines()
    printed = set(map(plain, recorded))
    shown = [line for text in blocks("text") for line in text.splitlines()]
    assert len(shown) > 20
    assert not [line for line in shown if plain(line) not in printed]


@pytest.mark.parametrize("line", [line for text in blocks("sh") for line in text.splitlines()])
def test_the_tours_commands_run(line: str) -> None:
    python, *arguments = shlex.split(line)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert python == "python" and done.returncode == 0 and done.stdout, done.stderr


def test_the_rungs_are_measured_and_short() -> None:
    """Every rung of the ladder has its place; a section has at most 15 lines."""
    filled = make_tables.filled([TOUR_TEXT], rungs.sentences())
    assert filled == [TOUR_TEXT], "run python tools/measure/make_tables.py"
    assert TOUR_TEXT.count("\nMeasured") == 15
    part = TOUR_TEXT.split("## What each optimization changes")[1].split("\n## ")[0]
    sections = part.split("\n### ")[1:]
    assert len(sections) == 10
    for section in sections:
        lines = [line for line in section.splitlines() if not re.match(r"$|<!--|```|<a id=", line)]
        assert 5 <= len(lines) <= 15, section


def test_what_a_rung_says_of_noise() -> None:
    def row(*totals: float) -> dict[str, Any]:
        repetitions = [{"total": 1 + total, "ttft": 1.0} for total in totals]
        return {"tpot_ms": 1.0, "kernels": 5, "repetitions": repetitions, "bottleneck": "memory"}

    assert "overlap" in rungs.step(row(3, 5), row(2, 4))
    assert "overlap" not in rungs.step(row(5, 6), row(2, 4))
    assert "overlap" not in rungs.step(row(2, 4), row(5, 6))


def test_what_a_rung_says_of_a_step_that_waits_for_launches() -> None:
    def row(bottleneck: str, ours: float) -> dict[str, Any]:
        parts = [{"kernel": timeline.IDLE, "us": 9000.0}, {"kernel": "ours", "us": ours}]
        timed = {"tpot_ms": 10.0, "kernels": 1, "repetitions": [{"total": 2.0, "ttft": 1.0}]}
        return {**timed, "bottleneck": bottleneck, "kernel_times": parts}

    step = rungs.step(row("launches", 1500.0), row("launches", 1250.0))
    assert step.endswith("the GPU works for 1.50 and 1.25 ms of it")
    assert "the GPU works" not in rungs.step(row("launches", 1500.0), row("memory", 1250.0))
