"""The folder of the checkpoint that comes with r1."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = Path(__file__).parents[2] / "weights" / "tiny-r1"
