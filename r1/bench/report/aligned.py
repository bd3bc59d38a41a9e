"""Tables in Markdown whose columns also line up as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WORDS = ("arm", "machine", "dtype")
"""Columns of text. The others are numbers, which are aligned to the right."""


def aligned(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Columns of cells, by their headings, as the lines of a table."""
    padded = []
    for name, cells in columns.items():
        column = [
            name,
            "---" if name in WORDS else "---:",
            *(cell.replace("|", "\\|") for cell in cells),
        ]
        width = max(map(len, column))
        padded.append([cell.ljust(width) for cell in column])
    return ["| " + " | ".join(line) + " |" for line in zip(*padded, strict=True)]
