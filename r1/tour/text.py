"""Lines of text for a terminal: wrapped, and padded by columns that letters take."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable

WIDTH = 100
"""Columns of a line."""
INDENT = "   "


def paragraph(*sentences: str) -> list[str]:
    """Sentences as indented lines."""
    text = " ".join(filter(None, sentences))
    return textwrap.wrap(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)


def columns(text: str) -> int:
    """Columns that a text takes: wide letters, such as those in R1's control tokens, take two."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


def flow(start: str, parts: Iterable[str], indent: str, gap: str = "  ") -> list[str]:
    """A line that begins with `start` and goes on with `parts`, and more lines where it is full."""
    lines = [start]
    for part in parts:
        if columns(lines[-1] + part) > WIDTH:
            lines.append(indent)
        lines[-1] += part + gap
    return [line.rstrip() for line in lines]


def padded(text: str, width: int) -> str:
    """The text with spaces after it, up to `width` columns; one at least."""
    return text + " " * max(1, width - columns(text))
