"""How a step is called: as it is, under autocast, or captured. Callers wrap one another.

A step is a function `step(*tensors, cache)` that returns tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from r1.device import DTYPES
from r1.model.cache import Cache
from r1.placement.link import Link
from r1.run.graphs import Step, capture
from r1.switches.backend import Backend


class Caller(Protocol):
    """Runs a step. `key` tells steps of other kinds and shapes apart."""

    def __call__(
        self, key: tuple[Any, ...], step: Step, inputs: tuple[Tensor, ...], cache: Cache
    ) -> tuple[Tensor, ...]: ...


class Plain:
    """Calls a step as it is: without autograd and, under `amp`, with autocast."""

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self.backend, self.device = backend, device
        self._limits: Callable[[], AbstractContextManager[Any]] = nullcontext
        if backend.compile:
            from r1.run import compiled  # the compiler takes seconds to import

            self._limits = compiled.limits

    @contextmanager
    def context(self) -> Iterator[None]:
        """Surrounds every call of the model. `amp` decides on autocast, not the caller."""
        with torch.inference_mode(), self._autocast(), self._limits():
            yield

    def _autocast(self) -> AbstractContextManager[Any]:
        kind, amp = self.device.type, self.backend.amp
        if amp != "off":
            return torch.autocast(kind, DTYPES[amp])
        if torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
        return nullcontext()

    def __call__(
        self, key: tuple[Any, ...], step: Step, inputs: tuple[Tensor, ...], cache: Cache
    ) -> tuple[Tensor, ...]:
        with self.context():
            return step(*inputs, cache)


class Captured:
    """Records a step the first time that a cache meets its key, and replays it from then on.

    The tensors returned are the graph's own, and change with the next replay.
    """

    def __init__(self, plain: Plain, link: Link | None = None) -> None:
        """`link`: over which experts come, if they do."""
        self.plain, self.link = plain, link

    def __call__(
        self, key: tuple[Any, ...], step: Step, inputs: tuple[Tensor, ...], cache: Cache
    ) -> tuple[Tensor, ...]:
        def once(*arguments: Any) -> tuple[Tensor, ...]:
            with self.plain.context():
                return step(*arguments)

        with torch.inference_mode():
            if key not in cache.graphs:
                # Graphs of one kind never run at the same time, so they share working memory.
                alike = (made for other, made in cache.graphs.items() if other[0] == key[0])
                pool = next((made.graph.pool() for made in alike), None)
                cache.graphs[key] = capture(once, inputs, cache, pool, self.link)
            outputs: tuple[Tensor, ...] = cache.graphs[key].replay(*inputs)
            return outputs
