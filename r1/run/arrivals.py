"""Tokens on their way to the host, one step behind, so that copying overlaps the next step.

This is where logits that are no numbers are noticed: what a token was chosen by comes with it.

Shapes: B rows, S tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from r1.errors import InputError

Launched = tuple[Tensor, Tensor]
"""A step's tokens, int64 (B, S), and the numbers that chose them, fp32 (B, at most S)."""
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
    if tokens.device.type == "cpu":
        return partial(_checked, tokens, scores, advice)
    # The next step may overwrite what a captured one gave, so it is copied on the device first, by
    # one kernel, since every kernel costs a step 3 us. The copy to the host is on a stream beside:
    # in the steps' own it holds up the next step, by 13 us of 975 for Llama-3.2-1B on an H100.
    given = [joined(tokens, scores)]
    beside, arrived = copies(tokens.device), torch.cuda.Event()
    beside.wait_stream(torch.cuda.current_stream(tokens.device))
    with torch.cuda.stream(beside):
        host = torch.empty_like(given[0], device="cpu", pin_memory=True)
        host.copy_(given[0], non_blocking=True)
        arrived.record()

    def wait() -> Step:
        arrived.synchronize()
        given.clear()  # kept until here: this stream may use its memory again
        return _checked(*parted(host, tokens.shape, scores.shape), advice)

    return wait


def joined(tokens: Tensor, scores: Tensor) -> Tensor:
    """Tokens, int64 (...), and scores, fp32 (...), bit for bit in one tensor of int32, with one
    dimension.
    """
    return torch.cat([x.flatten().contiguous().view(torch.int32) for x in (tokens, scores)])


def parted(both: Tensor, tokens: torch.Size, scores: torch.Size) -> Launched:
    """Undoes `joined`: the tokens and the scores, in these shapes."""
    first, second = both.split([2 * tokens.numel(), scores.numel()])
    return first.view(torch.int64).view(tokens), second.view(torch.float32).view(scores)


@cache
def copies(device: torch.device) -> torch.cuda.Stream:
    """The stream of copies to the host."""
    return torch.cuda.Stream(device)


def _checked(tokens: Tensor, scores: Tensor, advice: str) -> Step:
    """The tokens, if all of the numbers that chose them are finite."""
    for row, numbers in enumerate(scores.tolist()):
        if not all(map(math.isfinite, numbers)):
            raise InputError(f"the model's logits for prompt {row} are no numbers: {advice}")
    rows: Step = tokens.tolist()
    return rows
