"""Answers as Markdown, and as rows that bench.py --compare reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from r1.bench.report.fields import SCHEMA
from r1.files.config_json import dump_config
from r1.guide.answer import Answer, Speed
from r1.guide.cost import Cost
from r1.guide.fit import MOST_ROWS
from r1.guide.gpus import Gpu
from r1.guide.notes import notes, number
from r1.guide.predict import Predictor

MEMORY = ("weights", "cache", "activations", "graphs", "libraries", "total")
RANKED = (
    "machine", "model", "layout", "stored", "GB of GB", "tok/s, one row: floor", "expected",
    "best batch", "tok/s", "USD/M tokens: rent", "own", "J/token, at most",
)  # fmt: skip
PREDICTED = "Every time here is predicted; none is a measurement."


def one(answer: Answer, predictor: Predictor, smaller: Answer | None = None) -> str:
    """All about one answer. `smaller`: see notes."""
    gpu, setup = answer.gpu, answer.setup
    if setup is None or answer.memory is None:
        return unfit(answer)
    sizes = answer.first.sizes
    title = f"# {answer.name} on {machines(answer)}, {setup.stored}, {setup.layout}"
    whole = ", the model's context" * (answer.longest == setup.config.max_position_embeddings)
    limits = (
        f"Largest batch of such rows: {most_rows(answer)}. Longest row at batch {sizes.rows}: "
        f"{answer.longest:,} tokens{whole}."
    )
    total = "on each, " if setup.count > 1 else ""
    cut = ", cut to the model's context" * answer.cut
    lines = [
        title, "", f"{sizes.prompt:,} tokens of prompt, {sizes.new:,} new ones{cut}. {PREDICTED}",
        "",
        f"## Memory, GB ({total}{gpu.capacity / 1e9:.0f} may be used)", "",
        *table([MEMORY, [f"{getattr(answer.memory, name) / 1e9:.2f}" for name in MEMORY]]), "",
        limits, "", "## Speed and cost", "", *table(speed_table(answer)), "",
        *notes(answer, predictor, smaller), "", "## Sources", "", *sources(gpu),
    ]  # fmt: skip
    return "\n".join(lines)


def unfit(answer: Answer) -> str:
    """Why there is no answer, and what to ask instead."""
    begin = f"{answer.name} does not fit {answer.gpu.title}"
    if answer.why_not:
        return f"{answer.name} can't run on {answer.gpu.title} like this: {answer.why_not}."
    ranks = f"`python -m r1.guide --model {answer.name}` ranks the machines that hold it"
    return f"{begin}, in any layout and precision that these flags allow. {ranks}."


def most_rows(answer: Answer) -> str:
    """The largest batch; larger ones than MOST_ROWS were not looked at."""
    return f"{answer.most_rows}{' or more' * (answer.most_rows == MOST_ROWS)}"


def machines(answer: Answer) -> str:
    """How many of which machine."""
    count = answer.setup.count if answer.setup else 1
    return answer.gpu.title if count == 1 else f"{count} x {answer.gpu.title}"


def speed_table(answer: Answer) -> list[Sequence[str]]:
    """Floors and expected times, a column for each batch."""
    heads = [f"batch {speed.sizes.rows}" for speed in answer.speeds]
    rows: dict[str, list[str]] = {
        name: []
        for name in (
            "TTFT ms, floor", "TTFT ms, expected", "TPOT ms, floor", "TPOT ms, expected",
            "tokens/s, floor", "tokens/s, expected", "rent, USD per million tokens",
            "own, USD per million tokens", "joules per token, at most",
            "joules per token, expected", "rent, USD per million tokens, at least",
            "own, USD per million tokens, at least",
        )
    }  # fmt: skip
    for speed in answer.speeds:
        t, c = speed.times, speed.cost
        cells = (
            t.floor_ttft_ms, t.expected_ttft_ms, t.floor_tpot_ms, t.expected_tpot_ms,
            speed.floor_tokens_per_s, speed.tokens_per_s, *(_prices(c)),
            c.expected_joules_per_token if c else None,
            *_prices(None if c else speed.least_cost)[:2],
        )  # fmt: skip
        for name, value in zip(rows, cells, strict=True):
            rows[name].append(number(value))
    assert answer.setup
    watts = number(answer.gpu.figures["board_w"] * answer.setup.count)
    power = ("watts, at most", *[watts] * len(heads))
    known = {name: cells for name, cells in rows.items() if any(cells)}
    return [("", *heads), *((name, *cells) for name, cells in known.items()), power]


def sources(gpu: Gpu) -> list[str]:
    """Each figure with its source and its date."""
    return [
        f"- {name} {value:g}: {origin.url} ({origin.date}{'; ' * bool(origin.note)}{origin.note})"
        for name, value in gpu.figures.items()
        if (origin := gpu.sources[name])
    ]


def ranking(answers: Sequence[Answer]) -> list[str]:
    """A table of answers, in their order."""
    return table([RANKED, *map(_ranked, answers)])


def _ranked(answer: Answer) -> list[str]:
    if answer.setup is None or answer.memory is None:
        return [answer.gpu.title, answer.name, "does not fit", *[""] * (len(RANKED) - 3)]
    first, best = answer.first, answer.best
    rate, prices = number(best.tokens_per_s), [number(each) for each in _prices(best.cost)]
    if not best.cost:  # bounds are marked as such
        rate = f"≤ {number(best.floor_tokens_per_s)}"
        least = [number(each) for each in _prices(best.least_cost)[:2]]
        prices = [each and f"≥ {each}" for each in least] + [""]
    return [
        machines(answer), answer.name, answer.setup.layout, answer.setup.stored,
        f"{answer.memory.total / 1e9:.1f} of {answer.gpu.capacity / 1e9:.0f}",
        number(first.floor_tokens_per_s / first.sizes.rows), number(_one_row(first)),
        str(best.sizes.rows), rate, *prices,
    ]  # fmt: skip


def _prices(cost: Cost | None) -> tuple[float | None, float | None, float | None]:
    """Rent, own, joules."""
    if cost is None:
        return None, None, None
    rent, own = cost.rent_usd_per_million_tokens, cost.own_usd_per_million_tokens
    return rent, own, cost.joules_per_token


def _one_row(speed: Speed) -> float | None:
    return speed.tokens_per_s and speed.tokens_per_s / speed.sizes.rows


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown; the first row is the heading. Words stand left, numbers right."""
    heads, *body = rows
    cells = [[row[i] for row in body if row[i]] for i in range(len(heads))]
    words = [not all(cell.lstrip("≤≥ ")[0].isdigit() for cell in column) for column in cells]
    rule = ["---" if word else "---:" for word in words]
    return [f"| {' | '.join(row)} |" for row in (heads, rule, *body)]


def as_result(answer: Answer) -> dict[str, Any]:
    """The answer as a file that bench.py --compare reads, every row marked as a prediction."""
    setup = answer.setup
    assert setup
    return {
        "schema": SCHEMA,
        "machine": {
            "name": f"{machines(answer)} (PREDICTED)",
            "memory_gb": setup.gpu.figures["memory_gb"],
        },
        "config": dump_config(setup.config),
        "workload": answer.name,
        "notes": [PREDICTED],
        "rows": [_as_row(answer, speed) for speed in answer.speeds],
    }


def _as_row(answer: Answer, speed: Speed) -> dict[str, Any]:
    setup, times, memory = answer.setup, speed.times, answer.memory
    assert setup and memory
    return {
        "arm": f"PREDICTED: {setup.stored}, {setup.layout}",
        "kind": "predicted",
        "predicted": True,
        "model": answer.name,
        "batch": speed.sizes.rows,
        "prompt": speed.sizes.prompt,
        "new": speed.sizes.new,
        "depth": speed.sizes.depth,
        "refused": None,
        "tpot_ms": times.expected_tpot_ms,
        "ttft_ms": times.expected_ttft_ms,
        "floor_ms": times.floor_tpot_ms,
        "decode_tok_s": speed.tokens_per_s,
        "allocated_gb": setup.memory(speed.sizes).total / 1e9,
        "experts": setup.places.experts,
        "slowest": times.slowest,
        "starts_from": times.step_row and times.step_row.describe(),
        "backend": vars(replace(setup.backend, expert_slots=times.slots)),
    }
