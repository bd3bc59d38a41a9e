"""Two ways in which a command ends early: unusable input, and a closed stdout."""

from __future__ import annotations

import os
import sys


class InputError(ValueError):
    """The user gave something unusable: a file, a field, a switch, a prompt.

    The message is one sentence. It says what is wrong, where, and what to do. The commands print it
    without a traceback and exit with status 2. Any other exception that reaches the user is a bug
    in r1.
    """


def hung_up() -> int:
    """Discard the rest of stdout after a BrokenPipeError, and return the exit status.

    The reader of stdout has closed the pipe. Without this, Python would fail again when it flushes
    stdout at exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
