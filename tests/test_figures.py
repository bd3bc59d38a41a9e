"""The figures of r1/README.md: the committed files are what the script draws.

Holds to account: tools/draw.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from canvas import WIDTH, Canvas
from draw_figures import FIGURES, FOLDER

NUMBER = re.compile(r"(?<![\w#.])-?\d+(?:\.\d+)?")


@pytest.mark.parametrize("name", FIGURES)
def test_the_committed_figure_is_what_is_drawn(name: str) -> None:
    """Word for word; numbers that tiny-r1 computes may differ a little on another machine."""
    committed, drawn = (FOLDER / f"{name}.svg").read_text(encoding="utf-8"), FIGURES[name]()
    assert NUMBER.sub("#", committed) == NUMBER.sub("#", drawn), (
        "run python tools/draw/draw_figures.py"
    )
    for before, now in zip(NUMBER.findall(committed), NUMBER.findall(drawn), strict=True):
        decimals = len(now.partition(".")[2])
        assert abs(float(before) - float(now)) < (1.5 * 10**-decimals if decimals else 0.5)


def test_every_figure_is_drawn() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(FIGURES)


def test_a_picture_is_svg_that_fits_the_page() -> None:
    canvas = Canvas(50, "a < b")
    canvas.text(10, 10, "p < q & r")
    root = ElementTree.fromstring(canvas.svg())
    assert root.get("width") == str(WIDTH) and int(root.get("width") or 0) <= 830
    words = [each.text for each in root.iter() if each.tag.endswith(("text", "title"))]
    assert words == ["a < b", "p < q & r"]
