"""From logits to a token: temperature, nucleus, and draws that need no sync.

Shapes: W vocab_size; ... any leading dimensions (rows, positions).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from r1.errors import InputError

TEMPERATURE, TOP_P = 0.6, 0.95
"""What R1's authors recommend (DeepSeek-R1's README, usage recommendations)."""
SMALLEST = torch.finfo(torch.float32).tiny
"""1.2e-38. Below it fp32 may round a temperature to 0, and 0 / 0 is NaN."""


@dataclass
class Sampler:
    """Picks a token from each row's logits.

    Temperature 0 is greedy. A seed makes the same choices again.
    """

    temperature: float = TEMPERATURE
    top_p: float = TOP_P
    seed: int | None = None
    _generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, (int, float)) or not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature!r}: give 0 (greedy) or more")
        if not isinstance(self.top_p, (int, float)) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p!r}: give more than 0 and at most 1")
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed < 2**63):
            raise InputError(f"seed={self.seed!r}: give a whole number from 0 to 2^63 - 1")

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 (..., W) -> tokens, int64 (...), and their scores, fp32 (...), without a sync.

        A score is the token's logit or its probability. It is NaN or infinite where the logits are
        no distribution, and then the token means nothing: arrivals.py looks at it on the host.
        """
        if self.temperature == 0:
            return greedy(logits)
        random = torch.empty_like(logits).exponential_(generator=self.generator(logits.device))
        p = self.probabilities(logits)  # all NaN where one logit is NaN, or the best infinite
        token = draw(p, random)
        return token, p.gather(-1, token[..., None]).squeeze(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """fp32 (..., W) -> the distribution to draw from, fp32 (..., W) of sum 1.

        When greedy, all of it is on the best token.
        """
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
        best = logits.amax(dim=-1, keepdim=True)
        # Relative to the best, so that no temperature, however small, makes them overflow.
        scaled = (logits - best) / max(self.temperature, SMALLEST)
        p, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True)
        # The nucleus: the likeliest tokens up to the one that reaches top_p (arXiv 1904.09751).
        p = p.masked_fill(p.cumsum(dim=-1) - p >= self.top_p, 0.0)
        return torch.zeros_like(p).scatter_(-1, order, p / p.sum(dim=-1, keepdim=True))

    def generator(self, device: torch.device) -> torch.Generator:
        """The source of this sampler's random numbers, made at its first use."""
        if self._generator is None:
            self._generator = torch.Generator(device)
            if self.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.seed)
        return self._generator


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (..., W) -> each row's best token, int64 (...), and its logit, fp32 (...). NaN counts as
    the largest.
    """
    score, token = logits.max(dim=-1)
    return token, score


def draw(p: Tensor, exponential: Tensor) -> Tensor:
    """Weights p (..., W), which need not sum to 1, and Exp(1) numbers (..., W) -> int64 (...).

    p / Exp(1) is largest at i with probability p[i] / sum(p). So a draw needs no sync, and never
    takes a token with p = 0.
    """
    return (p / exponential).argmax(dim=-1)
