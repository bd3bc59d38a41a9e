"""The result as a picture that needs no text beside it: `draw(result, Path("h100.png"))` writes
h100.png and h100.svg.

Up to three panels, each only where the result has data for it: what each step of the ladder saves
(without a ladder: what each switch saves alone), latency against throughput over batch sizes,
decode time against context length. An arm that fails parity is hatched grey and says so; one that
can't be had is "n/a". Names stand beside what they name, there is no legend. matplotlib is
optional, and is imported only where something is drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from r1.bench.arms import SIZES
from r1.bench.report import model_name
from r1.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Box = tuple[float, float, float, float]

# Okabe and Ito's colours, told apart by the colour-blind too; ghost and costs differ from them in
# lightness as well.
BASELINE, FASTER, FLOOR, COSTS, GHOST, GREY = (
    "#D55E00",
    "#0072B2",
    "#007A5A",
    "#E69F00",
    "#D6E6F2",
    "#6B6B6B",
)
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
LIMITS = {"compute": "arithmetic", "launches": "kernel launches", "framework": "Python and torch"}
"""What a row's `bottleneck` is called."""
LOG_FROM = 20
"""An axis is logarithmic where its largest value is more than so many times its smallest."""


def check(path: Path) -> list[Path]:
    """The two files that `draw` will write. Raises InputError where it couldn't: ask before
    measuring for an hour."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"a plot needs matplotlib, which can't be imported here ({error}): pip install -e '.[plot]'"
        ) from None
    if path.suffix.lower() not in (".png", ".svg"):
        raise InputError(
            f"{path}: a plot is written as .png, with an .svg beside it: give it such a name"
        )
    if not path.parent.is_dir():
        raise InputError(
            f"{path}: there is no folder {path.parent} to write a plot to: make it first"
        )
    for file in (files := [path.with_suffix(".png"), path.with_suffix(".svg")]):
        if file.is_dir():
            raise InputError(f"{file} is a folder: give the plot another name")
    return files


def draw(result: dict[str, Any], path: Path) -> list[Path]:
    """Draw a result of bench.py; returns the files written, PNG and SVG. Raises InputError where it
    can't."""
    files = check(path)
    if not any(_timed(r) for r in result["rows"]):
        raise InputError(
            f"{path}: there is nothing to draw, for no arm of the result has a time per token"
        )
    import matplotlib

    settings: Any = {**matplotlib.rcParamsDefault, **STYLE}  # whatever the user's matplotlibrc says
    with matplotlib.rc_context(settings):
        figure = picture(result)
        try:
            for file in files:
                figure.savefig(
                    file, dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None
                )
        except OSError as error:
            raise InputError(f"{path} can't be written: {error.strerror or error}") from None
    return files


def picture(result: dict[str, Any]) -> Figure:
    """The figure: bars on top, in full width; below them what there is of the two other panels."""
    from matplotlib.figure import Figure

    rows: list[Row] = result["rows"]
    bars, batches, contexts = steps(rows), over_batches(rows), over_context(rows)
    below = [panel for panel in (batches and "batches", contexts and "contexts") if panel]
    shown = [["bars"] * max(1, len(below))] * bool(bars) + [below] * bool(below)
    tall = [0.62 * (len(bars) + 1) + 1.0] * bool(bars) + [4.2] * bool(below)
    figure: Any = Figure(figsize=(11, sum(tall) + 0.9), layout="constrained")
    axes = figure.subplot_mosaic(shown, height_ratios=tall)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    title = f"{result['machine']['name']} · {_model(result)}"
    figure.suptitle(textwrap.fill(title, 85), x=0.012, ha="left", fontsize=14, fontweight="bold")
    small = f"median of {result['repetitions']} repetitions, arms in turn · torch {result['machine']['torch']} · r1, bench.py"
    figure.supxlabel(small, x=0.012, ha="left", fontsize=8.5, color=GREY)
    later: list[Callable[[], None]] = []
    if bars:
        later.append(_draw_bars(axes["bars"], bars))
    if batches:
        later.append(_draw_batches(axes["batches"], batches))
    if contexts:
        later.append(_draw_contexts(axes["contexts"], contexts))
    figure.draw_without_rendering()  # now the panels have their sizes, and texts can be measured
    for place in later:
        place()
    return figure


# ---- what is drawn ----


def steps(rows: list[Row]) -> list[Row]:
    """Rows of the first panel, baseline first: the ladder of the first workload that has one, else
    each switch alone."""
    for kinds in (("baseline", "ladder"), ("baseline", "alone", "together")):
        for workload in _workloads(rows).values():
            chosen = sorted(
                (r for r in workload if r["kind"] in kinds), key=lambda r: kinds.index(r["kind"])
            )
            if any(r["kind"] != "baseline" for r in chosen) and any(_timed(r) for r in chosen):
                return chosen
    return [r for r in rows if r["kind"] == "baseline" and _timed(r)][:1]


def over_batches(rows: list[Row]) -> list[list[Row]]:
    """Arms (baseline; the fullest) over two batch sizes or more, all else equal; the widest such
    series."""
    return _series(rows, same=("prompt", "new", "depth"), by=lambda r: int(r["batch"]))


def over_context(rows: list[Row]) -> list[list[Row]]:
    """Arms (baseline; the fullest) over two context lengths or more, at one batch size; the widest
    such series."""
    return _series(rows, same=("batch",), by=context)


def context(r: Row) -> float:
    """How many tokens attention reads on average over the row's decode steps."""
    return float(r["depth"] + r["prompt"] + r["new"] / 2)


def fullest(workload: list[Row]) -> Row | None:
    """The row with the most switches on: all together, else the ladder's end, else the last single
    switch."""
    for kind in ("together", "ladder", "alone"):
        if found := [r for r in workload if r["kind"] == kind]:
            return found[-1]
    return None


def _series(rows: list[Row], same: tuple[str, ...], by: Callable[[Row], float]) -> list[list[Row]]:
    groups: dict[tuple[int, ...], list[list[Row]]] = {}
    for workload in _workloads(rows).values():
        ends = [next((r for r in workload if r["kind"] == "baseline"), None), fullest(workload)]
        lines = groups.setdefault(tuple(workload[0][name] for name in same), [[], []])
        for line, r in zip(lines, ends, strict=True):
            if r is not None and _timed(r):
                line.append(r)
    widest = max(
        groups.values(), key=lambda lines: len({by(r) for line in lines for r in line}), default=[]
    )
    if len({by(r) for line in widest for r in line}) < 2:
        return []
    return [sorted(line, key=by) for line in widest if line]


def _workloads(rows: list[Row]) -> dict[tuple[int, ...], list[Row]]:
    found: dict[tuple[int, ...], list[Row]] = {}
    for r in rows:
        found.setdefault(tuple(r[name] for name in SIZES), []).append(r)
    return found


def _timed(r: Row) -> bool:
    return not r.get("refused") and bool(r.get("tpot_ms"))


def _model(result: dict[str, Any]) -> str:
    """Model and dtype, as the title says them."""
    backend: dict[str, Any] = next(
        (r["backend"] for r in result["rows"] if _timed(r) and r.get("backend")), {}
    )
    return " · ".join(part for part in (model_name(result), backend.get("dtype", "")) if part)


# ---- the panels; each returns what is left to do once the panels' sizes are known ----


def _draw_bars(axes: Axes, rows: list[Row]) -> Callable[[], None]:
    """A waterfall: a bar an arm, and in pale what it saved against the step before (on no ladder:
    against the baseline)."""
    ladder = any(r["kind"] == "ladder" for r in rows)
    floor = min(
        (r for r in rows if _timed(r) and r["parity"] and r.get("floor_ms")),
        key=lambda r: r["tpot_ms"],
        default=None,
    )
    times = [r["tpot_ms"] for r in rows if _timed(r)]
    log = max(times) > LOG_FROM * min(times)
    if log:
        axes.set_xscale("log")
    left = min([*times, *([floor["floor_ms"]] if floor else [])]) / 2 if log else 0.0
    texts: list[Any] = []
    before: Row | None = None
    for y, r in enumerate(rows):
        end = max(
            _bar(axes, y, r, before, left), floor["floor_ms"] if floor else left
        )  # the floor's line crosses no words
        first, second = _words(r, before)
        where: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        for text, dy, style in (
            (first, 0.0 if not second else -0.17, {"weight": "bold"}),
            (second, 0.19, {"size": 9.5}),
        ):
            color = "black" if r.get("parity") and dy <= 0 else GREY
            texts.append(axes.annotate(text, (end, y + dy), color=color, **where, **style))
        if _timed(r) and r["parity"] and (ladder or r["kind"] == "baseline"):
            before = r
    names = [textwrap.fill(str(r["arm"]), 28, max_lines=2, placeholder=" …") for r in rows]
    if floor:
        y, x = len(rows), floor["floor_ms"]
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
        words = f"{_ms(x)} · {_rate(floor['batch'] / x * 1e3)}"
        where = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "color": FLOOR}
        texts.append(axes.annotate(words, (x, y - 0.17), weight="bold", **where))
        reached = f"the fastest arm reaches {100 * x / floor['tpot_ms']:.0f}% of this speed"
        least = f"what this machine's memory and arithmetic allow · {reached}"
        texts.append(axes.annotate(least, (x, y + 0.19), size=9.5, **where))
        names.append("the hardware's floor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(
        f"milliseconds per generated token{', logarithmic' if log else ''} (shorter is faster)",
        loc="left",
    )
    what = (
        "What each step saves: it adds one switch to those above it"
        if ladder
        else "What each switch saves alone"
    )
    pale = (
        f" · pale: time saved against {'the step before' if ladder else 'the baseline'}"
        if len(rows) > 1
        else ""
    )
    _title(axes, what if len(rows) > 1 else "Time per token", _sizes(rows[0]) + pale)
    for text in texts:
        text.set_in_layout(
            False
        )  # the layout would shrink the panel for them; `fit` makes room instead

    def fit() -> None:
        """Widen the axis until each text ends inside it: a text keeps its width in pixels, its
        start moves."""
        low, high = left, max(times)
        axes.set_xlim(low, high)
        pixels = axes.get_window_extent().width

        def share(x: float) -> float:  # of the axis' width when it ends at `high`
            start, _ = axes.transData.transform((x, 0))
            return float((start - axes.get_window_extent().x0) / pixels)

        wanted = max(
            share(t.xy[0]) / (1 - min(0.85, (t.get_window_extent().width + 16) / pixels))
            for t in texts
        )
        wanted = max(wanted, 1.02)
        axes.set_xlim(low, low * (high / low) ** wanted if log else high * wanted)
        _ticks(axes, "x", log, (low, high))
        axes.set_xticks([t for t in axes.get_xticks() if low <= t <= high])
        axes.spines["bottom"].set_bounds(low, high)  # beyond the longest bar there are only words

    return fit


def _bar(axes: Axes, y: int, r: Row, before: Row | None, left: float) -> float:
    """Draw one arm; returns where its words begin."""
    if not _timed(r):
        return left
    t = r["tpot_ms"]
    if not r["parity"]:
        axes.barh(
            y,
            t - left,
            left=left,
            height=0.6,
            color="#EDEDED",
            edgecolor="#9A9A9A",
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
    """What stands at an arm's bar: its time and rate; below, smaller, what it changed."""
    if not _timed(r):
        return "n/a", textwrap.shorten(
            r.get("refused") or "no time per token", 75, placeholder=" …"
        )
    if not r["parity"]:
        return (
            "parity fails",
            f"{_ms(r['tpot_ms'])}, but its numbers are not the reference's: no speed-up counts",
        )
    first = f"{_ms(r['tpot_ms'])} · {_rate(r['decode_tok_s'])}"
    parts = []
    if before is not None:
        saved = before["tpot_ms"] - r["tpot_ms"]
        if _noise(r, before):
            parts.append("no difference beyond the noise")
        else:
            parts.append(f"saves {_ms(saved)}" if saved > 0 else f"costs {_ms(-saved)}")
        if r.get("speedup"):
            parts.append(
                f"{r['speedup']:.{1 if r['speedup'] >= 1.95 else 2}f}× the baseline's speed"
            )
    if bound := r.get("bottleneck"):
        parts.append(f"limited by {LIMITS.get(bound, bound)}")
    return first, " · ".join(parts)


def _noise(r: Row, before: Row) -> bool:
    """Whether the ratios of repetitions, which ran in turn, lie on both sides of 1."""
    pairs = zip(r.get("repetitions") or [], before.get("repetitions") or [], strict=False)
    faster = [
        ours["total"] - ours["ttft"] < theirs["total"] - theirs["ttft"] for ours, theirs in pairs
    ]
    return len(set(faster)) > 1


def _draw_batches(axes: Axes, lines: list[list[Row]]) -> Callable[[], None]:
    curves = [_curve(line, lambda r: r["decode_tok_s"], lambda r: r["tpot_ms"]) for line in lines]
    curves += _floor_curve(lines[-1], lambda r: r["batch"] / r["floor_ms"] * 1e3)
    for curve in curves:
        curve.labels = [
            f"batch {r['batch']}" if i == 0 else f"{r['batch']}" for i, r in enumerate(curve.rows)
        ]
    same = {(r["prompt"], r["new"], r["depth"]) for line in lines for r in line}
    _title(
        axes,
        "Latency against throughput",
        _sizes(lines[0][0], batch=False) if len(same) == 1 else "",
    )
    axes.set_xlabel("tokens per second, all rows together")
    axes.set_ylabel("milliseconds per token, each row")
    return _draw_curves(axes, curves, from_zero=True)


def _draw_contexts(axes: Axes, lines: list[list[Row]]) -> Callable[[], None]:
    curves = [_curve(line, context, lambda r: r["tpot_ms"]) for line in lines]
    curves += _floor_curve(lines[-1], context)
    _title(axes, "Decode time against context", f"batch {lines[0][0]['batch']}")
    axes.set_xlabel("tokens in the context (mean over the decode)")
    axes.set_ylabel("milliseconds per token")
    return _draw_curves(axes, curves, from_zero=True)


@dataclass
class Curve:
    """A line of a panel: its points, what it is called, and the words at each point."""

    name: str
    color: str
    rows: list[Row]
    x: list[float]
    y: list[float]
    dashed: bool = False
    labels: list[str] = field(default_factory=list)


def _curve(line: list[Row], x: Callable[[Row], float], y: Callable[[Row], float]) -> Curve:
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
    for axis in ("x", "y"):
        values = [v for curve in curves for v in getattr(curve, axis)]
        low, high = min(values), max(values)
        log = high > LOG_FROM * low
        room = 0.12 if axis == "y" else 0.18
        getattr(axes, f"set_{axis}scale")("log" if log else "linear")
        if log:
            limits = low / (high / low) ** room, high * (high / low) ** room
        else:
            limits = 0.0 if from_zero else low, high * (1 + room)
        getattr(axes, f"set_{axis}lim")(*limits)
        _ticks(axes, axis, log, limits)
    axes.grid(color="#EBEBEB")
    axes.set_axisbelow(True)
    for curve in curves:
        good = [(x, y) for x, y, r in zip(curve.x, curve.y, curve.rows, strict=True) if r["parity"]]
        bad = [
            (x, y) for x, y, r in zip(curve.x, curve.y, curve.rows, strict=True) if not r["parity"]
        ]
        mark: dict[str, Any] = (
            {"linewidth": 1.3, "markersize": 3}
            if curve.dashed
            else {"linewidth": 2, "markersize": 7}
        )
        axes.plot(*_columns(good), "o--" if curve.dashed else "o-", color=curve.color, **mark)
        axes.plot(*_columns(bad), "X", color="#9A9A9A", markersize=9)

    def label() -> None:
        """Names and points' words, each at the first place where it covers nothing."""
        taken = _Taken(axes, curves)
        for number, curve in enumerate(curves):
            labels = curve.labels if not curve.dashed else []
            for x, y, r, text in zip(
                curve.x, curve.y, curve.rows, labels or [""] * len(curve.rows), strict=True
            ):
                words = text if r["parity"] or curve.dashed else f"{text} parity fails".strip()
                if words:
                    color = curve.color if r["parity"] else GREY
                    taken.put(words, [(x, y)], number, color=color, fontsize=9.5)
        for number, curve in enumerate(curves):
            spots = list(reversed(list(zip(curve.x, curve.y, strict=True))))
            taken.put(curve.name, spots, number, color=curve.color, weight="bold", fontsize=10.5)

    return label


class _Taken:
    """Where in a panel something stands already, in pixels; a box is (x0, y0, x1, y1)."""

    SIDES: ClassVar = [(0, 1), (-1, 1), (1, 1), (-1, 0), (1, 0), (-1, -1), (1, -1), (0, -1)]

    def __init__(self, axes: Axes, curves: list[Curve]) -> None:
        self.axes = axes
        self.boxes: list[Box] = []
        self.paths: list[list[tuple[float, float]]] = []
        for curve in curves:
            ends = [
                (float(x), float(y))
                for x, y in axes.transData.transform(list(zip(curve.x, curve.y, strict=True)))
            ]
            between = [(i / 40, a, b) for a, b in pairwise(ends) for i in range(1, 40)]
            self.paths.append(
                ends + [(a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t) for t, a, b in between]
            )

    def put(self, words: str, spots: list[tuple[float, float]], number: int, **style: Any) -> None:
        """Write `words` beside one of curve `number`'s spots, where they cover least: above it
        (other curves: below), near."""
        text: Any = self.axes.annotate(words, spots[0], (0, 0), textcoords="offset points", **style)
        text.set_in_layout(False)
        size = text.get_window_extent()
        point = self.axes.figure.dpi / 72
        best, chosen = float("inf"), None
        for spot in spots:
            x, y = self.axes.transData.transform(spot)
            for rank, (dx, dy) in enumerate(
                self.SIDES if number == 0 else [(-dx, -dy) for dx, dy in self.SIDES]
            ):
                for far in (6, 10, 16, 24):
                    left = x + dx * far * point - {-1: 1.0, 0: 0.5, 1: 0.0}[dx] * size.width
                    low = y + dy * far * point - {-1: 1.0, 0: 0.5, 1: 0.0}[dy] * size.height
                    box = (left - 2, low - 2, left + size.width + 2, low + size.height + 2)
                    cost = self._covered(box, number) + far / 2 + 1.5 * rank
                    if cost < best:
                        best, chosen = cost, (spot, (dx * far, dy * far), dx, dy, box)
        assert chosen is not None
        text.xy, text.xyann, dx, dy, box = chosen
        text.set(
            ha={-1: "right", 0: "center", 1: "left"}[dx],
            va={-1: "top", 0: "center", 1: "bottom"}[dy],
        )
        self.boxes.append(box)

    def _covered(self, box: Box, number: int) -> float:
        """What it would cost to have words there: on other words, outside, on a line, nearer to
        another's line."""
        x0, y0, x1, y1 = box
        texts = sum(x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in self.boxes)
        panel = self.axes.get_window_extent()
        outside = x0 < panel.x0 or y0 < panel.y0 or x1 > panel.x1 + 12 or y1 > panel.y1 + 6
        apart = [
            min(max(x0 - x, x - x1, 0) + max(y0 - y, y - y1, 0) for x, y in path)
            for path in self.paths
        ]
        lines = sum(distance == 0 for distance in apart)
        astray = any(distance < apart[number] for i, distance in enumerate(apart) if i != number)
        return 1000 * texts + 500 * outside + 12 * lines + 15 * astray


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _ticks(axes: Axes, axis: str, log: bool, limits: tuple[float, float]) -> None:
    """Plain numbers at 1, 2, 5, 10, ... on a logarithmic axis; a few round ones on a linear
    axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    which = getattr(axes, f"{axis}axis")
    if log:
        marks = [
            m * 10**e
            for e in range(-6, 12)
            for m in (1, 2, 5)
            if limits[0] <= m * 10**e <= limits[1]
        ]
        which.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if len(marks) <= 7 else (1.0,)))
    else:
        which.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    which.set_minor_locator(NullLocator())
    which.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _title(axes: Axes, title: str, small: str) -> None:
    """A panel's title and, below it, what it was measured at."""
    axes.set_title(title, pad=22 if small else 8)
    axes.annotate(small, (0, 1), (0, 7), "axes fraction", "offset points", size=9.5, color=GREY)


def _sizes(r: Row, batch: bool = True) -> str:
    deep = f" behind {r['depth']:,} in the cache" if r["depth"] else ""
    return (
        f"batch {r['batch']}, " * batch + f"{r['prompt']:,} prompt + {r['new']:,} new tokens{deep}"
    )


def _ms(value: float) -> str:
    return f"{value:.{3 if value < 0.1 else 2 if value < 10 else 1 if value < 100 else 0}f} ms"


def _rate(value: float) -> str:
    return f"{value:,.{2 if value < 1 else 1 if value < 10 else 0}f} tok/s"
