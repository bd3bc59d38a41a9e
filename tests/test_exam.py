"""Tests the accuracy column: exam.json is what the tool makes, and a ruined arm shows.

Holds to account: r1/bench/exam.py, r1/bench/worker/accuracy.py and tools/train/make_exam.py.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import make_exam
import pytest
from cases import ROOT
from conftest import CountingBackend
from tasks import exam as held_out

import bench
import r1
from r1 import Backend, Engine, InputError
from r1.bench import exam, flags, plan
from r1.bench.arms import Arm
from r1.bench.exam import Question
from r1.bench.session import Session
from r1.bench.worker.accuracy import accuracy
from r1.bench.worker.subject import Subject
from r1.bench.worker.timing import measure
from r1.bench.workload import Workload
from r1.files.names import places

TINY = ROOT / "weights" / "tiny-r1"
SHORT = exam.fitting(exam.load(TINY), 110, 4)
"""Problems of few tokens, for what has to be asked more than once."""
WORK = Workload(str(TINY), None, None, 1, 100, 10, 0, 0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return r1.load(TINY, Backend(device="cpu", dtype="fp32"), quiet=True)


def arm(folder: Path, **switches: Any) -> Subject:
    """What an arm's process holds, in this one."""
    made = Subject(Backend(device="cpu", dtype="fp32", **switches), WORK, folder)
    made.build()
    return made


def test_the_file_is_what_the_tool_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    assert make_exam.main([str(tmp_path)]) == 0
    assert (tmp_path / exam.FILE).read_bytes() == (TINY / exam.FILE).read_bytes()
    questions, problems = exam.load(TINY), held_out(make_exam.COUNT)
    assert [question.answer for question in questions] == [problem.answer for problem in problems]
    assert {problem.split for problem in problems} == {"test"}, "never trained on"
    assert make_exam.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("make_exam: ")


def test_what_fits_is_asked() -> None:
    questions = [Question("a", 1, 50), Question("b", 2, 90), Question("c", 3, 60)]
    assert exam.fitting(questions, 60 + exam.SLACK, 5) == [questions[0], questions[2]]
    assert exam.fitting(questions, 200, 2) == questions[:2] and exam.fitting(questions, 50, 2) == []


def test_a_model_without_problems_is_asked_none(tmp_path: Path) -> None:
    assert (
        exam.load(tmp_path)
        == []
        == plan.questions_of(str(tmp_path), None)
        == plan.questions_of(None, None)
    )
    assert (
        plan.questions_of(str(TINY), 0) == []
        and len(plan.questions_of(str(TINY), None)) == make_exam.COUNT
    )


@pytest.mark.parametrize(
    "text",
    [
        "[",
        '{"a": 1}',
        "[1]",
        '[{"question": "a"}]',
        '[{"question": "a", "answer": "b", "tokens": 3}]',
        "3",
        '[{"question": "a", "answer": 1, "tokens": 0}]',
    ],
)
def test_a_file_that_cant_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / exam.FILE).write_text(text)
    with pytest.raises(InputError, match=exam.FILE) as error:
        exam.load(tmp_path)
    assert "\n" not in str(error.value)


def test_only_what_was_asked_counts(engine: Engine) -> None:
    """However the questions fall into batches; the last one is filled up by a question whose answer
    counts once.
    """
    wrong = [dataclasses.replace(SHORT[0], answer=SHORT[0].answer + 1), *SHORT[1:]]
    for batch in (1, 3, 4, 6):
        assert exam.accuracy(engine, wrong, 110, batch) == 0.75
    assert exam.accuracy(engine, SHORT, 60, 4) < 0.5, (
        "an answer that the cache has no room for is none"
    )


def test_a_ruined_arm_shows(tmp_path: Path) -> None:
    sound, ruined = arm(tmp_path), arm(tmp_path, moe="grouped")
    for name, weight in places(ruined.engine.model).items():
        if name.endswith("kv_b_proj.weight"):
            weight.copy_(weight.flip(0))  # heads in the wrong order
    assert accuracy(sound, SHORT) == {"share": 1.0, "problems": 4}
    assert accuracy(ruined, SHORT) == {"share": 0.0, "problems": 4}


@pytest.mark.parametrize("switches", [{"speculate": "mtp"}, {"attention": "naive", "moe": "loop"}])
def test_arms_that_compute_otherwise_answer_alike(switches: dict[str, Any], tmp_path: Path) -> None:
    assert accuracy(arm(tmp_path, **switches), SHORT) == {"share": 1.0, "problems": 4}


@pytest.mark.parametrize("switches", [{}, {"speculate": "mtp"}])
def test_compiled_arms_are_asked_in_shapes_that_they_know(
    switches: dict[str, Any], tmp_path: Path, compiler: CountingBackend
) -> None:
    compiled = arm(tmp_path, compile=True, **switches)
    measure(compiled)
    before = compiler.graphs
    assert accuracy(compiled, SHORT)["share"] == 1.0
    assert 0 < before == compiler.graphs


def test_an_arm_is_asked_when_all_that_is_timed_is_done() -> None:
    """And not where it was refused, or where nothing is to be asked."""

    class Answers:
        def __init__(self, refuses: str) -> None:
            self.refuses, self.asked = refuses, list[str]()

        def ask(self, command: str, *arguments: object) -> dict[str, Any]:
            assert not arguments or arguments == (SHORT,)
            self.asked.append(command)
            return {"refused": "why"} if command == self.refuses else {"seconds": 1.0}

        def quit(self) -> None:
            self.asked.append("quit")

    def finished(questions: list[Question], refuses: str = "") -> tuple[list[str], dict[str, Any]]:
        made = Session.__new__(Session)
        answers: Any = Answers(refuses)
        made.arm, made.title, made.notes = Arm("one", "alone", Backend()), "one", []
        made.answers, made.process = {}, answers
        made.finish(flags.parser(TINY).parse_args([]), questions)
        assert bool(made.notes) == (refuses == "accuracy")
        return answers.asked, made.answers

    asked, found = finished(SHORT)
    timed = ["moe_layer", "energy"]
    assert asked == [*timed, "accuracy", "quit"] and found["accuracy"] == {"seconds": 1.0}
    assert finished([])[0] == [*timed, "quit"]
    asked, found = finished(SHORT, refuses="moe_layer")
    assert asked == ["moe_layer", "quit"] and found["refused"] == "why"
    found = finished(SHORT, refuses="accuracy")[1]
    assert found.keys() == set(timed), "what was measured stands"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--problems", "-1"], "give 0 or more"),
        (["--problems", "3", "--shape", "tiny"], "a shape of random weights has no exam.json"),
    ],
)
def test_bad_input(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*arguments, "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err


def test_who_has_no_tokenizer_cant_be_asked(engine: Engine) -> None:
    with pytest.raises(InputError, match="no tokenizer, so it can't be asked: use --problems 0"):
        exam.accuracy(Engine(engine.model, engine.backend), SHORT, 110, 4)
