"""Is it still the same model? Each arm reads the same tokens as an fp32 eager reference, and the logits are compared.

The text is the reference's own greedy continuation, fed token by token to every arm: so all positions are compared, not
only the first, and a difference in one step doesn't change what the next ones are asked.

Shapes: P positions compared, B rows, W vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r1.backend import Backend

LOGITS_BYTES = 512 * 10**6
"""How much of the reference's logits is kept; rows, then positions, are left out to fit."""


@dataclass(frozen=True)
class Parity:
    """Distance from the reference. KL in nats, of the next-token distributions."""

    mean_kl: float
    max_logit_difference: float
    top1_agreement: float
    positions: int
    bound: float
    """mean_kl may be so much."""

    @property
    def passes(self) -> bool:
        return self.mean_kl <= self.bound  # NaN fails


FP32_BOUND = 1e-9
"""Sums in another order differ by 1e-7 relative, which KL squares."""
ROUNDING_MARGIN = 4.0
"""How many times the rounding of one trusted run in a dtype another one may be off: each rounds at other places."""


def bound(backend: Backend, rounding: dict[str, float]) -> float:
    """The mean KL that rounding explains, on this model and text; a wrong formula exceeds it (tests/test_bench.py).

    `rounding` has, by dtype, the KL of the reference's own code under autocast: measured each time, because how far rounding
    carries depends on how sharp the model's distributions are.
    """
    return FP32_BOUND if backend.compute == "fp32" else FP32_BOUND + ROUNDING_MARGIN * rounding[backend.compute]


def rows_and_positions(batch: int, new: int, vocab_size: int) -> tuple[int, int]:
    """How many rows and steps are compared: at most 64 steps, and no more logits than LOGITS_BYTES."""
    steps = min(new, 64)
    rows = max(1, min(batch, LOGITS_BYTES // (4 * vocab_size * steps)))
    return rows, max(1, min(steps, LOGITS_BYTES // (4 * vocab_size * rows)))


def compare(ours: list[Tensor], reference: Tensor, allowed: float) -> Parity:
    """`ours`: P tensors of fp32 (B, W) logits; `reference`: fp32 (P, B, W); `allowed`: the largest mean KL that passes."""
    kl, largest, agree = 0.0, 0.0, 0
    for logits, right in zip(ours, reference, strict=True):
        logits, right = logits.float(), right.to(logits.device)
        p, q = right.double().log_softmax(dim=-1), logits.double().log_softmax(dim=-1)  # KL of near twins cancels
        kl += float((p.exp() * (p - q)).sum(dim=-1).mean())
        largest = max(largest, float(torch.nan_to_num(logits - right, nan=float("inf")).abs().max()))
        agree += int((logits.argmax(-1) == right.argmax(-1)).sum())
    count = len(ours) * ours[0].shape[0]
    return Parity(kl / len(ours), largest, agree / count, count, allowed)
