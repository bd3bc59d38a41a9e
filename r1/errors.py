"""Two ways in which a command ends early: unusable input, and a closed stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MOST_CHARACTERS = 4000
"""The longest message that is shown whole. A file's field may be a text of megabytes."""


def printable(text: str) -> str:
    """The text on one line, with escapes for control characters.

    Names and contents of files are shown in messages. A file must not move the cursor of a
    terminal, clear it, or reverse the direction of its text.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


_as_flags: ContextVar[bool] = ContextVar("as_flags", default=False)
FLAGS = {"max_new_tokens": "new"}
"""Flags whose name is not their setting's."""


def setting(name: str, value: object = None) -> str:
    """A setting as whoever reads the message writes it: `moe=loop`, or `--moe loop` in a command.

    Without a value it is the name alone.
    """
    if _as_flags.get():
        name, between = "--" + FLAGS.get(name, name).replace("_", "-"), " "
    else:
        between = "="
    return name if value is None else f"{name}{between}{value}"


@contextmanager
def flags_spelling() -> Iterator[None]:
    """Inside this context `setting` writes flags: for the commands, whose users type flags."""
    before = _as_flags.set(True)
    try:
        yield
    finally:
        _as_flags.reset(before)


class InputError(ValueError):
    """The user gave something unusable: a file, a field, a switch, a prompt.

    The message is one sentence on one line, without control characters. It says what is wrong,
    where, and what to do; `setting` writes the switches in it. The commands print it without a
    traceback and exit with status 2. Any other exception that reaches the user is a bug in r1.
    """

    def __init__(self, message: object) -> None:
        """Control characters in `message` are escaped. The middle of a very long one is cut out."""
        line = printable(str(message))
        if len(line) > MOST_CHARACTERS:
            half = MOST_CHARACTERS // 2
            line = f"{line[:half]} ... {line[-half:]}"
        super().__init__(line)


def hung_up() -> int:
    """Discard the rest of stdout after a BrokenPipeError, and return the exit status.

    The reader of stdout has closed the pipe. Without this, Python would fail again when it flushes
    stdout at exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
