"""What the panels share: colours, axes, titles, and how numbers are written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

# Okabe and Ito's colours, which colour-blind people can tell apart. GHOST and COSTS also differ
# from the others in lightness.
BASELINE = "#D55E00"
FASTER = "#0072B2"
FLOOR = "#007A5A"
COSTS = "#E69F00"
GHOST = "#D6E6F2"
GREY = "#6B6B6B"
FAILED = "#9A9A9A"

STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "hatch.linewidth": 0.8,
    "svg.hashsalt": "r1",  # the same picture is the same file
    "text.parse_math": False,  # a $ in a name is a $
}
LOG_FROM = 20
"""An axis is logarithmic if its largest value is more than this many times its smallest."""


def ticks(axes: Axes, axis: str, log: bool, limits: tuple[float, float]) -> None:
    """Set an axis's ticks to plain numbers.

    On a logarithmic axis they are 1, 2, 5, 10, ... or, if that gives fewer than three, a few round
    numbers, as on a linear axis.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    which = getattr(axes, f"{axis}axis")
    round_numbers = MaxNLocator(6, steps=[1, 2, 5, 10])
    if log:
        marks = [
            m * 10**e
            for e in range(-6, 12)
            for m in (1, 2, 5)
            if limits[0] <= m * 10**e <= limits[1]
        ]
        if len(marks) < 3:
            which.set_major_locator(FixedLocator(round_numbers.tick_values(*limits)))
        else:
            which.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if len(marks) <= 7 else (1.0,)))
    else:
        which.set_major_locator(round_numbers)
    which.set_minor_locator(NullLocator())
    which.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def set_title(axes: Axes, title: str, small: str) -> None:
    """Write a panel's title and, below it, in small, the sizes of its workload."""
    axes.set_title(title, pad=22 if small else 8)
    axes.annotate(small, (0, 1), (0, 7), "axes fraction", "offset points", size=9.5, color=GREY)


def sizes_text(r: Row, batch: bool = True) -> str:
    """The sizes of a row's workload, with or without the batch."""
    deep = f" behind {r['depth']:,} in the cache" if r["depth"] else ""
    return (
        f"batch {r['batch']}, " * batch + f"{r['prompt']:,} prompt + {r['new']:,} new tokens{deep}"
    )


def milliseconds(value: float) -> str:
    """A time, with about three digits."""
    return f"{value:.{3 if value < 0.1 else 2 if value < 10 else 1 if value < 100 else 0}f} ms"


def rate(value: float) -> str:
    """Tokens per second, with about three digits."""
    return f"{value:,.{2 if value < 1 else 1 if value < 10 else 0}f} tok/s"
