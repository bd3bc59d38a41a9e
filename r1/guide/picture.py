"""A ranking as a picture: tokens a second against the money of a million of them.

A hollow dot is a bound, of the floor: nothing is expected there. A machine that can't hold the
model is grey, below the axis. matplotlib is optional, and imported only to draw.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from r1.bench.plot.style import BASELINE, FAILED, FASTER, GHOST, GREY, STYLE, ticks
from r1.errors import InputError
from r1.guide.answer import Answer, Speed
from r1.guide.page import machines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = 0.7
"""Where the labels begin, as a part of the width."""
LINE = 0.036
"""The height of a label, as a part of the height."""
WIDTH = 110
"""Letters of a line below the axis."""
WAYS = {"rent_usd_per_million_tokens": (FASTER, "rented"),
        "own_usd_per_million_tokens": (BASELINE, "owned")}  # fmt: skip


def draw(answers: Sequence[Answer], title: str, path: Path) -> list[Path]:
    """Draw a ranking. Returns the files written, PNG and SVG. Raises InputError."""
    import matplotlib
    from matplotlib.figure import Figure

    models = len({answer.name for answer in answers}) > 1
    points = [each for answer in answers for each in dots(answer, models)]
    if not points:
        raise InputError(f"--plot {path}: no machine that holds it has a price")
    files = [path.with_suffix(".png"), path.with_suffix(".svg")]
    with matplotlib.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(10, 6.4), layout="constrained")
        _draw(figure, points, _without_place(answers, models), title)
        for file in files:
            try:
                dated: Any = {} if file.suffix == ".png" else {"Date": None}
                figure.savefig(file, dpi=144, metadata=dated)
            except OSError as error:
                raise InputError(f"{file} can't be written ({error.strerror})") from None
    return files


def dots(answer: Answer, models: bool) -> list[dict[str, Any]]:
    """The points of one answer: at the best batch, for each way to pay.

    `models`: the answers are of several models, not of several machines.
    """
    cost = answer.best.cost or answer.best.least_cost if answer.setup else None
    if cost is None:
        return []
    best, found = answer.best, []
    rate = best.tokens_per_s or best.floor_tokens_per_s
    for way in WAYS:
        money = getattr(cost, way)
        if money:
            place = {"usd": money, "tokens_per_s": rate, "way": way, "bound": not best.cost}
            found.append({**place, "label": label(answer, best, models)})
    return found


def label(answer: Answer, speed: Speed, models: bool) -> str:
    """The machine or the model, how it is stored, and the batch."""
    assert answer.setup
    what = answer.name if models else machines(answer)
    places = {"device": "", "host": ", experts in RAM", "disk": ", experts on disk"}
    where = places[answer.setup.places.experts]
    return f"{what}, {answer.setup.stored}{where}, batch {speed.sizes.rows}"


def _without_place(answers: Sequence[Answer], models: bool) -> dict[str, list[str]]:
    """Machines or models without a dot, by the reason."""
    found: dict[str, list[str]] = {}
    for answer in answers:
        what = answer.name if models else answer.gpu.title
        if answer.setup is None:
            why = "do not fit" if models else "can't hold it"
            found.setdefault(why, []).append(what)
        elif not dots(answer, models):
            found.setdefault("no price with a source", []).append(what)
    return found


def _draw(
    figure: Figure, points: list[dict[str, Any]], absent: dict[str, list[str]], title: str
) -> None:
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log")
    for way, (colour, word) in WAYS.items():
        own = [p for p in points if p["way"] == way]
        x, y = [p["usd"] for p in own], [p["tokens_per_s"] for p in own]
        faces = ["white" if p["bound"] else colour for p in own]
        axes.scatter(x, y, s=42, c=faces, edgecolors=colour, linewidths=1.6, zorder=3)
        axes.scatter([], [], s=42, color=colour, label=word)
    if any(p["bound"] for p in points):
        text = "hollow: the floor, a bound"
        axes.scatter([], [], s=42, c="white", edgecolors=GREY, linewidths=1.6, label=text)
    low, high = min(p["usd"] for p in points), max(p["usd"] for p in points)
    low, high = math.log(low / 1.3), math.log(high * 1.3)
    axes.set_xlim(math.exp(low), math.exp(low + (high - low) / (COLUMN - 0.03)))
    bottom, top = (f(p["tokens_per_s"] for p in points) for f in (min, max))
    axes.set_ylim(bottom / 1.5, top * 1.6)
    _pairs(axes, points)
    _label(axes, points)
    ticks(axes, "x", True, axes.get_xlim())
    ticks(axes, "y", True, axes.get_ylim())
    axes.set_xlabel("US dollars for a million tokens, at the best batch")
    axes.set_ylabel("tokens a second, all rows together")
    axes.set_title(title, loc="right", pad=10)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
    if absent:
        lines = (f"{why}: {', '.join(names)}" for why, names in absent.items())
        text = "\n".join("\n".join(textwrap.wrap(line, WIDTH)) for line in lines)
        figure.supxlabel(text, fontsize=9.5, color=FAILED, x=0.02, ha="left")


def _label(axes: Axes, points: list[dict[str, Any]]) -> None:
    """A column of labels on the right, in the order of the dots, each with a line to its dot."""
    rightmost: dict[str, dict[str, Any]] = {}
    for point in sorted(points, key=lambda p: p["usd"]):
        rightmost[point["label"]] = point
    low, high = (math.log(limit) for limit in axes.get_ylim())
    below = 0.0
    for point in sorted(rightmost.values(), key=lambda p: p["tokens_per_s"]):
        own = (math.log(point["tokens_per_s"]) - low) / (high - low)
        below = place = max(own, below + LINE)
        axes.annotate(
            point["label"], (point["usd"], point["tokens_per_s"]), (COLUMN, place),
            textcoords="axes fraction", fontsize=8.5, color=GREY, va="center", zorder=2,
            arrowprops={"arrowstyle": "-", "color": GHOST, "lw": 0.8, "relpos": (0, 0.5)},
        )  # fmt: skip


def _pairs(axes: Axes, points: list[dict[str, Any]]) -> None:
    """A line between the two dots of one machine."""
    for label_ in {point["label"] for point in points}:
        own = [point for point in points if point["label"] == label_]
        x, y = [p["usd"] for p in own], [p["tokens_per_s"] for p in own]
        axes.plot(x, y, color=FAILED, lw=1, zorder=1)
