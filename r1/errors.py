"""How a command ends other than well: input that can't be used, or a reader of its output that hung
up."""

from __future__ import annotations

import os
import sys


class InputError(ValueError):
    """Something that we were given can't be used: a file, a field, a switch, a prompt.

    The message is one sentence that says what is wrong, where, and what to do about it. The
    commands print it without a traceback and exit with status 2; anything else that escapes is a
    bug of ours."""


def hung_up() -> int:
    """After a BrokenPipeError: nobody reads stdout any more, so that what is left of it goes
    nowhere. Returns the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
