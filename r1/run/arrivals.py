"""Tokens on their way to the host, one step behind, so that copying overlaps the next step.

Shapes: B rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def arrivals(launched: Iterator[Tensor]) -> Iterator[list[list[int]]]:
    """Each step's tensor (B, S), on the host; on a GPU the next step runs while it is copied."""
    yield next(launched).tolist()
    copying: Callable[[], list[list[int]]] | None = None
    for tokens in launched:
        arrive = _to_host(tokens)
        if copying:
            yield copying()
        copying = arrive if tokens.device.type != "cpu" else None
        if not copying:
            yield arrive()
    if copying:
        yield copying()


def _to_host(tokens: Tensor) -> Callable[[], list[list[int]]]:
    """Start copying (B, S) to the host; the returned function waits for this copy alone."""
    if tokens.device.type == "cpu":
        return tokens.tolist
    host = torch.empty_like(tokens, device="cpu", pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[list[int]]:
        arrived.synchronize()
        rows: list[list[int]] = host.tolist()
        return rows

    return wait
