"""A picture in SVG: boxes, arrows and text, at the width at which GitHub shows them.

The picture has a light background of its own, so it reads the same in light and dark mode. Letters
are measured as wide as those of a wide font, so text stays inside its box with any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

WIDTH = 830
"""GitHub's width of a picture, in pixels."""
INK, MUTED, PAPER, LINE = "#1f2328", "#59636e", "#ffffff", "#818b98"
FILLS = {
    "query": ("#ddf4ff", "#0969da"),
    "cache": ("#dafbe1", "#1a7f37"),
    "weight": ("#fff1e5", "#bc4c00"),
    "head": ("#fbefff", "#8250df"),
    "plain": ("#f6f8fa", "#818b98"),
    "no": ("#ffebe9", "#cf222e"),
    "white": ("#ffffff", "#818b98"),
}
"""Fill and edge of each kind of box."""
BARS = {
    "query": "#54aeff",
    "cache": "#4ac26b",
    "weight": "#fb8f44",
    "head": "#c297ff",
    "faint": "#e8d4ff",
    "plain": "#afb8c1",
    "no": "#fa4549",
}
"""The fill of a bar of each kind."""
SANS = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
Point = tuple[float, float]


class Canvas:
    """A picture that is being drawn. All numbers are pixels, from the upper left corner."""

    def __init__(self, height: int, title: str) -> None:
        self.height, self.title = height, title
        self.parts: list[str] = []

    def svg(self) -> str:
        """The file's text."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self.height}" '
            f'viewBox="0 0 {WIDTH} {self.height}" role="img">'
        )
        tip = (
            '<marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 L10 5 L0 10 Z" fill="{MUTED}"/></marker>'
        )
        paper = (
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1}" rx="8" '
            f'fill="{PAPER}" stroke="#d0d7de"/>'
        )
        title = f"<title>{escape(self.title)}</title>"
        return "\n".join([head, title, f"<defs>{tip}</defs>", paper, *self.parts, "</svg>", ""])

    def text(
        self, x: float, y: float, text: str, size: float = 13, *, color: str = INK,
        anchor: str = "middle", bold: bool = False, mono: bool = False,
    ) -> None:  # fmt: skip
        """One line, whose middle is at the height `y`. `anchor`: start, middle or end at `x`."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y + 0.36 * size:g}" font-size="{size:g}" '
            f'font-family="{MONO if mono else SANS}" fill="{color}" '
            f'text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def heading(self, y: float, text: str, more: str = "") -> None:
        """A bold line at the left edge, with a plain line below it."""
        self.text(20, y, text, 15, anchor="start", bold=True)
        if more:
            self.text(20, y + 20, more, 12.5, anchor="start", color=MUTED)

    def step(self, y: float, text: str) -> None:
        """A bold line at the left edge, smaller than a heading."""
        self.text(20, y, text, 13, anchor="start", bold=True)

    def note(self, y: float, *lines: str) -> None:
        """Plain lines at the left edge, below each other."""
        for number, line in enumerate(lines):
            self.text(20, y + 18 * number, line, 12.5, anchor="start", color=MUTED)

    def box(
        self, x: float, y: float, width: float, height: float, lines: Sequence[str] | str = (),
        kind: str = "plain", size: float = 13, *, mono: bool = False, round_: float = 4,
        stack: int = 0,
    ) -> None:  # fmt: skip
        """A box with lines of text in its middle. `stack` more boxes lie behind it."""
        fill, edge = FILLS[kind]
        for back in range(stack, -1, -1):
            self.parts.append(
                f'<rect x="{x + 4 * back:g}" y="{y - 4 * back:g}" width="{width:g}" '
                f'height="{height:g}" rx="{round_:g}" fill="{fill}" stroke="{edge}"/>'
            )
        lines = [lines] if isinstance(lines, str) else list(lines)
        first = y + height / 2 - (len(lines) - 1) * 0.6 * size
        for number, line in enumerate(lines):
            bold = number == 0 and len(lines) > 1
            self.text(x + width / 2, first + number * 1.2 * size, line, size, mono=mono, bold=bold)

    def arrow(self, *points: Point, tip: bool = True, dashed: bool = False) -> None:
        """A line through points, with a tip at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#tip)"' if tip else ""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{MUTED}" stroke-width="1.3"'
            f"{dash}{end}/>"
        )

    def bar(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A filled bar without text."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{BARS[kind]}"/>'
        )
