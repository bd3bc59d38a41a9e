"""CUDA graphs: a decode step or a prompt is recorded once, then replayed with a single launch.

A graph repeats the same kernels on the same addresses. So everything that changes from step to step
must change *in* memory that the graph knows: inputs are copied into the graph's own buffers, and
positions and lengths are tensors of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r1.model.cache import Cache
from r1.placement.link import Link
from r1.run.pieces import Pieces

WARM_UPS = 3
"""Runs before the capture, in which libraries make their handles and code is compiled."""


Step = Callable[..., tuple[Tensor, ...]]
"""A function that can be captured: `step(*tensors, cache)` returns tensors and reads no value on
the host."""


@dataclass
class Captured:
    """One recorded step: bound to one cache and one shape of each input."""

    graph: torch.cuda.CUDAGraph | Pieces
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def replay(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the step on `inputs`.

        The returned tensors are the graph's own, and change with the next replay. An input that is
        the graph's own already needs no copy: a step may leave there what the next one reads.
        """
        for static, given in zip(self.inputs, inputs, strict=True):
            if given.shape != static.shape or given.dtype != static.dtype:
                raise ValueError(
                    f"captured for a tensor {tuple(static.shape)}, called with {tuple(given.shape)}"
                )
            if given is not static:
                static.copy_(given)
        self.graph.replay()
        return self.outputs


Pool = Any
"""torch's handle of the memory that a graph computes in. Graphs that never run at the same time may
share one."""


def capture(
    step: Step, inputs: tuple[Tensor, ...], cache: Cache, pool: Pool | None = None,
    link: Link | None = None,
) -> Captured:  # fmt: skip
    """Record `step(*inputs, cache)`; in pieces where experts come over a `link`.

    It leaves the cache's lengths as they were. Slots after them may be written.
    """
    static, lengths = tuple(tensor.clone() for tensor in inputs), cache.lengths.clone()
    outputs: list[tuple[Tensor, ...]] = []

    def once() -> None:
        outputs[:] = [step(*static, cache)]

    def undo() -> None:
        cache.lengths.copy_(lengths)

    recorded = record_pieces(once, undo, link, pool) if link else record(once, undo, pool)
    return Captured(recorded, static, outputs[0])


def replay_seconds(graph: torch.cuda.CUDAGraph, repetitions: int) -> list[float]:
    """Seconds of each replay, by the device's own events."""
    times = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times


def record(
    call: Callable[[], None], undo: Callable[[], object] = lambda: None, pool: Pool | None = None
) -> torch.cuda.CUDAGraph:
    """Run `call` some times on a side stream, then record it.

    `undo` is called after each of these, and is not recorded.
    """
    warm_up(call, undo)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    undo()
    return graph


def record_pieces(
    call: Callable[[], None], undo: Callable[[], object], link: Link, pool: Pool | None = None
) -> Pieces:
    """The same of a step whose experts come over a `link`. It is warmed up as it is recorded: with
    a pass for the last expert, whose kernels no other call may have compiled.
    """
    link.cut = lambda stop: stop()
    try:
        warm_up(call, undo)
    finally:
        link.cut = None
    pieces = Pieces(call, link, pool)
    undo()
    return pieces


def warm_up(call: Callable[[], None], undo: Callable[[], object]) -> None:
    """Run `call` some times on a side stream, as it must be before it is recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
            undo()
    torch.cuda.current_stream().wait_stream(side)
