"""Strategies: the ways to compute one part of a layer, each an object with its own facts.

A slot (`attend` of mla.py and gqa.py, `dispatch` of moe.py) holds one strategy for prompts
("prefill") and one for decode steps ("decode"). Other code never compares names: it asks the
strategy for its facts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from r1.device import DTYPES
from r1.errors import setting
from r1.model.cache import Entry
from r1.model.config import Config


@dataclass(frozen=True)
class Use:
    """A planned use of a strategy: in which model, phase and kind of call."""

    config: Config
    phase: str  # "prefill" or "decode"
    dtype: torch.dtype  # of matrix products
    tokens: int  # in a decode step, of all rows
    gpu: bool
    amp: bool  # under autocast
    compiled: bool  # under torch.compile
    captured: bool  # in a CUDA graph
    machine: Callable[[str], str | None]  # from a feature's name: why the machine lacks it, or None
    quant: str = "none"  # how matrices are stored: the resolved switch

    @property
    def dtype_name(self) -> str:
        """The dtype as its switch names it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def capture(self) -> str:
        """The switch that captures this phase."""
        return "cuda_graphs" if self.phase == "decode" else "prefill_graphs"


def without_kernels() -> str:
    """What to do where no Triton kernel can run."""
    *some, last = map(setting, ("attention", "moe", "prefill_moe", "kernels"))
    return f"leave {', '.join(some)} and {last} at their defaults"


class Strategy:
    """The base of attention strategies and expert strategies (dispatch.py)."""

    name: str  # the switch's value that chooses it
    phases: tuple[str, ...] = ("prefill", "decode")  # those that it is built for

    def why_not(self, use: Use) -> str | None:
        """One clause: why this use is impossible, and what to use instead. None: it is possible."""
        return None

    def prepare(self) -> None:
        """Called when the strategy is put into a slot. Imports modules that only it needs."""


class Attention(Strategy):
    """The base of the ways to attend: to latents (attend.py), to grouped heads (gqa_attend.py)."""

    needs: str | None = None  # the field of a Step that hides keys from it: "mask", "bias" or None
    keeps: str  # what it caches of a token, in words

    def entry(self, shape: Any) -> Entry:
        """The shapes that one token leaves in a layer's cache. Both phases must keep the same."""
        raise NotImplementedError(f"{type(self).__name__} must define entry(shape)")

    def flops(self, shape: Any) -> float:
        """Operations of one query and one key, of all heads: score and weighted sum."""
        raise NotImplementedError(f"{type(self).__name__} must define flops(shape)")

    def scratch(self, shape: Any, rows: int, queries: int, keys: int, itemsize: int) -> int:
        """Bytes of tensors that one layer makes at a time, of `queries` and `keys` of each row.

        It is an estimate (r1/footprint.py). Here: queries, keys and values of all heads, the
        output, and the scores (also in fp32, and their bias) where the strategy keeps them.
        """
        heads = shape.num_attention_heads
        sizes = queries * (self.query_numbers(shape) + shape.v_head_dim) + keys * self.key_numbers(
            shape
        )
        scores = rows * heads * queries * keys * (itemsize + 4) if self.needs == "bias" else 0
        return rows * heads * sizes * itemsize + scores

    def query_numbers(self, shape: Any) -> int:
        """Numbers that are made of one query, of one head: here its parts, and both together."""
        return 2 * int(shape.qk_head_dim)

    def key_numbers(self, shape: Any) -> int:
        """Numbers that are made of one cached token, for one head: here a key and a value."""
        return int(shape.qk_head_dim + 2 * shape.v_head_dim)
