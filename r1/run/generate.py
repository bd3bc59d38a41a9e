"""Prompt, then step after step: the tokens of a batch as they come.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from r1.model.cache import Cache
from r1.run.arrivals import arrivals
from r1.run.drafter import Drafter
from r1.run.runner import Runner
from r1.run.sampler import Sampler
from r1.run.speculate import speculate
from r1.switches.backend import Backend


def steps(
    runner: Runner,
    rows: list[list[int]],
    limit: int,
    sampler: Sampler,
    cache: Cache,
    depth: int = 0,
) -> Iterator[list[list[int]]]:
    """Continue `rows` until each has `limit` tokens; yields each step's new token of each row.

    `cache` holds `depth` tokens a row.
    """

    def launched() -> Iterator[tuple[Tensor, Tensor]]:
        tokens, scores = sampler(runner.prefill(rows, cache, depth)[:, None])  # (B, 1)
        yield tokens, scores
        for _ in range(limit - 1):
            tokens, scores = runner.next_tokens(tokens, cache, sampler)
            yield tokens, scores

    yield from arrivals(launched(), _advice(runner.backend))


def speculated_steps(
    drafter: Drafter,
    rows: list[list[int]],
    limit: int,
    sampler: Sampler,
    cache: Cache,
    depth: int = 0,
    assumed: float | None = None,
) -> Iterator[list[list[int]]]:
    """The same with drafts: a step brings each row one token or more.

    A row may get more than `limit` tokens while others get there. `assumed`: see speculate.Turn.
    """
    counts = [0] * len(rows)
    launched = speculate(drafter, rows, sampler, cache, depth, assumed)
    for step in arrivals(launched, _advice(drafter.runner.backend)):
        new = [tokens[: accepted + 1] for *tokens, accepted in step]
        yield new
        counts = [count + len(tokens) for count, tokens in zip(counts, new, strict=True)]
        if min(counts) >= limit:
            return


def _advice(backend: Backend) -> str:
    """What to do about logits that are no numbers."""
    if backend.compute == "fp16":
        return "fp16 ends at 65,504, which this model exceeds; take bf16 or fp32"
    damaged = "the checkpoint's weights are damaged, or made for another program"
    return damaged if backend.compute == "fp32" else f"{damaged}; with dtype fp32 you can make sure"
