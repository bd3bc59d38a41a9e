"""A result as a picture that needs no text beside it.

`draw(result, Path("h100.png"))` writes h100.png and h100.svg. There are up to three panels. Each is
drawn only if the result has data for it:

1. What each step of the ladder saves, as dots. Without a ladder: what each switch saves alone.
2. Latency against throughput, over batch sizes.
3. Decode time against context length.

An arm that fails parity is a grey cross and says so. An arm that can't run is "n/a". There is no
legend: names stand beside the curves. matplotlib is optional, and imported only to draw.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1.bench.plot.curves import draw_batches, draw_contexts
from r1.bench.plot.dots import draw_dots
from r1.bench.plot.select import is_timed, over_batches, over_context, steps
from r1.bench.plot.style import GREY, STYLE, Row
from r1.bench.report.text import busy, model_name, threads
from r1.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MOST_ARMS = 300
"""More would make a picture that is larger than matplotlib draws."""


def check(path: Path) -> list[Path]:
    """The two files that `draw` will write. Raises InputError if it could not write them.

    So a mistake shows before an hour of measuring.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"a plot needs matplotlib, which can't be imported here ({error}): "
            "pip install -e '.[plot]'"
        ) from None
    if path.suffix.lower() not in (".png", ".svg"):
        raise InputError(
            f"{path}: a plot is written as .png, with an .svg beside it: give it such a name"
        )
    if not os.path.isdir(path.parent):
        raise InputError(
            f"{path}: there is no folder {path.parent} to write a plot to: make it first"
        )
    for file in (files := [path.with_suffix(".png"), path.with_suffix(".svg")]):
        if os.path.isdir(file):
            raise InputError(f"{file} is a folder: give the plot another name")
    return files


def draw(result: dict[str, Any], path: Path) -> list[Path]:
    """Draw a result of bench.py. Returns the files written, PNG and SVG.

    Raises InputError if there is nothing to draw, or if a file can't be written.
    """
    files = check(path)
    if not any(is_timed(r) for r in result["rows"]):
        raise InputError(
            f"{path}: there is nothing to draw, for no arm of the result has a time per token"
        )
    if len(steps(result["rows"])) > MOST_ARMS:
        raise InputError(
            f"{path}: a picture has room for {MOST_ARMS} arms, and the result has more: measure "
            "fewer with --only"
        )
    import matplotlib

    settings: Any = {**matplotlib.rcParamsDefault, **STYLE}  # not the user's matplotlibrc
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
    """The figure: the dots on top, in full width; below them the other panels, side by side."""
    from matplotlib.figure import Figure

    rows: list[Row] = result["rows"]
    dots, batches, contexts = steps(rows), over_batches(rows), over_context(rows)
    below = [panel for panel in (batches and "batches", contexts and "contexts") if panel]
    shown = [["dots"] * max(1, len(below))] * bool(dots) + [below] * bool(below)
    tall = [0.62 * (len(dots) + 1) + 1.0] * bool(dots) + [4.2] * bool(below)
    figure: Any = Figure(figsize=(11, sum(tall) + 0.9), layout="constrained")
    axes = figure.subplot_mosaic(shown, height_ratios=tall)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
    machine = result["machine"]
    title = " · ".join(filter(None, (machine["name"], threads(machine), _model(result))))
    figure.suptitle(textwrap.fill(title, 85), x=0.012, ha="left", fontsize=14, fontweight="bold")
    small = " · ".join(filter(None, (busy(machine), _how(result), f"torch {machine['torch']}")))
    figure.supxlabel(f"{small} · r1, bench.py", x=0.012, ha="left", fontsize=8.5, color=GREY)
    later: list[Callable[[], None]] = []
    if dots:
        later.append(draw_dots(axes["dots"], dots))
    if batches:
        later.append(draw_batches(axes["batches"], batches))
    if contexts:
        later.append(draw_contexts(axes["contexts"], contexts))
    figure.draw_without_rendering()  # now the panels have sizes, and texts can be measured
    for place in later:
        place()
    return figure


def _how(result: dict[str, Any]) -> str:
    """What a dot and its line are."""
    if result["repetitions"] == 1:
        return "1 repetition"
    return f"median and range of {result['repetitions']} repetitions, arms in turn"


def _model(result: dict[str, Any]) -> str:
    """Model and dtype, for the title."""
    backend: dict[str, Any] = next(
        (r["backend"] for r in result["rows"] if is_timed(r) and r.get("backend")), {}
    )
    return " · ".join(part for part in (model_name(result), backend.get("dtype", "")) if part)
