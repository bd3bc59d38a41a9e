"""What `python -m r1` hands to the model, what it keeps of a chat, and what it prints of an answer.

Holds r1/__main__.py to account. A stand-in answers in place of a model. test_generate.py runs the
command on the embedded checkpoint, test_command_streams.py on other terminals.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from command import TIMING
from models import TINY

import r1
from r1 import Backend, Completion, Engine
from r1.__main__ import main
from r1.conversation import timings

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Model:
    """Keeps the arguments of each `Engine.chat`, and gives the next of `replies`.

    A reply is the (reasoning, answer) pieces of a stream, which an error may end, or an error.
    """

    cautions = ("mind the step",)
    config, backend = TINY, Backend(device="cpu", dtype="fp32")
    start_up = SimpleNamespace(done={()}, work=[])

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.replies: Iterator[Any] = iter(())

    def chat(self, *given: Any, **named: Any) -> Completion:
        bound = inspect.signature(Engine.chat).bind(self, *given, **named)
        bound.apply_defaults()
        pieces = next(self.replies, [("r", "a")])
        if isinstance(pieces, BaseException):
            raise pieces
        on_text = bound.arguments.pop("on_text")
        del bound.arguments["self"]
        self.asked.append(dict(bound.arguments))
        for piece in pieces:
            if isinstance(piece, BaseException):
                raise piece
            on_text(*piece)
        reasoning, answer = ("".join(part) for part in zip(*pieces, strict=True))
        return Completion([1, 2], "stop", 3, 0.1, 0.2, reasoning + answer, reasoning, answer)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    made = Model()
    monkeypatch.setattr(r1, "load", lambda *_, **__: made)
    monkeypatch.setattr("r1.__main__.domain_of", lambda _: None)  # of one question after the other
    return made


def said(who: str, text: str) -> dict[str, str]:
    return {"role": who, "content": text}


def test_every_flag_reaches_the_model(model: Model) -> None:
    flags = ["--new=7", "--temperature=0.25", "--top-p=0.5", "--seed=3", "--no-think", "--system=S"]
    assert main(["question"]) == main([*flags, "question"]) == 0
    assert model.asked == [
        dict(messages=[said("user", "question")], max_new_tokens=1024, temperature=0.6, top_p=0.95,
             seed=None, think=True),
        dict(messages=[said("system", "S"), said("user", "question")], max_new_tokens=7,
             temperature=0.25, top_p=0.5, seed=3, think=False),
    ]  # fmt: skip


def test_a_chat_remembers_answers_without_their_reasoning(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A turn that fails is not remembered, nor is an empty line a turn. A caution comes once."""
    lines = iter(["one", " ", "two", "three"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines, None) or raise_eof())
    model.replies = iter([[("think", ""), ("", "uno")], r1.InputError("too long"), [("", "tres")]])
    assert main(["--system", "S"]) == 0
    history = [said("system", "S"), said("user", "one")]
    assert [each["messages"] for each in model.asked] == [
        history, [*history, said("assistant", "uno"), said("user", "three")],
    ]  # fmt: skip
    lines_of_stderr = capsys.readouterr().err.splitlines()
    assert lines_of_stderr[0] == "r1: mind the step" and lines_of_stderr.count("r1: too long") == 1
    assert sum(bool(TIMING.match(line)) for line in lines_of_stderr) == 2


def raise_eof() -> str:
    raise EOFError


@pytest.mark.parametrize(
    ("pieces", "terminal"),
    [
        ([("a", ""), ("b", ""), ("c", "d"), ("", "e")], f"{DIM}abc{PLAIN}de\n"),
        ([("a", ""), ("b", "")], f"{DIM}ab{PLAIN}\n"),  # cut off while it reasons
        ([("", "a"), ("", "b")], "ab\n"),
    ],
)
def test_reasoning_is_dimmed_on_a_terminal(
    pieces: list[tuple[str, str]], terminal: str, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = terminal.replace(DIM, "").replace(PLAIN, "").rstrip("\n")
    for is_terminal, wanted in ((True, terminal), (False, f"{plain}\n")):
        model.replies = iter([pieces])
        with mock.patch("sys.stdout.isatty", lambda shown=is_terminal: shown):
            assert main(["question"]) == 0
        assert capsys.readouterr().out == wanted


def test_an_interrupt_leaves_no_terminal_dimmed(
    model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor a line that was begun."""
    for is_terminal, wanted in ((True, f"{DIM}a{PLAIN}\n"), (False, "a\n")):
        model.replies = iter([[("a", ""), KeyboardInterrupt()]])
        with mock.patch("sys.stdout.isatty", lambda shown=is_terminal: shown):
            assert main(["question"]) == 130
        assert capsys.readouterr().out == wanted


def test_a_reader_that_has_gone_is_no_mistake(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("r1.__main__.hung_up", lambda: 1)
    model.replies = iter([BrokenPipeError()])
    assert main(["question"]) == 1
    assert capsys.readouterr().err == "r1: mind the step\n"


def test_the_line_of_timings() -> None:
    """5 tokens, the first after 0.2 s, then one each 0.5 s; 2 of 4 drafts accepted in 2 steps."""
    done = Completion([1, 2, 3, 4, 5], "stop", 3, ttft=0.2, seconds=2.2)
    read = "3 tokens read, first of {} new after 200 ms"
    rate = ", then 2.0 tokens/s (500.00 ms each)"
    assert timings(done, 5, []) == f"[{read.format(5)}{rate}]"
    done.finish = "length"
    assert timings(done, 5, []) == f"[{read.format(5)}{rate}; cut off at --new 5]"
    cut = "; cut off at the end of the context"
    assert timings(done, 6, []) == f"[{read.format(5)}{rate}{cut}]"
    done.steps, done.drafted, done.accepted, done.start_up = 2, 4, 2, 1.25
    drafts = ", 50% of drafts accepted: 2.00 tokens a step"
    begun = "[start-up 1.2 s (compiling, capturing); "
    line = f"{begun}{read.format(5)}{rate}{drafts}{cut}]"
    assert timings(done, 6, ["compiling", "capturing"]) == line
    assert timings(Completion([1], "stop", 3, 0.2, 0.2), 1, []) == f"[{read.format(1)}]"
