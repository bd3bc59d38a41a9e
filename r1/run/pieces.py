"""A decode step recorded in pieces: the host acts between two graphs.

Where experts lie in host memory, somebody has to start their copies, and only the host can. So a
step is a graph that ends when the first such layer has chosen. The next one computes this layer's
experts, but for the last that is copied. The next computes that one, and ends when the next layer
has chosen, and so on (placement/stepping.py cuts it). A step without graphs launches a dozen
kernels for each layer, and the link has nothing to do meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch

from r1.placement.link import Link

Stop = Callable[[], None]
"""What the host does between two pieces."""


class Pieces:
    """Recorded pieces, and what is done after each but the last."""

    def __init__(self, call: Callable[[], None], link: Link, pool: Any | None) -> None:
        """Record `call`. The pieces run one after the other, so they share their memory."""
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.stops: list[Stop] = []
        self.handle = pool or torch.cuda.graph_pool_handle()
        self._begin()
        link.cut = self._cut
        try:
            call()
        finally:
            link.cut = None
            self.recording.__exit__(None, None, None)

    def _begin(self) -> None:
        self.graphs.append(torch.cuda.CUDAGraph())
        self.recording = torch.cuda.graph(self.graphs[-1], pool=self.handle)
        self.recording.__enter__()

    def _cut(self, stop: Stop) -> None:
        self.recording.__exit__(None, None, None)
        self.stops.append(stop)
        self._begin()

    def pool(self) -> Any:
        """As a graph's: the memory that the pieces compute in."""
        return self.handle

    def replay(self) -> None:
        """Run the pieces, and the host's part between them."""
        for graph, stop in zip_longest(self.graphs, self.stops):
            graph.replay()
            if stop is not None:
                stop()
