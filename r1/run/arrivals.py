"""Tokens on their way to the host, one step behind, so that copying overlaps the next step.

This is where logits that are no numbers are noticed: what a token was chosen by comes with it.

Shapes: B rows, S tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from r1.errors import InputError

Launched = tuple[Tensor, Tensor]
"""A step's tokens, int64 (B, S), and the numbers that chose them, fp32 (B, S)."""
Step = list[list[int]]


def arrivals(launched: Iterator[Launched], advice: str) -> Iterator[Step]:
    """Each step's tokens, on the host; on a GPU the next step runs while they are copied.

    Raises InputError, which ends with `advice`, where a number that chose a token is not finite.
    """
    waiting: Callable[[], Step] | None = None
    for number, (tokens, scores) in enumerate(launched):
        arrive = _to_host(tokens, scores, advice)
        if waiting:
            yield waiting()
        waiting = arrive
        if number == 0 or tokens.device.type == "cpu":
            yield waiting()
            waiting = None
    if waiting:
        yield waiting()


def _to_host(tokens: Tensor, scores: Tensor, advice: str) -> Callable[[], Step]:
    """Start copying (B, S) to the host; the returned function waits for this copy alone."""
    copies = [_copy(tensor) for tensor in (tokens, scores)]
    arrived = torch.cuda.Event() if tokens.device.type != "cpu" else None
    if arrived:
        arrived.record()

    def wait() -> Step:
        if arrived:
            arrived.synchronize()
        rows, chosen_by = (copy.tolist() for copy in copies)
        for row, numbers in enumerate(chosen_by):
            if not all(map(math.isfinite, numbers)):
                raise InputError(f"the model's logits for prompt {row} are no numbers: {advice}")
        return rows

    return wait


def _copy(tensor: Tensor) -> Tensor:
    """The tensor on the host; from a GPU it arrives later."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
