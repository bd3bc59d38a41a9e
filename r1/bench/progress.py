"""The progress line on stderr."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Replace the progress line by `text`, if stderr is a terminal. An empty text clears it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="" if text else "\r", file=sys.stderr, flush=True)
