"""The tables of r1/guide/README.md: what the guide predicts, and how far it is from measured rows.

make_tables.py writes them into the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from r1.footprint import Sizes
from r1.guide import calibrate, fit, gpus, measured, page, ranking
from r1.guide.answer import Question, Speed
from r1.guide.cost import Terms
from r1.guide.layouts import Shares, setups, switches
from r1.guide.page import number
from r1.guide.predict import Predictor
from r1.guide.setup import Places, Setup
from r1.model.shapes import SHAPES
from r1.roofline import expected_tokens, speculation

LARGE = ("h200", "b200", "mi300x", "h100", "a100", "m3-ultra", "epyc")
"""Machines for R1 itself. Smaller ones need 16 or more."""
SIZES = Sizes(1, 1024, 1024)


def tables() -> dict[str, list[str]]:
    """All tables by name."""
    terms, predictor = (
        Terms(gpus.electricity()[0]),
        Predictor(measured.committed(), drive_gb_s=gpus.drive()[0]),
    )
    question = Question(SIZES, None, None, terms, predictor)
    one = Question(SIZES, None, 1, terms, predictor)
    r1 = [question.ask("r1", SHAPES["r1"], gpus.gpu(name)) for name in LARGE]
    return {
        "guide r1": page.ranking(ranking.ordered(r1)),
        "guide moonlight-16b": _machines("moonlight-16b", one),
        "guide r1-distill-qwen-32b": _machines("r1-distill-qwen-32b", one),
        "guide 4090": page.ranking(ranking.models(gpus.gpu("4090"), one)),
        "guide precision": _precision(question),
        "guide speculation": _speculation(question),
        "guide sharing": _sharing(question),
        "guide experts": _experts(question),
        "guide errors": _errors(),
    }


def _machines(name: str, question: Question) -> list[str]:
    return page.ranking(ranking.machines(name, SHAPES[name], question))


def _best(question: Question, name: str, gpu: str, quant: str, count: int = 1) -> Setup:
    """The layout that the guide would choose."""
    asked = replace(question, quant=quant, count=count)
    setup = asked.ask(name, SHAPES[name], gpus.gpu(gpu)).setup
    assert setup
    return setup


def _rows(question: Question, setup: Setup, *batches: int) -> list[Speed]:
    return [question.speed(setup, replace(SIZES, rows=n)) for n in batches]


def _precision(question: Question) -> list[str]:
    """How three models are stored, times the batch."""
    batches = (1, 8, 32)
    heads = (f"batch {n}: floor ms, expected" for n in batches)
    rows: list[Sequence[str]] = [("model", "stored", "GB on each", "largest batch", *heads)]
    for name, gpu, count, quants in (
        ("r1", "h200", 8, ("fp8", "int4")),
        ("moonlight-16b", "h100", 1, ("none", "fp8", "int4")),
        ("r1-distill-qwen-32b", "h100", 1, ("none", "fp8", "int4")),
    ):
        for quant in quants:
            setup = _best(question, name, gpu, quant, count)
            machines = f"{count} x {setup.gpu.title}" if count > 1 else setup.gpu.title
            most = fit.most_rows(setup, SIZES)
            speeds = _rows(question, setup, *(n for n in batches if n <= most))
            cells = [*map(_both, speeds), *["does not fit"] * (len(batches) - len(speeds))]
            rows.append(
                (
                    f"{name} on {machines}",
                    setup.stored,
                    f"{setup.memory(SIZES).total / 1e9:.1f}",
                    f"{most} or more" if most == fit.MOST_ROWS else str(most),
                    *cells,
                )
            )
    return page.table(rows)


def _sharing(question: Question) -> list[str]:
    """More GPUs of a kind for the same model: floor, sums, expected."""
    rows: list[Sequence[str]] = [
        (
            "model", "layout", "rows that fit", "batch 1: floor ms", "sums between GPUs ms",
            "expected ms", "batch 32: floor ms", "expected ms",
        )
    ]  # fmt: skip
    for name, gpu, quant, counts in (
        ("r1", "h200", "int4", (4, 8)),
        ("moonlight-16b", "h100", "none", (1, 2, 4, 8)),
        ("r1-distill-qwen-32b", "h100", "none", (1, 2, 4, 8)),
    ):
        layouts = [_best(question, name, gpu, quant, n) for n in counts]
        stages = Shares(quant, 1, 1, 4, "device")
        backend = switches(SHAPES[name], gpus.gpu(gpu), stages)
        assert backend
        layouts.append(replace(layouts[0], backend=backend))
        for setup in layouts:
            most = fit.most_rows(setup, SIZES)
            one, many = _rows(question, setup, 1, min(32, most))
            full = "" if most >= 32 else f" (batch {most})"
            rows.append(
                (
                    f"{name}, {setup.stored}, {setup.gpu.title}",
                    setup.layout,
                    f"{most} or more" if most == fit.MOST_ROWS else str(most),
                    number(one.times.floor_tpot_ms),
                    number(one.times.parts_ms.get("sums between GPUs")),
                    number(one.times.expected_tpot_ms),
                    number(many.times.floor_tpot_ms) + full,
                    number(many.times.expected_tpot_ms),
                )
            )
    return page.table(rows)


def _experts(question: Question) -> list[str]:
    """Experts in RAM, and on disk: floors, for even routing."""
    rows: list[Sequence[str]] = [
        (
            "model", "machine", "experts", "on the GPU", "copied a step", "TTFT s, at least",
            "TPOT ms, at least", "tok/s, at most", "slowest",
        )
    ]  # fmt: skip
    ram, disk = Places("host"), Places("disk", 64e9)
    for name, gpu, quant, places in (
        ("r1", "h100", "int4", ram), ("r1", "5090", "int4", ram), ("r1", "4090", "int4", ram),
        ("r1", "4090", "int4", disk), ("moonlight-16b", "3060", "none", ram),
        ("moonlight-16b", "3060", "int8", ram),
    ):  # fmt: skip
        found = replace(question, quant=quant, places=(places,)).ask(
            name, SHAPES[name], gpus.gpu(gpu)
        )
        assert found.setup
        times, experts = found.first.times, found.setup.config.experts.n_routed_experts
        copied = times.parts_ms.get("host link", 0.0) * question.predictor.rates(found.gpu).link
        first = times.floor_ttft_ms
        rows.append(
            (
                f"{name}, {found.setup.stored}", found.gpu.title, found.setup.place,
                f"{times.slots} of {experts}", f"{copied / 1e12:.2g} GB",
                number(first / 1e3) if first else "", number(times.floor_tpot_ms),
                number(found.first.floor_tokens_per_s), times.slowest,
            )
        )  # fmt: skip
    return page.table(rows)


def _both(speed: Speed) -> str:
    return f"{number(speed.times.floor_tpot_ms)}, {number(speed.times.expected_tpot_ms)}"


def _speculation(question: Question) -> list[str]:
    """What drafts are worth by bytes alone, for even routing.

    One of the MTP layer in R1; three of the smallest distill, for the one of 32 billion.
    """
    h200 = next(setups("r1", SHAPES["r1"], gpus.gpu("h200"), "fp8", 1)).backend
    large, small = "r1-distill-qwen-32b", "r1-distill-qwen-1.5b"
    h100, draft = (_best(question, name, "h100", "none") for name in (large, small))
    rows: list[Sequence[str]] = [
        (
            "batch", "R1, FP8, one draft: worth at 80% accepted", "pays from",
            f"{large}, bf16, three drafts of {small}: worth at 80%", "pays from",
        )
    ]  # fmt: skip
    for batch in (1, 8, 32, 128):
        mtp = replace(h200, speculate="mtp")
        three = replace(h100.backend, speculate="draft", draft_tokens=3)
        both = (
            speculation(SHAPES["r1"], mtp, batch, 2048),
            speculation(h100.config, three, batch, 2048, (draft.config, draft.backend)),
        )
        cells = [str(batch)]
        for found in both:
            pays = found.pays_from()
            worth = found.speedup(expected_tokens(0.8, found.drafts))
            cells += [f"{worth:.2f}x", "never" if pays is None else f"{pays:.0%}"]
        rows.append(cells)
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
