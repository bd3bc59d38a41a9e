"""Is it still the same model? Each arm reads the same tokens as an fp32 eager reference, and the
logits are compared.

The text is the reference's own greedy continuation, fed token by token to every arm: so all
positions are compared, not only the first, and a difference in one step doesn't change what the
next ones are asked.

Shapes: P positions compared, B rows, W vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r1.switches.backend import Backend

LOGITS_BYTES = 512 * 10**6
"""How much of the reference's logits is kept; rows, then positions, are left out to fit."""


@dataclass(frozen=True)
class Bound:
    """The largest KL that passes, in nats: of the middle position, and on average."""

    median_kl: float
    mean_kl: float


@dataclass(frozen=True)
class Parity:
    """Distance from the reference. KL in nats, of the next-token distributions."""

    mean_kl: float
    median_kl: float
    max_logit_difference: float
    top1_agreement: float
    positions: int
    bound: float
    """median_kl may be so much."""
    mean_bound: float

    @property
    def passes(self) -> bool:
        return self.median_kl <= self.bound and self.mean_kl <= self.mean_bound  # NaN fails


FP32_BOUND = 1e-9
"""Sums in another order differ by 1e-7 relative, which KL squares."""
ROUNDING_MARGIN = 4.0
"""How many times the rounding of one trusted run in a dtype another one may be off: each rounds at
other places."""
FLIP_MARGIN = 100.0
"""The same for the mean. Where rounding decides a near tie between experts the other way, that
position's logits jump, in one run and not in the next (traps.md 14): some positions carry the mean,
and say little of the formula. The median does not see them, and rises with a wrong formula more
than the mean does."""


def bound(backend: Backend, rounding: dict[str, Bound]) -> Bound:
    """The KL that rounding explains, on this model and text; a wrong formula exceeds it
    (tests/test_bench.py).

    `rounding` has, by dtype, the KL of the reference's own code under autocast: measured each time,
    because how far rounding carries depends on how sharp the model's distributions are."""
    if backend.compute == "fp32":
        return Bound(FP32_BOUND, FP32_BOUND)
    made = rounding[backend.compute]
    return Bound(
        FP32_BOUND + ROUNDING_MARGIN * made.median_kl, FP32_BOUND + FLIP_MARGIN * made.mean_kl
    )


def rows_and_positions(batch: int, new: int, vocab_size: int) -> tuple[int, int]:
    """How many rows and steps are compared: at most 64 steps, and no more logits than
    LOGITS_BYTES."""
    steps = min(new, 64)
    rows = max(1, min(batch, LOGITS_BYTES // (4 * vocab_size * steps)))
    return rows, max(1, min(steps, LOGITS_BYTES // (4 * vocab_size * rows)))


def compare(ours: list[Tensor], reference: Tensor, allowed: Bound) -> Parity:
    """`ours`: P tensors of fp32 (B, W) logits; `reference`: fp32 (P, B, W); `allowed`: what
    passes."""
    kls, largest, agree = [], 0.0, 0
    for logits, right in zip(ours, reference, strict=True):
        logits, right = logits.float(), right.to(logits.device)
        p, q = (
            right.double().log_softmax(dim=-1),
            logits.double().log_softmax(dim=-1),
        )  # KL of near twins cancels
        kls.append((p.exp() * (p - q)).sum(dim=-1))  # (B,)
        largest = max(
            largest, float(torch.nan_to_num(logits - right, nan=float("inf")).abs().max())
        )
        agree += int((logits.argmax(-1) == right.argmax(-1)).sum())
    kl = torch.cat(kls)  # (P B,)
    mean, median = float(kl.mean()), float(kl.quantile(0.5))
    return Parity(
        mean, median, largest, agree / len(kl), len(kl), allowed.median_kl, allowed.mean_kl
    )
