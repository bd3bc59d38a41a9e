"""`python -m r1` with its model loaded: one question, or a chat in a terminal or through pipes."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

import r1
from r1 import streams
from r1.files.embedded import Domain
from r1.placement.ranks import Line

DIM, PLAIN = "\x1b[2m", "\x1b[0m"  # a terminal's codes for dimmed and for ordinary text
PROMPT = "> "


class Conversation:
    """Asks the model, shows its answers, and keeps what was said."""

    def __init__(
        self,
        engine: r1.Engine,
        arguments: argparse.Namespace,
        domain: Domain | None,
        line: Line | None = None,
    ) -> None:
        """`arguments` are the command's. With a `domain` each question stands alone.

        `line` leads to the other processes that share the model (`follow`). Raises InputError for a
        system prompt that is no text.
        """
        self.engine, self.arguments, self.domain, self.line = engine, arguments, domain, line
        system = arguments.system
        if system:
            _check_text("the system prompt", system)
        self.first = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self.first)
        self.introduced = False
        """Whether the banner has told what the model knows."""

    def ask(self, question: str) -> None:
        """Print the answer as it is generated, then a line of timings on stderr.

        Raises InputError for a question that the model can't take, and KeyboardInterrupt. The
        conversation is then as it was before.
        """
        _check_text("your question", question)
        if self.domain:
            self._warn(self.domain, question)
        turn = [*self.messages, {"role": "user", "content": question}]
        arguments, painter = self.arguments, Painter()
        if not self.engine.start_up.done:
            painter.announce(self.engine.start_up.work)
        asked = (
            turn, arguments.new, arguments.temperature, arguments.top_p, arguments.seed,
            arguments.think,
        )  # fmt: skip
        try:
            if self.line:
                self.line.send(asked)
            completion = self.engine.chat(*asked, on_text=painter.show)
        finally:
            painter.end()
        streams.complain(timings(completion, arguments.new, self.engine.start_up.work))
        if not self.domain:
            self.messages = [*turn, {"role": "assistant", "content": completion.answer}]

    def _warn(self, domain: Domain, question: str) -> None:
        """Say what of a question the model was not trained for."""
        strange = domain.outside(question) + ["a system prompt"] * len(self.first)
        if strange:
            knows = "" if self.introduced else f" (it knows {domain.knows})"
            never = f"{domain.name} never saw {' or '.join(strange)} in training{knows}"
            streams.complain(f"r1: do not trust this answer: {never}")

    def chat(self) -> int:
        """Answer questions from stdin until its end. Returns the exit status."""
        terminal = sys.stdin.isatty()
        if terminal:
            with contextlib.suppress(ImportError):  # Windows has none
                import readline  # noqa: F401 - input() then edits lines and remembers them
            streams.complain(self.banner())
            self.introduced = True
        while True:
            line = ""
            try:
                line = _read_line(terminal).strip()
                if line == "/exit":
                    return 0
                self._obey(line)
            except EOFError:
                if terminal:
                    streams.complain("")
                return 0
            except r1.InputError as error:
                streams.complain(f"r1: {error}")
            except KeyboardInterrupt:
                if not terminal:
                    raise
                streams.complain("[stopped]" if line else "\n[/exit or Ctrl-D ends]")

    def _obey(self, line: str) -> None:
        """Run a command of the chat, or ask."""
        if line == "/new":
            self.messages = list(self.first)
            streams.complain("[a new conversation]")
        elif line.lower() in ("exit", "quit"):
            streams.complain("r1: /exit or Ctrl-D ends")
        elif line.startswith("/") and line[1:].isalpha():
            streams.complain(f"r1: {line} is no command: there are /new and /exit")
        elif line:
            self.ask(line)

    def banner(self) -> str:
        """What a chat begins with."""
        keys = "Ctrl-C stops an answer; /exit or Ctrl-D ends."
        if not self.domain:
            return f"Ask something. {keys} /new starts a new conversation."
        return (
            f"{self.domain.name} was trained on {self.domain.knows}. It knows nothing else, and "
            f"each question stands alone.\nTry: {self.domain.example}\n{keys}"
        )


def follow(engine: r1.Engine, line: Line) -> None:
    """On the processes that do not talk: compute along what rank 0 asks, until it ends."""
    while (asked := line.receive()) is not None:
        with contextlib.suppress(r1.InputError):  # rank 0 has the same, and tells it
            engine.chat(*asked)


class Painter:
    """Writes text as it comes, in a terminal the reasoning dimmed."""

    def __init__(self) -> None:
        self.color = sys.stdout.isatty()
        self.dimmed = self.announced = self.begun = False

    def announce(self, work: list[str]) -> None:
        """In a terminal, say why nothing comes yet. The first text takes its place."""
        if work:
            streams.status(f"[{', '.join(work)} ...]")
            self.announced = True

    def show(self, reasoning: str, answer: str) -> None:
        """Write the next pieces of both."""
        self._clear()
        for text, dim in ((reasoning, True), (answer, False)):
            if text and self.color and dim != self.dimmed:
                streams.write(DIM if dim else PLAIN, end="")
                self.dimmed = dim
            streams.write(text, end="")
            self.begun |= bool(text)

    def end(self) -> None:
        """End the line that was begun, and the dimming."""
        self._clear()
        if self.begun:
            streams.write(PLAIN if self.dimmed else "")

    def _clear(self) -> None:
        if self.announced:
            streams.status("")
            self.announced = False


def read_question(text: str) -> str:
    """The question as the command line gives it: "-" stands for all of stdin."""
    if text != "-":
        question, source = text, "the question"
    else:
        question, source = sys.stdin.read().strip("\n"), "stdin"
    if not question.strip():
        raise r1.InputError(f"{source} is empty: ask something, or give no question to chat")
    return question


def timings(completion: r1.Completion, limit: int, work: list[str]) -> str:
    """One line about the time and the tokens of a completion of at most `limit` tokens.

    `work` is what its start-up did.
    """
    count = len(completion.tokens)
    line = (
        f"{completion.prompt_tokens:,} tokens read, first of {count:,} new after "
        f"{completion.ttft * 1e3:,.0f} ms"
    )
    if completion.tpot:
        line += f", then {1 / completion.tpot:,.1f} tokens/s ({completion.tpot * 1e3:.2f} ms each)"
    if completion.drafted:
        line += (
            f", {completion.acceptance:.0%} of drafts accepted: "
            f"{completion.tokens_per_step:.2f} tokens a step"
        )
    if completion.start_up:
        line = f"start-up {completion.start_up:.1f} s ({', '.join(work)}); {line}"
    if completion.finish != "stop":
        line += f"; cut off at {f'--new {limit}' if count == limit else 'the end of the context'}"
    return f"[{line}]"


def _check_text(what: str, text: str) -> None:
    """Raise InputError for bytes that could not be read as text (streams.py)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = f"a byte that is no {sys.stdin.encoding} text, at character {error.start + 1}"
        raise r1.InputError(f"{what} holds {wrong}: convert it to UTF-8") from None


def _read_line(terminal: bool) -> str:
    """The next line of stdin. Raises EOFError at its end."""
    if not terminal:
        return input()
    if sys.stdout.isatty():
        return input(PROMPT)
    streams.complain(PROMPT, end="")
    return input()
