"""Show the progress of a long job as one line on stderr.

Nothing is printed if stderr is not a terminal, or during the first second.
"""

from __future__ import annotations

import sys
import time

from r1 import streams


class Progress:
    """Counts the bytes that are done: `with Progress("loading", total) as p: p.add(n)`."""

    def __init__(self, job: str, total: int, quiet: bool = False) -> None:
        """`total` is in bytes."""
        self.job, self.total, self.done = job, total, 0
        self.start = self.shown = time.monotonic()
        self.quiet = quiet or not sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def add(self, count: int) -> None:
        """Count `count` more bytes, and print the line at most ten times a second."""
        self.done += count
        now = time.monotonic()
        if self.quiet or now - self.start < 1 or now - self.shown < 0.1:
            return
        self.shown = now
        share, rate = self.done / max(1, self.total), self.done / (now - self.start)
        bar = "█" * int(24 * share) + "░" * (24 - int(24 * share))
        left = (self.total - self.done) / rate
        sizes = f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB"
        streams.status(f"{self.job} {bar} {sizes}, {rate / 1e9:.2f} GB/s, {left:.0f} s left")

    def __exit__(self, *_: object) -> None:
        if self.shown != self.start:
            streams.status("")
