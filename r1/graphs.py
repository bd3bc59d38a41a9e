"""CUDA graphs of our own: one decode step recorded once, then replayed with a single launch.

A graph repeats the same kernels on the same addresses, so everything that changes from step to step must change *in*
memory that the graph knows: the tokens are copied into its own buffer, positions and lengths are tensors of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from r1.cache import Cache

WARM_UPS = 3
"""Runs before the capture: libraries make their handles and workspaces, and compiled code is compiled, outside of it."""


@dataclass
class Captured:
    """One recorded step: bound to one cache and one shape of tokens."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    logits: Tensor

    def replay(self, tokens: Tensor) -> Tensor:
        """Run the step on `tokens`; the logits returned are the graph's own, and change with the next replay."""
        if tokens.shape != self.tokens.shape or tokens.dtype != self.tokens.dtype:
            raise ValueError(f"captured for tokens {tuple(self.tokens.shape)}, called with {tuple(tokens.shape)}")
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits


def capture(step: Callable[[Tensor, Cache], Tensor], tokens: Tensor, cache: Cache) -> Captured:
    """Record `step(tokens, cache)`. The cache's lengths are as before afterwards; slots behind them may be written."""
    static, lengths = tokens.clone(), cache.lengths.clone()
    logits: list[Tensor] = []

    def once() -> None:
        logits[:] = [step(static, cache)]

    graph = record(once, lambda: cache.lengths.copy_(lengths))
    return Captured(graph, static, logits[0])


def record(call: Callable[[], None], undo: Callable[[], object] = lambda: None) -> torch.cuda.CUDAGraph:
    """Run `call` some times on a stream beside, then record it; `undo` follows each of these, and is not recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
            undo()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    undo()
    return graph
