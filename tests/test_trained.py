"""Tests that the embedded checkpoint can do what its card says.

Holds to account: weights/tiny-r1, and with it r1/model, r1/run, r1/text and r1/files together.

It derives, its answers are right, its drafts are accepted, and all its experts are used. The card's
figures are of 1000 problems. The 40 here tell a broken model, or a broken switch, from a sound one.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from cases import ROOT
from eval import Pair, accuracy, answers, read, speculation
from tasks import OPENINGS, SYMBOLS, Example, Operation, Problem, exam, phrased, reason

import r1
from r1 import Backend, Engine
from r1.files.names import is_projection, places

TINY = ROOT / "weights" / "tiny-r1"
PROBLEMS = exam(40)
EXAMPLES = phrased(PROBLEMS)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(mtp=True)


@pytest.fixture(scope="module")
def written(engine: Engine) -> list[Pair]:
    """Greedy answers to all problems: with those under speculation, most of the seconds that this
    file takes.
    """
    return ask(engine, EXAMPLES)


def load(speculate: str = "off", mtp: bool = False) -> Engine:
    backend = Backend(device="cpu", dtype="fp32", speculate=speculate)
    return r1.load(TINY, backend, batch=len(PROBLEMS), mtp=mtp, quiet=True)


def ask(engine: Engine, examples: Sequence[Example], think: bool = True) -> list[Pair]:
    return answers(engine, examples, think=think, batch=len(PROBLEMS))[0]


@pytest.mark.parametrize(
    ("expression", "split"),
    [
        (
            Operation(47, "*", 86),
            "train",
        ),  # everyone's first question; the others were never trained on
        (Operation(43, "*", 57), "test"),
        (Operation(4096, "-", 578), "test"),
        (Operation(Operation(69, "-", 19), "-", Operation(7, "*", 9)), "test"),
    ],
)
def test_derivation(expression: Operation, split: str, engine: Engine) -> None:
    """Every digit, carry and partial product as tasks.py works them out, whose statements
    test_tasks.py computes one by one.
    """
    problem = Problem("mul" if expression.sign == "*" else "expr", expression)
    assert problem.split == split
    done = engine.chat(
        [{"role": "user", "content": f"What is {problem.text}?"}],
        max_new_tokens=320,
        temperature=0.0,
    )
    assert done.reasoning in {
        opening + reason(expression, SYMBOLS) for opening in OPENINGS[SYMBOLS]
    }
    assert done.answer == f"{problem.text} = {problem.answer}." and done.finish == "stop"


def test_answers_are_right_because_of_the_reasoning(engine: Engine, written: list[Pair]) -> None:
    assert {problem.split for problem in PROBLEMS} == {"test"}
    assert accuracy(engine, PROBLEMS, written, think=True)["all"] >= 0.95
    assert accuracy(engine, PROBLEMS, ask(engine, EXAMPLES, think=False), think=False)["all"] < 0.5


def test_coarse_weights_cost_answers() -> None:
    """Accuracy can fall: with three values for a weight nothing is right. (A near miss shows in
    parity, not in answers.)
    """
    coarse = load()
    for name, weight in places(coarse.model).items():
        if is_projection(name):
            step = weight.abs().amax(dim=-1, keepdim=True)
            weight.copy_((weight / step).round() * step)
    assert accuracy(coarse, PROBLEMS[:8], ask(coarse, EXAMPLES[:8]), think=True)["all"] < 0.5


def test_the_drafter_foresees_and_every_expert_works(engine: Engine, written: list[Pair]) -> None:
    reading = read(engine, written, batch=len(PROBLEMS))
    assert reading.drafts > 2000 and reading.agreed / reading.drafts >= 0.8
    relative = reading.loads / reading.loads.mean(dim=1, keepdim=True)
    assert relative.shape == (5, 16) and float(relative.min()) > 1 / 3 and float(relative.max()) < 3


def test_speculation_changes_no_text(written: list[Pair]) -> None:
    drafted, completions = answers(load(speculate="mtp"), EXAMPLES, think=True, batch=len(PROBLEMS))
    assert drafted == written
    fared = speculation(completions)
    assert fared and fared["acceptance"] >= 0.8 and fared["tokens_per_step"] > 1.8
