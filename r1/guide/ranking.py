"""Many answers in one order: every machine for a model, or every model for a machine."""

from __future__ import annotations

from collections.abc import Iterable

from r1.guide.answer import Answer, Question
from r1.guide.gpus import Gpu, all_gpus
from r1.model.config import Config
from r1.model.shapes import SHAPES

FAMILY = tuple(name for name in SHAPES if name != "tiny")
"""The models that are ranked for one machine."""


def machines(name: str, config: Config, question: Question) -> list[Answer]:
    """The answer of every machine for one model."""
    return ordered(question.ask(name, config, gpu) for gpu in all_gpus().values())


def models(gpu: Gpu, question: Question) -> list[Answer]:
    """The answer of one machine for every model.

    The largest model that fits comes first, then those whose experts lie elsewhere.
    """
    answers = [question.ask(name, SHAPES[name], gpu) for name in FAMILY]

    def place(answer: Answer) -> tuple[bool, bool, int]:
        if answer.setup is None or answer.memory is None:
            return True, True, 0
        return False, answer.setup.streams, -answer.memory.weights

    return sorted(answers, key=place)


def ordered(answers: Iterable[Answer]) -> list[Answer]:
    """The cheapest token first, then those without a price, then those that do not fit."""

    def place(answer: Answer) -> tuple[bool, bool, float]:
        if answer.setup is None:
            return True, True, answer.gpu.capacity
        price = answer.best.cost and answer.best.cost.least_usd_per_million_tokens
        return False, not price, price or -(answer.best.tokens_per_s or 0.0)

    return sorted(answers, key=place)


def enough(
    answers: Iterable[Answer], budget_usd: float | None, min_tokens_per_s: float | None
) -> list[Answer]:
    """Those that cost no more, and give one row so many tokens a second.

    Where either is not known, the answer is left out too: it can't be promised.
    """
    kept = []
    for answer in answers:
        if budget_usd is not None:
            price = answer.purchase_usd
            if price is None or price > budget_usd:
                continue
        if min_tokens_per_s is not None:
            rate = answer.first.tokens_per_s if answer.speeds else None
            if rate is None or rate / answer.first.sizes.rows < min_tokens_per_s:
                continue
        kept.append(answer)
    return kept
