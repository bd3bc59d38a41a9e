"""Parity: does an arm still compute the same model?

Each arm reads the same tokens as an fp32 eager reference, and the logits are compared. The text is
the reference's own greedy continuation of the prompts, as long as what is timed. Every arm gets it
token by token. So a difference in one step does not change the input of the next.

What may differ is rounding. In fp32 it has a fixed bound. In another dtype it depends on the model
and the text, so it is measured each time: the reference's own code reads the text RUNS times in
this dtype, each time with other noise (worker/rounding.py). An arm may be somewhat farther from
fp32 than the farthest of these runs. Three things are held against theirs:

- the median KL divergence, over all positions and over the late ones. A formula that is wrong, or
  is wrong from some length on, raises it.
- the mean. Rounding may decide a near tie between two experts the other way, and then the logits of
  this position jump, in one run and not in the next. Such positions dominate the mean and say
  little about the formula, so it has more room.
- the outliers: the positions where the arm is much farther off than every run. Rare errors raise
  their number, such as wrong experts in a few calls. A jump that rounding makes is no outlier, if
  one of the runs made it too: a near tie belongs to its position.

Shapes: M steps compared, B rows of them, W vocab_size, R runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from r1.switches.backend import Backend

LOGITS_BYTES = 512 * 10**6
"""The most bytes of reference logits that are kept. To fit, rows, then steps, are left out."""
MOST_STEPS = 128
"""The most steps whose logits are compared."""

FP32_BOUND = 1e-9
"""The largest KL of an fp32 arm, in nats. A sum in another order differs by a relative 1e-7. KL
squares this."""
FP32_TIE = 1e-3
"""The largest lead, in logits, over which two fp32 sums may disagree. Some 1e-5 is usual."""
LEAST_KL = 1e-12
"""A KL below this is the rounding of fp32 logits: it is not compared with another one."""
RUNS = 24
"""How often the reference reads the text for a switch that rounds, each time with other noise."""
MEDIAN_MARGIN, MEAN_MARGIN = 2.0, 4.0
"""How many times the largest median, or mean, of the runs an arm's may be."""
EXCESS_MARGIN, FEW = 1.25, 4
"""The same for the median of the excess: the KL at a position, in the runs' usual KL there. The
median of n positions is itself uncertain, so the margin is 1 + FEW / n times as wide."""
OUTLIER_MARGIN = 4.0
"""How many times the largest KL of the runs, at the same position, makes an outlier."""
OUTLIERS, OUTLIERS_EACH = 4, 200
"""So many outliers pass where 64 positions or more are compared, and one more for each
OUTLIERS_EACH positions. In 52 texts (tiny-r1 and random weights, bf16 and autocast, 260 right arms)
one arm had 4 outliers of 128, all others at most 2. With wrong experts in 1% of the router's calls
58 of 60 arms had more than pass."""


@dataclass(frozen=True)
class Rounding:
    """What rounding does to the reference, as one switch asks for it."""

    kl: Tensor
    """fp64 (R, M, B): the KL of each run from fp32, in nats."""
    tie: float
    """The largest lead, in logits, that rounding takes from the best token."""


@dataclass(frozen=True)
class Bound:
    """The largest values that pass. By default all do."""

    median_kl: float = math.inf
    mean_kl: float = math.inf
    usual_kl: Tensor | float = 1.0
    """(M, B): the excess of a position is its KL divided by this."""
    excess: float = math.inf
    """For the median excess."""
    late_excess: float = math.inf
    """For the median excess of the late steps."""
    outlier_kl: Tensor | float = math.inf
    """(M, B): what makes a position an outlier."""
    tie: float = math.inf
    """A token of an arm's own text may be this much worse, in logits, than the best one."""


@dataclass(frozen=True)
class Parity:
    """Distance from the reference. KL of the next-token distributions, in nats."""

    mean_kl: float
    median_kl: float
    excess: float
    """The median excess in units of the largest that passes: of all steps, or of the late ones, if
    that is more."""
    max_logit_difference: float
    top1_agreement: float
    positions: int
    outliers: int
    """Positions whose KL is beyond their own bound."""
    bound: float
    """The largest median_kl that passes."""
    mean_bound: float
    """The largest mean_kl that passes."""
    outliers_bound: int
    """The most outliers that pass."""

    @property
    def passes(self) -> bool:
        """Whether all are within their bounds. NaN fails."""
        return (
            self.median_kl <= self.bound
            and self.mean_kl <= self.mean_bound
            and self.excess <= 1
            and self.outliers <= self.outliers_bound
        )


def rounds_by(backend: Backend) -> str | None:
    """The switch that makes an arm round, as in "amp=bf16" or "dtype=fp16". None: it is fp32.

    An fp32 arm whose inputs are FP8 rounds by "quant_activations=fp8": where a number is close to
    the middle of two e4m3 ones, another order of sums makes it the other one.
    """
    if backend.compute == "fp32":
        rounds = backend.quant_activations
        return None if rounds == "none" else f"quant_activations={rounds}"
    return f"amp={backend.amp}" if backend.amp != "off" else f"dtype={backend.dtype}"


def bound(backend: Backend, rounding: dict[str, Rounding]) -> Bound:
    """The largest values that rounding explains, on this model and text.

    `rounding`: what rounding does to the reference, by the switch that makes an arm round.
    """
    switch = rounds_by(backend)
    if switch is None:
        return Bound(FP32_BOUND, FP32_BOUND, FP32_BOUND, 1.0, 1.0, math.inf, FP32_TIE)
    kl = rounding[switch].kl  # (R, M, B)
    usual = (kl + LEAST_KL).log().mean(dim=0).exp()  # (M, B): a geometric mean
    farthest = kl.amax(dim=0)  # (M, B)
    return Bound(
        FP32_BOUND + MEDIAN_MARGIN * _largest(kl, median),
        FP32_BOUND + MEAN_MARGIN * _largest(kl, lambda run: float(run.mean())),
        usual,
        _largest_excess(kl, usual),
        _largest_excess(kl[:, -_late(len(usual)) :], late(usual)),
        # A position where all runs are close to fp32 may be so by chance.
        FP32_BOUND + OUTLIER_MARGIN * farthest.clamp(min=median(farthest)),
        FP32_TIE + rounding[switch].tie,
    )


def _largest(runs: Tensor, statistic: Callable[[Tensor], float]) -> float:
    """The largest value of a statistic of the runs (R, M, B). NaN if it is NaN in one of them."""
    return float(torch.tensor([statistic(run) for run in runs]).amax())


def _largest_excess(runs: Tensor, usual: Tensor) -> float:
    """The largest median excess that passes, of runs (R, M, B) with the usual KL (M, B)."""
    margin = EXCESS_MARGIN * (1 + FEW / usual.numel())
    return margin * _largest(runs, lambda run: _excess(run, usual))


def _excess(kl: Tensor, usual: Tensor | float) -> float:
    """The median of the excess."""
    return median((kl + LEAST_KL) / usual)


def outliers_bound(positions: int) -> int:
    """How many outliers pass among this many positions."""
    return min(OUTLIERS, max(1, positions // 16)) + positions // OUTLIERS_EACH


def steps_compared(new: int, most: int = MOST_STEPS) -> list[int]:
    """The steps whose logits are compared, at most `most` of the `new` ones.

    If these are fewer than all, the last quarter of them is the end of what is timed.
    """
    count = min(new, most)
    early = count - count // 4
    return [*range(early), *range(new - count + early, new)]


def rows_and_steps(batch: int, new: int, vocab_size: int) -> tuple[int, list[int]]:
    """How many rows are compared, and which steps: no more logits than LOGITS_BYTES."""
    steps = min(new, MOST_STEPS)
    rows = max(1, min(batch, LOGITS_BYTES // (4 * vocab_size * steps)))
    return rows, steps_compared(new, max(1, min(steps, LOGITS_BYTES // (4 * vocab_size * rows))))


def late(kl: Tensor) -> Tensor:
    """The part of numbers (M, B) that is of the late steps: a quarter of them, but at least 16."""
    return kl[-_late(len(kl)) :]


def _late(steps: int) -> int:
    return max(16, steps // 4)


def median(kl: Tensor) -> float:
    """The median of KLs (M, B)."""
    return float(kl.quantile(0.5))


def divergence(right: Tensor, ours: Tensor) -> Tensor:
    """The KL, fp64 (...), of our distributions from the right ones: of logits (..., W)."""
    # In double: the KL of two almost equal distributions is a difference of almost equal numbers.
    p, q = right.double().log_softmax(dim=-1), ours.double().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def compare(ours: list[Tensor], reference: Tensor, allowed: Bound) -> Parity:
    """Compare M tensors of fp32 (B, W) logits with a reference, fp32 (M, B, W)."""
    kls, largest, agree = [], 0.0, 0
    for logits, right in zip(ours, reference, strict=True):
        logits, right = logits.float(), right.to(logits.device)
        kls.append(divergence(right, logits).cpu())
        largest = max(
            largest, float(torch.nan_to_num(logits - right, nan=float("inf")).abs().max())
        )
        agree += int((logits.argmax(-1) == right.argmax(-1)).sum())
    kl = torch.stack(kls)  # (M, B)
    usual = torch.as_tensor(allowed.usual_kl).expand_as(kl)
    return Parity(
        mean_kl=float(kl.mean()),
        median_kl=median(kl),
        excess=max(
            _excess(kl, usual) / allowed.excess,
            _excess(late(kl), late(usual)) / allowed.late_excess,
        ),
        max_logit_difference=largest,
        top1_agreement=agree / kl.numel(),
        positions=kl.numel(),
        outliers=int((kl > allowed.outlier_kl).sum()),
        bound=allowed.median_kl,
        mean_bound=allowed.mean_kl,
        outliers_bound=outliers_bound(kl.numel()),
    )
