"""Labels of curves, placed where they cover as little as possible."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from r1.bench.plot.style import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1, in pixels."""
Spot = tuple[float, float]
SIDES = [(0, 1), (-1, 1), (1, 1), (-1, 0), (1, 0), (-1, -1), (1, -1), (0, -1)]
"""The directions from a point to its label, in order of preference."""


@dataclass
class Curve:
    """A curve of a panel: its name, its points, and a label for each point."""

    name: str
    color: str
    rows: list[Row]
    x: list[float]
    y: list[float]
    dashed: bool = False
    labels: list[str] = field(default_factory=list)


class Labels:
    """The labels of one panel: where they stand, and where the curves run, in pixels."""

    def __init__(self, axes: Axes, curves: list[Curve]) -> None:
        """No labels yet. The panel must have its final size."""
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

    def put(self, words: str, spots: list[Spot], number: int, **style: Any) -> None:
        """Write `words` beside one of curve `number`'s spots, where they cover least.

        Labels of the first curve stand rather above it, those of the others below.
        """
        text: Any = self.axes.annotate(words, spots[0], (0, 0), textcoords="offset points", **style)
        text.set_in_layout(False)
        size = text.get_window_extent()
        sides = SIDES if number == 0 else [(-dx, -dy) for dx, dy in SIDES]
        best, chosen = float("inf"), None
        for spot in spots:
            for rank, side in enumerate(sides):
                for far in (6, 10, 16, 24):
                    box = self._box(spot, side, far, size)
                    cost = self._cost(box, number) + far / 2 + 1.5 * rank
                    if cost < best:
                        best, chosen = cost, (spot, side, far, box)
        assert chosen is not None
        spot, (dx, dy), far, box = chosen
        text.xy, text.xyann = spot, (dx * far, dy * far)
        text.set(
            ha={-1: "right", 0: "center", 1: "left"}[dx],
            va={-1: "top", 0: "center", 1: "bottom"}[dy],
        )
        self.boxes.append(box)

    def _box(self, spot: Spot, side: tuple[int, int], far: int, size: Any) -> Box:
        """The box of a text of this size, `far` points from a spot, on this side of it."""
        point = self.axes.figure.dpi / 72  # in pixels
        x, y = self.axes.transData.transform(spot)
        dx, dy = side
        left = x + dx * far * point - {-1: 1.0, 0: 0.5, 1: 0.0}[dx] * size.width
        low = y + dy * far * point - {-1: 1.0, 0: 0.5, 1: 0.0}[dy] * size.height
        return (left - 2, low - 2, left + size.width + 2, low + size.height + 2)

    def _cost(self, box: Box, number: int) -> float:
        """The cost of a label of curve `number` in this box.

        It is high on another label or outside the panel, and low on a curve or nearer to another
        curve.
        """
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
