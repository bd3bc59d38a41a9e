"""Whole texts: read one step by step, or write one.

Shapes: N steps of a text, B rows, W vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.bench.worker import steps
from r1.bench.worker.subject import Subject
from r1.run.sampler import Sampler


def read(
    subject: Subject, text: Tensor, width: int | None = None, *, filled: bool = False
) -> Iterator[Tensor]:
    """Read the prompts, and after them a text, int64 (N, B). Yields N tensors (B, W): the logits of
    each step. With CUDA graphs a tensor is valid until the next one is asked for.

    A call reads `width` tokens of each row, the last one fewer. By default it is a step of this
    arm: with drafts, it reads as many tokens as are verified, and the last step some more than the
    text's. `filled`: the cache holds the workload's depth already.
    """
    yield steps.read_prompts(subject) if filled else steps.prefill(subject)
    fed = text[:-1]
    if width is None:
        width = subject.engine.backend.step_tokens
        fed = F.pad(fed, (0, 0, 0, -len(fed) % width))  # (a multiple of width, B)
    for start in range(0, len(fed), width):
        logits = steps.decode(subject, fed[start : start + width].T)  # (B, width, W)
        yield from logits.unbind(dim=1)[: len(text) - 1 - start]


def write(subject: Subject) -> Tensor:
    """The text that the arm writes, greedily and as it is timed: int64 (N, B).

    Drafts are accepted where the model accepts them, also if the workload assumes how many are.
    """
    subject.fill()
    w = subject.workload
    rows: list[list[int]] = [[] for _ in range(w.batch)]
    sampler = Sampler(0.0, seed=w.seed)
    for step in subject.engine.steps(subject.prompts, w.new, sampler, subject.cache, w.depth):
        for row, tokens in zip(rows, step, strict=True):
            row += tokens
    return torch.tensor([row[: w.new] for row in rows], device=subject.device).T
