"""What each rung of the ladder measured, in a sentence: for r1/README.md.

The numbers are those of the committed files in results/h100. make_tables.py puts the sentences into
the page.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1.bench import timeline

RESULTS = Path(__file__).parent / "results" / "h100"

Row = dict[str, Any]


def sentences() -> dict[str, list[str]]:
    """The lines of each place in the page, by its name."""
    ladder = rows("ladder")
    found = {}
    for before, after in itertools.pairwise(ladder):
        name = after["arm"].removeprefix("+ ")
        more = MORE.get(name, lambda _before, _after: "")(before, after)
        found[f"rung {name}"] = [f"Measured, `{name}`: {step(before, after)}.{more}"]
    found["rung prefill"] = prefill()
    found["rung speculation"] = [speculation("moonlight"), speculation("tiny")]
    return found


def rows(name: str) -> list[Row]:
    """The rows of a result file."""
    found: list[Row] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return found


def step(before: Row, after: Row) -> str:
    """What became of a decode step: its time, and the kernels that it launches."""
    text = f"{before['tpot_ms']:.2f} to {after['tpot_ms']:.2f} ms a token"
    if overlap(before, after):
        text += " (single repetitions overlap)"
    old, new = before["kernels"], after["kernels"]
    more = " kernels a step, as before" if old == new else f" to {new:,} kernels a step"
    text += f"; {old:,}{more}"
    if after["bottleneck"] == "launches":  # then the time is the host's, and another one each time
        text += f"; the GPU works for {busy(before):.2f} and {busy(after):.2f} ms of it"
    return text


def busy(row: Row) -> float:
    """Milliseconds of a profiled step in which the GPU runs a kernel."""
    return sum(k["us"] for k in row["kernel_times"] if k["kernel"] != timeline.IDLE) / 1e3


def overlap(before: Row, after: Row) -> bool:
    """Whether the slowest repetition of the faster row is slower than the fastest of the other."""
    ranges = []
    for row in (before, after):
        times = [each["total"] - each["ttft"] for each in row["repetitions"]]
        ranges.append((min(times), max(times)))
    (low, high), (other_low, other_high) = ranges
    return low <= other_high and other_low <= high


def first_token(before: Row, after: Row) -> str:
    """What became of a prompt."""
    took = f"{before['ttft_ms']:.0f} to {after['ttft_ms']:.0f} ms"
    return f" A prompt of {after['prompt']} tokens: {took}."


def profiled(row: Row, kernel: str) -> float:
    """Milliseconds of a step that kernels of a name take, as profiled."""
    return sum(k["us"] for k in row["kernel_times"] if k["kernel"].startswith(kernel)) / 1e3


def copies(before: Row, after: Row) -> str:
    took = profiled(after, "indexSelectSmallIndex, 1056 programs")
    return f"{first_token(before, after)} Copying experts takes {took:.1f} ms of the new step."


def waiting(before: Row, _after: Row) -> str:
    idle = profiled(before, "(nothing runs)")
    return f" Before, the GPU had nothing to run for {idle:.1f} ms of a step."


def compiling(_before: Row, after: Row) -> str:
    return f" The first call takes {after['start_cold_s']:.0f} s longer than the next."


def least(_before: Row, after: Row) -> str:
    return f" The least time for its bytes is {after['floor_ms']:.2f} ms."


def reserved(before: Row, after: Row) -> str:
    return f" Memory taken: {before['reserved_gb']:.2f} to {after['reserved_gb']:.2f} GB."


MORE: dict[str, Callable[[Row, Row], str]] = {
    "attention=absorbed": first_token,
    "moe=gather": copies,
    "cuda_graphs": waiting,
    "compile": compiling,
    "memory=expandable": reserved,
    "kernels=triton": least,
    "prefill_graphs": first_token,
}
"""What else is worth saying of a rung."""


def prefill() -> list[str]:
    """Prompts of 4,096 tokens, each switch alone."""
    base, *others = rows("prefill")
    took = {row["arm"]: row["ttft_ms"] for row in others}
    alone = ", ".join(
        f"{took[arm]:.1f} with `{arm}`" for arm in ("prefill_moe=triton", "prefill_graphs")
    )
    together = f"{others[-1]['ttft_ms']:.1f} with both and `compile`"
    return [
        f"Measured, a prompt of {base['prompt']:,} tokens: {base['ttft_ms']:.1f} ms; {alone}, "
        f"{together}."
    ]


def speculation(model: str) -> str:
    """Steps with drafts beside the same steps without."""
    _, drafting, plain = rows(f"speculation-{model}")
    coin = ", by a coin: its weights are random" if drafting["assumed"] else ""
    return (
        f"Measured, {plain['model']}: {plain['tpot_ms']:.2f} to {drafting['tpot_ms']:.2f} ms a "
        f"token; {drafting['acceptance']:.0%} of drafts accepted{coin}."
    )
