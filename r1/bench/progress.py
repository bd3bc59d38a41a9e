"""What a measurement says on stderr while it runs.

On a terminal one line is written again and again. A file or a pipe gets a line for each arm.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from r1 import streams
from r1.bench.arms import Arm

PAIR, COMPILED = 0.5, 3.0
"""How long a pair takes, which is only built and checked, and an arm that compiles: guesses, in
times of a timed arm that does not."""


def weight(arm: Arm) -> float:
    """How long an arm takes, in times of a timed arm that does not compile."""
    return (1.0 if arm.timed else PAIR) * (COMPILED if arm.backend.compile else 1.0)


def say(text: str) -> None:
    """Replace the progress line by `text`, if stderr is a terminal. An empty text clears it."""
    streams.status(text)


class Progress:
    """Counts the arms of a run, and estimates the time that the rest of them takes."""

    def __init__(
        self, weights: Sequence[float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`weights`: of each arm, in the order of measuring. `clock` returns seconds."""
        self.weights = weights
        self.clock = clock
        self.start = 0.0
        """When the first arm began. The reference before it is made once, not for each arm."""
        self.at = 0
        """How many arms are begun or skipped."""
        self.measured = 0.0
        """The weights of those that were begun before the last one: they are done."""
        self.last = 0.0

    def begin(self, name: str) -> str:
        """Count the next arm, and write its line where stderr is no terminal.

        Returns the arm's title: its number, the time that is left, and its name.
        """
        if not self.last:
            self.start = self.clock()
        self.measured, self.last = self.measured + self.last, self.weights[self.at]
        rest = sum(self.weights[self.at :])
        self.at += 1
        title = f"arm {self.at} of {len(self.weights)}"
        if self.measured:
            title += f", {left(rest * (self.clock() - self.start) / self.measured)}"
        title += f": {name}"
        if not sys.stderr.isatty():
            streams.complain(f"bench: {title}")
        return title

    def skip_to(self, number: int) -> None:
        """Go on with arm `number`, counted from 0: those before it are done, or can't be had."""
        self.at = number


def left(seconds: float) -> str:
    """A time that is only estimated, in words."""
    if seconds < 95:
        return f"about {max(10, round(seconds, -1)):.0f} s left"
    minutes = round(seconds / 60)
    return f"about {minutes} min left" if minutes < 100 else f"about {seconds / 3600:.0f} h left"
