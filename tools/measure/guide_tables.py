"""The tables of r1/guide/README.md: what the guide predicts, and how far it is from measured rows.

make_tables.py writes them into the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from r1.footprint import Sizes
from r1.guide import calibrate, gpus, measured, page, ranking
from r1.guide.answer import Question, Speed
from r1.guide.cost import Terms
from r1.guide.page import number
from r1.guide.predict import Predictor
from r1.guide.setup import setups
from r1.model.shapes import SHAPES
from r1.roofline import speculation

LARGE = ("h200", "b200", "mi300x", "h100", "a100", "m3-ultra", "epyc")
"""Machines for R1 itself. Smaller ones need 16 or more."""
SIZES = Sizes(1, 1024, 1024)


def tables() -> dict[str, list[str]]:
    """All tables by name."""
    terms, predictor = Terms(gpus.electricity()[0]), Predictor(measured.committed())
    question = Question(SIZES, None, None, terms, predictor)
    one = Question(SIZES, None, 1, terms, predictor)
    r1 = [question.ask("r1", SHAPES["r1"], gpus.gpu(name)) for name in LARGE]
    return {
        "guide r1": page.ranking(ranking.ordered(r1)),
        "guide moonlight-16b": _machines("moonlight-16b", one),
        "guide r1-distill-qwen-32b": _machines("r1-distill-qwen-32b", one),
        "guide 4090": page.ranking(ranking.models(gpus.gpu("4090"), one)),
        "guide precision": _precision(question),
        "guide speculation": _speculation(),
        "guide errors": _errors(),
    }


def _machines(name: str, question: Question) -> list[str]:
    return page.ranking(ranking.machines(name, SHAPES[name], question))


def _precision(question: Question) -> list[str]:
    """Moonlight's shape on one H100: how it is stored, times the batch."""
    rows: list[Sequence[str]] = [
        ("stored", "GB", "largest batch", *(f"batch {n}: floor ms, expected" for n in (1, 8, 32)))
    ]
    for quant in ("none", "fp8", "int4"):
        (setup,) = setups("moonlight-16b", SHAPES["moonlight-16b"], gpus.gpu("h100"), quant, 1)
        speeds = [question.speed(setup, Sizes(n, SIZES.prompt, SIZES.new)) for n in (1, 8, 32)]
        answer = question.ask("moonlight-16b", setup.config, setup.gpu)
        rows.append(
            (
                setup.stored,
                f"{setup.memory(SIZES).total / 1e9:.1f}",
                str(answer.most_rows),
                *map(_both, speeds),
            )
        )
    return page.table(rows)


def _both(speed: Speed) -> str:
    return f"{number(speed.times.floor_tpot_ms)}, {number(speed.times.expected_tpot_ms)}"


def _speculation() -> list[str]:
    """What one draft of R1's MTP layer is worth by bytes alone, for even routing."""

    config = SHAPES["r1"]
    (setup,) = setups("r1", config, gpus.gpu("h200"), "fp8", 1)
    rows: list[Sequence[str]] = [("batch", "worth at 80% accepted", "pays from")]
    for batch in (1, 8, 32, 128):
        backend = replace(setup.backend, speculate="mtp")
        found = speculation(config, backend, batch, 2048)
        pays = found.pays_from()
        rows.append(
            (str(batch), f"{found.speedup(1.8):.2f}x", "never" if pays is None else f"{pays:.0%}")
        )
    return page.table(rows)


def _errors() -> list[str]:
    """Each measured row of the best arms, predicted from the others."""
    best = measured.best(measured.committed())
    rows: list[Sequence[str]] = [("row", "measured ms", "predicted ms", "error", "starts from")]
    for row in best:
        found = calibrate.check(row, best)
        if found is None:  # the first row of its kind
            continue
        start = f"{found.start.model}, batch {found.start.batch}, {found.start.quant}"
        cells = (number(row.tpot_ms), number(found.predicted_ms), f"{found.error:+.1%}", start)
        rows.append((row.describe(), *cells))
    return page.table(rows)
