"""The standard streams of a command: they take any text, and a failure to write is one sentence."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable

from r1.errors import InputError, flags_spelling, hung_up


def prepare() -> None:
    """Let the streams take any text. Call it first in a command.

    A character that the terminal's encoding lacks is written as an escape, as Python does on
    stderr. Input that is not of the encoding is read as half surrogate pairs, which a tokenizer
    refuses in a sentence. A stream that the caller has closed becomes the null device.
    """
    for name, mode, errors in (
        ("stdin", "r", "surrogateescape"),
        ("stdout", "w", "backslashreplace"),
        ("stderr", "w", "backslashreplace"),
    ):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def write(text: str, end: str = "\n") -> None:
    """Print to stdout, at once. Raises InputError for a full disk, or a terminal that is gone.

    Raises BrokenPipeError if the reader of a pipe is gone, which is no mistake.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        hung_up()
        raise InputError(f"stdout can't be written ({error.strerror}): give it another") from None


def status(text: str) -> None:
    """Put `text` in place of the last line of stderr, if that is a terminal; empty: clear it.

    It is cut to the terminal's width: of a line that goes on in the next one, only the end could be
    replaced.
    """
    if sys.stderr.isatty():
        try:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
        except OSError:  # its width is not known
            width = 0
        complain(f"\r\x1b[K{text[: (width or 80) - 1]}", end="")


def complain(sentence: str, end: str = "\n") -> None:
    """Print to stderr, if somebody is there: a terminal may be closed."""
    with contextlib.suppress(OSError):
        print(sentence, end=end, file=sys.stderr, flush=True)


def ended(speaker: str, work: Callable[[], object]) -> int:
    """Do the work of a command of one process, and return its exit status.

    0: success. 1: the reader of stdout closed it. 2: unusable input. 130: interrupted by Ctrl-C.
    """
    prepare()
    try:
        with flags_spelling():
            work()
    except InputError as error:
        complain(f"{speaker}: {error}")
        return 2
    except BrokenPipeError:
        return hung_up()
    except KeyboardInterrupt:
        return 130
    return 0
