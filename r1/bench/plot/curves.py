"""The panels of curves: over batch sizes, and over context lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from r1.bench.plot.labels import Curve, Labels
from r1.bench.plot.select import context
from r1.bench.plot.style import (
    BASELINE,
    FAILED,
    FASTER,
    FLOOR,
    GREY,
    LOG_FROM,
    Row,
    set_title,
    sizes_text,
    ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_batches(axes: Axes, lines: list[list[Row]]) -> Callable[[], None]:
    """Latency against throughput. Call the result, when the panel has its size, to label it."""
    curves = [_curve(line, lambda r: r["decode_tok_s"], lambda r: r["tpot_ms"]) for line in lines]
    curves += _floor_curve(lines[-1], lambda r: r["batch"] / r["floor_ms"] * 1e3)
    for curve in curves:
        curve.labels = [
            f"batch {r['batch']}" if i == 0 else f"{r['batch']}" for i, r in enumerate(curve.rows)
        ]
    same = {(r["prompt"], r["new"], r["depth"]) for line in lines for r in line}
    set_title(
        axes,
        "Latency against throughput",
        sizes_text(lines[0][0], batch=False) if len(same) == 1 else "",
    )
    axes.set_xlabel("tokens per second, all rows together")
    axes.set_ylabel("milliseconds per token, each row")
    return _draw_curves(axes, curves, from_zero=True)


def draw_contexts(axes: Axes, lines: list[list[Row]]) -> Callable[[], None]:
    """Decode time against context. Call the result, when the panel has its size, to label it."""
    curves = [_curve(line, context, lambda r: r["tpot_ms"]) for line in lines]
    curves += _floor_curve(lines[-1], context)
    set_title(axes, "Decode time against context", f"batch {lines[0][0]['batch']}")
    axes.set_xlabel("tokens in the context (mean over the decode)")
    axes.set_ylabel("milliseconds per token")
    return _draw_curves(axes, curves, from_zero=True)


def _curve(line: list[Row], x: Callable[[Row], float], y: Callable[[Row], float]) -> Curve:
    """One arm's curve."""
    arms = {r["arm"] for r in line}
    if line[0]["kind"] == "baseline":
        name = "baseline"
    else:
        name = arms.pop() if len(arms) == 1 and line[0]["kind"] == "alone" else "every switch on"
    return Curve(
        name,
        BASELINE if name == "baseline" else FASTER,
        line,
        [x(r) for r in line],
        [y(r) for r in line],
    )


def _floor_curve(line: list[Row], x: Callable[[Row], float]) -> list[Curve]:
    """The curve of the hardware's limit, if at least two rows have one."""
    rows = [r for r in line if r.get("floor_ms") and r["parity"]]
    if len(rows) < 2:
        return []
    return [
        Curve(
            "the hardware's floor",
            FLOOR,
            rows,
            [x(r) for r in rows],
            [r["floor_ms"] for r in rows],
            dashed=True,
        )
    ]


def _draw_curves(axes: Axes, curves: list[Curve], *, from_zero: bool) -> Callable[[], None]:
    """Draw the curves. Returns the function that writes their labels."""
    for axis in ("x", "y"):
        _set_limits(axes, axis, [v for curve in curves for v in getattr(curve, axis)], from_zero)
    axes.grid(color="#EBEBEB")
    axes.set_axisbelow(True)
    for curve in curves:
        points = list(zip(curve.x, curve.y, curve.rows, strict=True))
        good = [(x, y) for x, y, r in points if r["parity"]]
        bad = [(x, y) for x, y, r in points if not r["parity"]]
        mark: dict[str, Any] = (
            {"linewidth": 1.3, "markersize": 3}
            if curve.dashed
            else {"linewidth": 2, "markersize": 7}
        )
        axes.plot(*_columns(good), "o--" if curve.dashed else "o-", color=curve.color, **mark)
        axes.plot(*_columns(bad), "X", color=FAILED, markersize=9)
    return lambda: _label(axes, curves)


def _set_limits(axes: Axes, axis: str, values: list[float], from_zero: bool) -> None:
    """Scale an axis to these values, with room for labels."""
    low, high = min(values), max(values)
    log = high > LOG_FROM * low
    room = 0.12 if axis == "y" else 0.18
    getattr(axes, f"set_{axis}scale")("log" if log else "linear")
    if log:
        limits = low / (high / low) ** room, high * (high / low) ** room
    else:
        limits = 0.0 if from_zero else low, high * (1 + room)
    getattr(axes, f"set_{axis}lim")(*limits)
    ticks(axes, axis, log, limits)


def _label(axes: Axes, curves: list[Curve]) -> None:
    """Write the points' words, then the curves' names, each at the best free place."""
    labels = Labels(axes, curves)
    for number, curve in enumerate(curves):
        words_at = (not curve.dashed and curve.labels) or [""] * len(curve.rows)
        for x, y, r, text in zip(curve.x, curve.y, curve.rows, words_at, strict=True):
            words = text if r["parity"] or curve.dashed else f"{text} parity fails".strip()
            if words:
                color = curve.color if r["parity"] else GREY
                labels.put(words, [(x, y)], number, color=color, fontsize=9.5)
    for number, curve in enumerate(curves):
        spots = list(reversed(list(zip(curve.x, curve.y, strict=True))))
        labels.put(curve.name, spots, number, color=curve.color, weight="bold", fontsize=10.5)


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Points (x, y) as a list of x and a list of y."""
    return [x for x, _ in points], [y for _, y in points]
