"""The panel of bars: a waterfall of what each step, or each switch, saves."""

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
    LOG_FROM,
    Row,
    milliseconds,
    rate,
    set_title,
    sizes_text,
    ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIMITS = {"compute": "arithmetic", "launches": "kernel launches", "framework": "Python and torch"}
"""How a bar names a row's `bottleneck`. Others keep their names."""
BESIDE: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
"""Text to the right of a point."""


def draw_bars(axes: Axes, rows: list[Row]) -> Callable[[], None]:
    """One bar per arm. A pale part shows the time saved against the step before it.

    Without a ladder it shows the time saved against the baseline. Call the result, once the panel
    has its size, to make room for the texts.
    """
    ladder = any(r["kind"] == "ladder" for r in rows)
    floor = _fastest_with_floor(rows)
    times = [r["tpot_ms"] for r in rows if is_timed(r)]
    log = max(times) > LOG_FROM * min(times)
    if log:
        axes.set_xscale("log")
    left = min([*times, *([floor["floor_ms"]] if floor else [])]) / 2 if log else 0.0
    names = [textwrap.fill(str(r["arm"]), 28, max_lines=2, placeholder=" …") for r in rows]
    # No text begins left of the floor's line, which would cross it.
    texts = _draw_arms(axes, rows, ladder, left, floor["floor_ms"] if floor else left)
    if floor:
        texts += _draw_floor(axes, floor, len(rows), left)
        names.append("the hardware's floor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    scale = ", logarithmic" if log else ""
    axes.set_xlabel(f"milliseconds per generated token{scale} (shorter is faster)", loc="left")
    _set_title(axes, rows, ladder)
    for text in texts:
        text.set_in_layout(False)  # or the layout would shrink the panel: _fit makes room instead
    return lambda: _fit(axes, texts, left, max(times), log)


def _fastest_with_floor(rows: list[Row]) -> Row | None:
    """The fastest arm that passes parity and has a floor."""
    return min(
        (r for r in rows if is_timed(r) and r["parity"] and r.get("floor_ms")),
        key=lambda r: float(r["tpot_ms"]),
        default=None,
    )


def _draw_arms(
    axes: Axes, rows: list[Row], ladder: bool, left: float, texts_from: float
) -> list[Any]:
    """Draw all bars and their texts, which begin at `texts_from` or later. Returns the texts."""
    texts: list[Any] = []
    before: Row | None = None
    for y, r in enumerate(rows):
        end = max(_bar(axes, y, r, before, left), texts_from)
        first, second = _words(r, before)
        for text, dy, style in (
            (first, 0.0 if not second else -0.17, {"weight": "bold"}),
            (second, 0.19, {"size": 9.5}),
        ):
            color = "black" if r.get("parity") and dy <= 0 else GREY
            texts.append(axes.annotate(text, (end, y + dy), color=color, **BESIDE, **style))
        if is_timed(r) and r["parity"] and (ladder or r["kind"] == "baseline"):
            before = r
    return texts


def _draw_floor(axes: Axes, floor: Row, y: int, left: float) -> list[Any]:
    """Draw the hardware's limit as the last bar, and as a line. Returns its texts."""
    x = floor["floor_ms"]
    axes.barh(
        y,
        x - left,
        left=left,
        height=0.6,
        color="white",
        edgecolor=FLOOR,
        linewidth=1.5,
        linestyle="--",
    )
    axes.plot([x, x], [-0.5, y + 0.3], color=FLOOR, linestyle="--", linewidth=1.5)
    where = {**BESIDE, "color": FLOOR}
    words = f"{milliseconds(x)} · {rate(floor['batch'] / x * 1e3)}"
    reached = f"the fastest arm reaches {100 * x / floor['tpot_ms']:.0f}% of this speed"
    least = f"what this machine's memory and arithmetic allow · {reached}"
    return [
        axes.annotate(words, (x, y - 0.17), weight="bold", **where),
        axes.annotate(least, (x, y + 0.19), size=9.5, **where),
    ]


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
    pale = f" · pale: time saved against {other}"
    set_title(axes, title, sizes_text(rows[0]) + pale)


def _fit(axes: Axes, texts: list[Any], low: float, high: float, log: bool) -> None:
    """Widen the axis until each text ends inside it.

    A text keeps its width in pixels, and only its start moves. `low` and `high` are the ends of the
    bars.
    """
    axes.set_xlim(low, high)
    pixels = axes.get_window_extent().width

    def share(x: float) -> float:  # of the axis's width, if it ends at `high`
        start, _ = axes.transData.transform((x, 0))
        return float((start - axes.get_window_extent().x0) / pixels)

    wanted = max(
        share(t.xy[0]) / (1 - min(0.85, (t.get_window_extent().width + 16) / pixels)) for t in texts
    )
    wanted = max(wanted, 1.02)
    axes.set_xlim(low, low * (high / low) ** wanted if log else high * wanted)
    ticks(axes, "x", log, (low, high))
    axes.set_xticks([t for t in axes.get_xticks() if low <= t <= high])
    axes.spines["bottom"].set_bounds(low, high)  # right of the longest bar there is only text


def _bar(axes: Axes, y: int, r: Row, before: Row | None, left: float) -> float:
    """Draw one arm. Returns where its bar ends."""
    if not is_timed(r):
        return left
    t = r["tpot_ms"]
    if not r["parity"]:
        axes.barh(
            y,
            t - left,
            left=left,
            height=0.6,
            color="#EDEDED",
            edgecolor=FAILED,
            hatch="///",
            linewidth=0.8,
        )
        return float(t)
    was = before["tpot_ms"] if before else t
    solid = min(t, was)
    axes.barh(
        y,
        solid - left,
        left=left,
        height=0.6,
        color=BASELINE if r["kind"] == "baseline" else FASTER,
    )
    if t != was:
        axes.barh(y, abs(t - was), left=solid, height=0.6, color=GHOST if t < was else COSTS)
    return float(max(t, was))


def _words(r: Row, before: Row | None) -> tuple[str, str]:
    """The two texts at an arm's bar: its time and rate; below, in small, what it changed."""
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
        else:
            parts.append(
                f"saves {milliseconds(saved)}" if saved > 0 else f"costs {milliseconds(-saved)}"
            )
        if r.get("speedup"):
            parts.append(
                f"{r['speedup']:.{1 if r['speedup'] >= 1.95 else 2}f}× the baseline's speed"
            )
    if bound := r.get("bottleneck"):
        parts.append(f"limited by {LIMITS.get(bound, bound)}")
    return first, " · ".join(parts)


def _noise(r: Row, before: Row) -> bool:
    """Whether the ratios of the repetitions, which ran in turn, lie on both sides of 1."""
    pairs = zip(r.get("repetitions") or [], before.get("repetitions") or [], strict=False)
    faster = [
        ours["total"] - ours["ttft"] < theirs["total"] - theirs["ttft"] for ours, theirs in pairs
    ]
    return len(set(faster)) > 1
