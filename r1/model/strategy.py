"""Strategies: the ways to compute one part of a layer, each an object with its own facts.

A layer has named slots (mla.py's `attend`, moe.py's `dispatch`), with one strategy for prompts
("prefill") and one for decode steps ("decode"). build.py fills them. Nobody asks for a strategy by
comparing names: a strategy tells what it needs, and where it can't run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from r1.device import DTYPES
from r1.model.config import Config


@dataclass(frozen=True)
class Use:
    """The use that a strategy is asked for: in which model, phase and kind of call."""

    config: Config
    phase: str
    """"prefill" or "decode"."""
    dtype: torch.dtype
    """The dtype of matrix products."""
    tokens: int
    """Tokens in a decode step, of all rows."""
    gpu: bool
    amp: bool
    compiled: bool
    """Under torch.compile."""
    captured: bool
    """In a CUDA graph."""
    machine: Callable[[str], str | None]
    """Why the machine lacks a feature (switches/machine.py), or None."""

    @property
    def dtype_name(self) -> str:
        """The dtype as its switch names it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def capture(self) -> str:
        """The switch that captures this phase."""
        return "cuda_graphs" if self.phase == "decode" else "prefill_graphs"


class Strategy:
    """The base of attention strategies (attend.py) and expert strategies (dispatch.py)."""

    name: str
    """The switch's value that chooses it."""

    def why_not(self, use: Use) -> str | None:
        """One clause that says why it can't be used so, and what to use instead; None if it can."""
        return None

    def prepare(self) -> None:
        """Called when the strategy is put into a slot; imports what only it needs."""
