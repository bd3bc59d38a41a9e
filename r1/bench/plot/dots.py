"""The panel of dots: the time per token of each step, or of each switch, on a logarithmic axis.

The same factor is the same distance everywhere on such an axis, and it needs no zero.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from r1.bench.plot.select import is_timed
from r1.bench.plot.style import (
    BASELINE,
    COSTS,
    FAILED,
    FASTER,
    FLOOR,
    GHOST,
    GREY,
    Row,
    milliseconds,
    rate,
    set_title,
    sizes_text,
    ticks,
)
from r1.bench.report.table import ratio
from r1.bench.report.types import LARGEST, SMALLEST

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIMITS = {"compute": "arithmetic", "launches": "kernel launches", "framework": "Python and torch"}
"""How the panel names a row's `bottleneck`. Others keep their names."""
BESIDE: dict[str, Any] = {
    "xytext": (14, 0),
    "textcoords": "offset points",
    "va": "center",
    "annotation_clip": False,
}
"""Text to the right of the dots."""
FAR = 10
"""A floor that lies this many times below the dots is not drawn, as it would press them together.

If the dots themselves span a larger factor, the floor may lie as far below them."""
LEAST = 0.01
"""The smallest share that counts as saved: rungs are measured minutes apart, and clocks drift."""
MARGIN = 1.12
"""The space left and right of the dots, as a factor."""


def draw_dots(axes: Axes, rows: list[Row]) -> Callable[[], None]:
    """One dot per arm, and a line for the range of its repetitions.

    A pale bar leads from the step before it, or without a ladder from the baseline. Call the
    result, once the panel has its size, to make room for the texts.
    """
    floor = _fastest_with_floor(rows)
    shown = [x for r in rows if is_timed(r) for x in _range(r)]
    span = max(FAR, max(shown) / min(shown))
    if floor and floor["floor_ms"] * span >= min(shown):
        shown.append(floor["floor_ms"])
    low, high = min(shown) / MARGIN, max(shown) * MARGIN
    axes.set_xscale("log")
    names = [textwrap.fill(str(r["arm"]), 28, max_lines=2, placeholder=" …") for r in rows]
    ladder = any(r["kind"] == "ladder" for r in rows)
    texts = _draw_arms(axes, rows, ladder, high)
    if floor:
        texts += _draw_floor(axes, floor, len(rows), (low, high))
        names.append("the hardware's floor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(
        "milliseconds per generated token, logarithmic (further left is faster)", loc="left"
    )
    _set_title(axes, rows, ladder)
    for text in texts:
        text.set_in_layout(False)  # or the layout would shrink the panel: _fit makes room instead
    return lambda: _fit(axes, texts, low, high)


def _fastest_with_floor(rows: list[Row]) -> Row | None:
    """The fastest arm that passes parity and has a floor."""
    return min(
        (r for r in rows if is_timed(r) and r["parity"] and r.get("floor_ms")),
        key=lambda r: float(r["tpot_ms"]),
        default=None,
    )


def _draw_arms(axes: Axes, rows: list[Row], ladder: bool, texts_at: float) -> list[Any]:
    """Draw all dots, and their texts, which begin at `texts_at`. Returns the texts."""
    texts: list[Any] = []
    before: Row | None = None
    for y, r in enumerate(rows):
        if is_timed(r):
            _draw_arm(axes, y, r, before)
        first, second = _words(r, before)
        for text, dy, style in (
            (first, 0.0 if not second else -0.17, {"weight": "bold"}),
            (second, 0.19, {"size": 9.5}),
        ):
            color = "black" if r.get("parity") and dy <= 0 else GREY
            texts.append(axes.annotate(text, (texts_at, y + dy), color=color, **BESIDE, **style))
        if is_timed(r) and r["parity"] and (ladder or r["kind"] == "baseline"):
            before = r
    return texts


def _draw_arm(axes: Axes, y: int, r: Row, before: Row | None) -> None:
    """Draw one arm: its dot, the range of its repetitions, and the way from the step before."""
    t, (low, high) = r["tpot_ms"], _range(r)
    if not r["parity"]:
        axes.plot([t], [y], "X", color=FAILED, markersize=10)
        return
    if before:
        was = before["tpot_ms"]
        color = GHOST if t < was else COSTS
        axes.plot([t, was], [y, y], color=color, linewidth=9, solid_capstyle="butt", zorder=1)
    color = BASELINE if r["kind"] == "baseline" else FASTER
    if len(r.get("repetitions") or []) > 1:
        axes.plot([low, high], [y, y], color=color, linewidth=2, zorder=2)
    axes.plot([t], [y], "o", color=color, markersize=9, zorder=3)


def _range(r: Row) -> tuple[float, float]:
    """The fastest and the slowest repetition, in milliseconds per token, and the median."""
    repetitions, tokens = r.get("repetitions") or [], max(1, r["new"] - 1)
    each = [1e3 * (one["total"] - one["ttft"]) / tokens for one in repetitions]
    each = [t for t in each if SMALLEST <= t <= LARGEST] + [r["tpot_ms"]]
    return min(each), max(each)


def _draw_floor(axes: Axes, floor: Row, y: int, limits: tuple[float, float]) -> list[Any]:
    """Draw the hardware's limit as the last dot, and as a line. Returns its texts.

    Left of the `limits` of the dots there is only an arrow that points to it.
    """
    x, (low, texts_at) = floor["floor_ms"], limits
    if x < low:
        axes.plot([low * MARGIN**0.5], [y], "<", color=FLOOR, markersize=9)
    else:
        axes.plot([x, x], [-0.5, y], color=FLOOR, linestyle="--", linewidth=1.5, zorder=0)
        axes.plot([x], [y], "o", color="white", markeredgecolor=FLOOR, markersize=9, clip_on=False)
    where = {**BESIDE, "color": FLOOR}
    words = f"{milliseconds(x)} · {rate(floor['batch'] / x * 1e3)}"
    reached = f"the fastest arm reaches {_share(x / floor['tpot_ms'])} of it"
    least = f"what memory and arithmetic allow · {reached}"
    return [
        axes.annotate(words, (texts_at, y - 0.17), weight="bold", **where),
        axes.annotate(least, (texts_at, y + 0.19), size=9.5, **where),
    ]


def _share(value: float) -> str:
    """A share of 1, in percent, with at least one digit that is not 0."""
    return f"{value:.0%}" if value >= 0.01 else f"{100 * value:.1g}%"


def _set_title(axes: Axes, rows: list[Row], ladder: bool) -> None:
    """Write the panel's title and, in small, its workload."""
    if len(rows) == 1:
        set_title(axes, "Time per token", sizes_text(rows[0]))
        return
    title, other = (
        ("What each step saves: it adds one switch to those above it", "the step before")
        if ladder
        else ("What each switch saves alone", "the baseline")
    )
    set_title(axes, title, f"{sizes_text(rows[0])} · pale: the difference from {other}")


def _fit(axes: Axes, texts: list[Any], low: float, high: float) -> None:
    """Make the axis longer than the dots' part of it, from `low` to `high`, to hold the texts."""
    wide = max(t.get_window_extent().width for t in texts) + 50
    share = max(0.15, 1 - wide / axes.get_window_extent().width)  # of the width, for the dots
    axes.set_xlim(low, low * (high / low) ** (1 / share))
    ticks(axes, "x", True, (low, high))
    marks = [t for t in axes.get_xticks() if low <= t <= high]
    axes.set_xticks(marks)
    axes.spines["bottom"].set_bounds(low, high)  # right of the dots there is only text
    for x in marks:
        axes.plot([x, x], list(axes.get_ylim()), color="#EBEBEB", linewidth=0.8, zorder=-1)


def _words(r: Row, before: Row | None) -> tuple[str, str]:
    """The two texts of an arm: its time and rate; below, in small, what it changed."""
    if not is_timed(r):
        return "n/a", textwrap.shorten(
            r.get("refused") or "no time per token", 75, placeholder=" …"
        )
    if not r["parity"]:
        return (
            "parity fails",
            f"{milliseconds(r['tpot_ms'])}, but its numbers are not the reference's: "
            "no speed-up counts",
        )
    first = f"{milliseconds(r['tpot_ms'])} · {rate(r['decode_tok_s'])}"
    parts = []
    if before is not None:
        saved = before["tpot_ms"] - r["tpot_ms"]
        if _noise(r, before):
            parts.append("no difference beyond the noise")
        elif abs(saved) < LEAST * before["tpot_ms"]:
            parts.append(f"within {LEAST:.0%} of the step before")
        else:
            parts.append(
                f"saves {milliseconds(saved)}" if saved > 0 else f"costs {milliseconds(-saved)}"
            )
        if r.get("speedup") and not r.get("within_noise"):
            parts.append(f"{ratio(r['speedup'])}× the baseline's speed")
    if bound := r.get("bottleneck"):
        parts.append(f"limited by {LIMITS.get(bound, bound)}")
    return first, " · ".join(parts)


def _noise(r: Row, before: Row) -> bool:
    """Whether the repetitions of an arm and of the step before it do not tell them apart.

    The baseline's ran in turn with the arm's, and the row says what came out. Two rungs of a ladder
    were measured one after the other: there is no difference if their ranges overlap.
    """
    if before["kind"] == "baseline":
        return bool(r.get("within_noise"))
    if min(len(each.get("repetitions") or []) for each in (r, before)) < 2:
        return False
    (low, high), (lower, higher) = _range(r), _range(before)
    return low <= higher and lower <= high
