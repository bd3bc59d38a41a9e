"""Tests `python -m r1` as one talks to it: in a terminal, over turns, within its domain and beyond.

Holds to account: r1/__main__.py, r1/conversation.py, r1/files/embedded.py, r1/switches/flags.py and
tools/train/make_domain.py. test_command_streams.py has pipes and broken streams.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import ROOT
from make_domain import domain, questions
from terminal import CTRL_C, CTRL_D, UP, Terminal

import r1
from r1 import Backend, Completion, conversation
from r1.__main__ import main
from r1.__main__ import parser as chat_parser
from r1.bench.flags import parser as bench_parser
from r1.conversation import Conversation, timings
from r1.errors import InputError
from r1.files.embedded import EMBEDDED, FILE, Domain, domain_of
from r1.run.start_up import StartUp
from r1.switches.flags import explanations
from r1.tour.__main__ import SWITCHES
from r1.tour.__main__ import parser as tour_parser

CHAT = ("--device", "cpu", "--temperature", "0")


# ---------------------------- a terminal
SLOW = """
import sys, time
import r1.__main__ as command
from r1.conversation import Painter
show = Painter.show
Painter.show = lambda *texts: (time.sleep(0.05), show(*texts))
sys.exit(command.main())
"""
"""The command, with time to press a key while it answers."""


def test_a_chat_in_a_terminal() -> None:
    """The banner, Ctrl-C, the last line again by the arrow key, an answer, and the end."""
    with Terminal("-c", SLOW, *CHAT) as chat:
        banner = chat.wait_for("> ")
        assert "tiny-r1 was trained on sums and differences" in banner and "/exit" in banner
        for typed in ("What is 47 * 86?\n", UP + "\n"):
            chat.enter(typed)
            assert "\x1b[2m47 * 86 = 47 * 80" in chat.wait_for("47 * 8:")
            chat.enter(CTRL_C)
            stopped = chat.wait_for("\n> ")
            assert "[stopped]" in stopped and "tokens read" not in stopped and "\x1b[0m" in stopped
        chat.enter("half a quest")
        chat.wait_for("half a quest")
        assert "/exit or Ctrl-D ends" in chat.interrupt("\n> ")
        chat.enter("/foo\n")
        assert "/foo is no command: there are /new and /exit" in chat.wait_for("\n> ")
        chat.enter("what is 99 - 45?\n")
        answer = chat.wait_for("\n> ")
        assert "\x1b[2m99 - 45:" in answer and "\x1b[0m" in answer
        assert "99 - 45 = 54." in answer and "tokens read" in answer
        chat.enter(CTRL_D)
        assert chat.end() == 0


def test_ctrl_c_ends_a_single_question() -> None:
    with Terminal("-c", SLOW, *CHAT, "What is 47 * 86?") as chat:
        chat.wait_for("47 * 8:")
        chat.enter(CTRL_C)
        assert chat.end() == 130


# ---------------------------- turns
class Fake:
    """An engine that notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, Any]]] = []
        self.start_up = StartUp(Backend(device="cpu"))

    def chat(self, messages: list[dict[str, Any]], *_: Any, **__: Any) -> Completion:
        self.asked.append(messages)
        if messages[-1]["content"] == "too much":
            raise InputError("the conversation has too many tokens: start a new one")
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        return Completion([1], "stop", 1, 0.0, 0.0, answer=f"a{len(self.asked)}")


def talked(lines: list[str], system: str | None, known: Domain | None) -> list[list[str]]:
    """What the engine is asked in a chat of these lines, in a terminal."""
    fake: Any = Fake()
    arguments = argparse.Namespace(
        system=system, new=9, temperature=0.0, top_p=1.0, seed=None, think=True
    )
    with pytest.MonkeyPatch.context() as patch:
        typed = iter(lines)
        patch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        patch.setattr(conversation, "_read_line", lambda _: next(typed, "/exit"))
        assert Conversation(fake, arguments, known).chat() == 0
    return [[message["content"] for message in asked] for asked in fake.asked]


def test_a_conversation_goes_on_and_starts_anew() -> None:
    """A turn that is refused or stopped leaves no trace."""
    lines = ["one", "too much", "stop", "", "two", "/new", "three"]
    assert talked(lines, "be kind", None) == [
        ["be kind", "one"],
        ["be kind", "one", "a1", "too much"],
        ["be kind", "one", "a1", "stop"],
        ["be kind", "one", "a1", "two"],
        ["be kind", "three"],
    ]


def test_words_that_end_a_chat_elsewhere_are_not_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert talked(["exit", "Quit", "exit 1"], None, None) == [["exit 1"]]
    assert capsys.readouterr().err.count("r1: /exit or Ctrl-D ends\n") == 2


def test_each_question_of_tiny_r1_stands_alone() -> None:
    """It was trained on single questions, and answers the first again after any other."""
    known = domain_of(EMBEDDED)
    assert known and talked(["1 + 1", "2 + 2"], None, known) == [["1 + 1"], ["2 + 2"]]


# ---------------------------- what tiny-r1 knows
def test_the_domain_is_that_of_the_training() -> None:
    assert json.loads((EMBEDDED / FILE).read_text(encoding="utf-8")) == domain(), (
        f"run python tools/train/make_domain.py {EMBEDDED.relative_to(ROOT)}"
    )


def test_nothing_strange_is_found_in_training_questions_and_in_the_exam() -> None:
    known = domain_of(EMBEDDED)
    assert known and known.name == "tiny-r1"
    exam = json.loads((EMBEDDED / "exam.json").read_text(encoding="utf-8"))
    asked = [*questions(1500, seed=1), *(each["question"] for each in exam), known.example]
    assert [(each, known.outside(each)) for each in asked if known.outside(each)] == []


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("Why is the sky 4?", ['the words "Why", "sky"']),
        ("hello", ["questions without numbers"]),
        ("2^3 / 5", ['the signs "^", "/"']),
        ("12345 + 1", ["numbers of more than four digits"]),
        ("3.5 + 2", ["fractions"]),
        ("-3 + 2", ["numbers below zero"]),
        ("123 * 45", ["products of more than two digits by two"]),
        ("What is 45 times 123?", ["products of more than two digits by two"]),
        ("Multiply 123 by 45.", ["products of more than two digits by two"]),
        ("300 + 1 + 2", ["chains of numbers above 99"]),
        ("1 + 2 + 3 + 4 + 5", ["chains of more than three operations"]),
        ("a b c d e f g h 1", ['the words "b", "c", "d", "e"']),
        ("7" * 100_000, ["numbers of more than four digits"]),
    ],
)
def test_what_it_never_saw_is_found(question: str, found: list[str]) -> None:
    known = domain_of(EMBEDDED)
    assert known and known.outside(question) == found


def test_what_it_never_saw_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of the embedded checkpoint, however it is named; of no other folder."""
    os.symlink(EMBEDDED, tmp_path / "link")
    shutil.copytree(EMBEDDED, tmp_path / "copy")
    said = {}
    for folder in ("link", "copy"):
        asked = ["--model", str(tmp_path / folder), "--new", "2", "--system", "x", "12 / 4"]
        assert main(["--device", "cpu", *asked]) == 0
        said[folder] = capsys.readouterr().err.splitlines()[:-1]
    assert said["copy"] == [] and len(said["link"]) == 1
    warned = 'r1: do not trust this answer: tiny-r1 never saw the sign "/" or a system prompt'
    assert said["link"][0].startswith(warned)


# ---------------------------- the line of timings, and --help
def test_the_start_up_is_told_apart() -> None:
    """From the prompt's time and the rate. (Which calls have one: test_start_up.py.)"""
    done = Completion([1] * 11, "length", 2500, ttft=0.05, seconds=0.15, start_up=3.21)
    assert timings(done, 11, ["compiling", "capturing"]) == (
        "[start-up 3.2 s (compiling, capturing); 2,500 tokens read, first of 11 new after 50 ms, "
        "then 100.0 tokens/s (10.00 ms each); cut off at --new 11]"
    )
    done.start_up = 0.0
    assert timings(done, 12, []).startswith("[2,500 tokens read")
    assert timings(done, 12, []).endswith("; cut off at the end of the context]")


PARSERS: dict[str, argparse.ArgumentParser] = {
    "r1": chat_parser(),
    "bench": bench_parser(EMBEDDED),
    "r1.tour": tour_parser(),
}


@pytest.mark.parametrize("name", PARSERS)
def test_help_explains_every_flag(name: str) -> None:
    """In a text, and in the flags' own spelling. A tour has fewer switches."""
    command = PARSERS[name]
    fields = [field.name for field in dataclasses.fields(Backend)]
    assert list(explanations()) == fields
    actions = {flag: action for action in command._actions for flag in action.option_strings}
    switches = SWITCHES if name == "r1.tour" else fields
    assert {f"--{each.replace('_', '-')}" for each in switches} <= actions.keys()
    for flag, action in actions.items():
        text = action.help or ""
        assert 15 < len(text) < 250, flag
        assert "`" not in text and not re.search(rf"\b(?:{'|'.join(fields)})=", text), flag
        named = re.findall(r"--[a-z-]+", text)
        assert set(named) <= {*actions, "--compare"}, flag
    shown = command.format_help()
    assert all(flag in shown for flag in actions)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for command in PARSERS.values():
        with pytest.raises(SystemExit) as end:
            command.parse_args(["--version"])
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(f"r1 {r1.__version__}, torch ")


DASH = ": put -- before a text that begins with a dash"


def test_a_wrong_argument_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in PARSERS.items():
        for flag, said in (
            ("--new=many", "--new: 'many': give "),
            ("--moe=some", "--moe: invalid choice: 'some' (choose from "),
            ("--no-such", "unrecognized arguments: --no-such; --help"),
            ("-5+3", f"unrecognized arguments: -5+3{'' if name == 'bench' else DASH}; --help"),
        ):
            with pytest.raises(SystemExit) as end:
                command.parse_args([flag])
            assert end.value.code == 2
            err = capsys.readouterr().err
            assert err.startswith(f"{name}: {said}") and err.endswith("; --help lists the flags\n")
            assert err.count("\n") == 1


def test_an_engine_shows_what_it_is() -> None:
    engine = r1.load(EMBEDDED, Backend(device="cpu"), quiet=True)
    assert repr(engine).startswith("<r1.Engine: deepseek_v3, 5 layers, 3,159,184 parameters; ")
    assert "device=cpu, dtype=fp32, attention=absorbed" in repr(engine)


# ---------------------------- installed
def test_a_plain_install_has_its_weights(tmp_path: Path) -> None:
    """A wheel, unpacked beside no checkout: the package finds the checkpoint that is in it."""
    pytest.importorskip("setuptools")
    source, installed = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("r1", "weights", "pyproject.toml", "README.md", "LICENSE", "bench.py"):
        copy: Any = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"r1-{r1.__version__}-")
    shutil.unpack_archive(wheel, installed, "zip")
    look = "import bench, r1; from r1.files.embedded import EMBEDDED; print(EMBEDDED)"
    done = subprocess.run(
        [sys.executable, "-c", look],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    found = Path(done.stdout.strip())
    assert found == installed / "r1" / "weights" / "tiny-r1"
    assert {f.name for f in found.iterdir()} == {f.name for f in EMBEDDED.iterdir()}
