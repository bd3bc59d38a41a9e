"""Ctrl-C while a command still imports: it ends at once, and prints no traceback of an import.

Importing torch takes seconds. Nothing has begun then, so there is nothing to finish.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import pairwise

COMMANDS = (("-m", "r1"), ("-m", "r1.tour"), ("-m", "r1.guide"))


def is_command() -> bool:
    """Whether Python imports r1 to run one of COMMANDS, and not for a program of somebody else's.

    While it looks for the module of `-m`, sys.argv begins with "-m".
    """
    return sys.argv[:1] == ["-m"] and any(pair in COMMANDS for pair in pairwise(sys.orig_argv))


def begin() -> None:
    """Handle Ctrl-C until `done`, unless the caller ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def done() -> None:
    """The imports are done: Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(_number: int, _frame: object) -> None:
    os._exit(130)
