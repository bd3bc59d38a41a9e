"""Parity: does an arm still compute the same model?

Each arm reads the same tokens as an fp32 eager reference, and the logits are compared. The text is
the reference's own greedy continuation. Every arm gets it token by token. So all positions are
compared, not only the first, and a difference in one step does not change the input of the next.

Shapes: M positions compared, B rows, W vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r1.switches.backend import Backend

LOGITS_BYTES = 512 * 10**6
"""The most bytes of reference logits that are kept. To fit, rows, then positions, are left out."""


@dataclass(frozen=True)
class Bound:
    """The largest KL divergence that passes, in nats."""

    median_kl: float
    """For the median over positions."""
    mean_kl: float
    """For the mean over positions."""


@dataclass(frozen=True)
class Parity:
    """Distance from the reference. KL of the next-token distributions, in nats."""

    mean_kl: float
    median_kl: float
    max_logit_difference: float
    top1_agreement: float
    positions: int
    bound: float
    """The largest median_kl that passes."""
    mean_bound: float
    """The largest mean_kl that passes."""

    @property
    def passes(self) -> bool:
        """Whether both are within their bounds. NaN fails."""
        return self.median_kl <= self.bound and self.mean_kl <= self.mean_bound


FP32_BOUND = 1e-9
"""A sum in another order differs by a relative 1e-7. KL squares this."""
ROUNDING_MARGIN = 4.0
"""How many times the KL of one trusted run in the same dtype an arm may have.

Every arm rounds at other places."""
FLIP_MARGIN = 100.0
"""The same for the mean.

Rounding can decide a near tie between two experts the other way. Then the logits of that position
jump, in one run and not in the next. A few such positions dominate the mean, and say little about
the formula. The median does not see them. A wrong formula raises the median more than the mean."""


def bound(backend: Backend, rounding: dict[str, Bound]) -> Bound:
    """The KL that rounding explains, on this model and text.

    `rounding` has, by dtype, the KL of the reference's own code under autocast. It is measured each
    time, because the effect of rounding depends on how sharp the model's distributions are. A wrong
    formula exceeds the bound (tests/test_bench.py).
    """
    if backend.compute == "fp32":
        return Bound(FP32_BOUND, FP32_BOUND)
    made = rounding[backend.compute]
    return Bound(
        FP32_BOUND + ROUNDING_MARGIN * made.median_kl, FP32_BOUND + FLIP_MARGIN * made.mean_kl
    )


def rows_and_positions(batch: int, new: int, vocab_size: int) -> tuple[int, int]:
    """How many rows and steps are compared.

    At most 64 steps, and no more logits than LOGITS_BYTES.
    """
    steps = min(new, 64)
    rows = max(1, min(batch, LOGITS_BYTES // (4 * vocab_size * steps)))
    return rows, max(1, min(steps, LOGITS_BYTES // (4 * vocab_size * rows)))


def compare(ours: list[Tensor], reference: Tensor, allowed: Bound) -> Parity:
    """Compare M tensors of fp32 (B, W) logits with a reference, fp32 (M, B, W)."""
    kls, largest, agree = [], 0.0, 0
    for logits, right in zip(ours, reference, strict=True):
        logits, right = logits.float(), right.to(logits.device)
        # In double: the KL of two almost equal distributions is a difference of almost equal
        # numbers.
        p, q = right.double().log_softmax(dim=-1), logits.double().log_softmax(dim=-1)
        kls.append((p.exp() * (p - q)).sum(dim=-1))  # (B,)
        largest = max(
            largest, float(torch.nan_to_num(logits - right, nan=float("inf")).abs().max())
        )
        agree += int((logits.argmax(-1) == right.argmax(-1)).sum())
    kl = torch.cat(kls)  # (M B,)
    mean, median = float(kl.mean()), float(kl.quantile(0.5))
    return Parity(
        mean, median, largest, agree / len(kl), len(kl), allowed.median_kl, allowed.mean_kl
    )
