"""The fields of a row that compare its times with the hardware's limits (../../roofline.py)."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from itertools import pairwise
from typing import Any

from r1 import roofline
from r1.bench.process import Answer
from r1.bench.rates import Rates, bottleneck
from r1.bench.workload import Workload
from r1.files.config_json import load_config
from r1.model.config import Config
from r1.roofline import Speculation
from r1.switches.backend import Backend


def byte_model(w: Workload, backend: Backend, config: Config, built: Answer) -> Speculation:
    """The work of a turn. `built`: the answer to "build", which tells the draft's own switches."""
    draft = None
    if backend.speculate == "draft" and w.draft:
        draft = (load_config(w.draft), Backend(**built["draft"]))
    return roofline.speculation(config, backend, w.batch, _context(w), draft)


def speculation(
    w: Workload, backend: Backend, config: Config, built: Answer, repetitions: list[Answer]
) -> dict[str, Any]:
    """Accepted drafts, and what they are worth by the bytes that they move."""
    if backend.speculate == "off":
        return {"tokens_per_step": 1.0}
    turns, accepted = (sum(r[name] for r in repetitions) for name in ("turns", "accepted"))
    if not turns:
        return {}
    model = byte_model(w, backend, config, built)
    return {
        "acceptance": accepted / turns / backend.draft_tokens,
        "acceptance_by_place": by_place(repetitions, backend.draft_tokens),
        "assumed": w.assumed,
        "tokens_per_step": 1 + accepted / turns,
        "predicted_speedup": model.speedup(1 + accepted / turns),
        "pays_from": model.pays_from(),
    }


def by_place(repetitions: list[Answer], drafts: int) -> list[float]:
    """The acceptance of the first draft of a step, of the second where the first was, and so on.

    It ends where no step came so far.
    """
    counts = Counter[int]()
    for repetition in repetitions:
        counts.update(repetition.get("accepted_counts", {}))
    reached = [sum(n for number, n in counts.items() if number >= k) for k in range(drafts + 1)]
    return [after / before for before, after in pairwise(reached) if before]


def against_limits(
    w: Workload,
    backend: Backend,
    config: Config,
    reference: Answer,
    built: Answer,
    kernels: int | None,
    repetitions: list[Answer],
) -> dict[str, Any]:
    """The least times that the measured rates allow, and the shares of them that were reached.

    `kernels`: how many a decode step runs, if that is known.
    """
    rates = Rates(**reference["rates"][backend.compute])
    hit = reference["reference"]["experts_hit"]
    work = roofline.step_work(config, backend, w.batch, 1, _context(w), hit)
    floor = None
    if hit and config.num_hidden_layers > 1:
        # The last layer is a MoE layer: its work is the difference to a model without it.
        fewer = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers - 1)
        layer = work - roofline.step_work(fewer, backend, w.batch, 1, _context(w), hit)
        floor = 1e6 * rates.seconds(layer)
    if backend.speculate != "off":
        work = byte_model(w, backend, config, built).turn
    ttft = statistics.median(r["ttft"] for r in repetitions)
    seconds = statistics.median(  # per step
        (r["total"] - r["ttft"]) / max(1, len(r["gaps"])) for r in repetitions
    )
    steps = statistics.median(  # per token
        len(r["gaps"]) / max(1, r["tokens"] - 1) for r in repetitions
    )
    # Its operations do not depend on how many experts its tokens hit, only its bytes do.
    prompt = roofline.step_work(config, backend, w.batch, w.prompt, w.depth, experts_hit=0)
    return {
        "floor_ms": 1e3 * rates.seconds(work) * (steps or 1),
        "mbu": work.nbytes / seconds / rates.copy if seconds else None,
        "mfu_prefill": prompt.flops / ttft / rates.matmul,
        "bottleneck": bottleneck(work, rates, kernels, backend.cuda_graphs, seconds),
        "step_gb": work.nbytes / 1e9,
        "moe_layer_floor_us": floor,
        "experts_hit": hit,
        "kernels": kernels,
    }


def _context(w: Workload) -> float:
    """The average number of tokens that a decode step's attention reads."""
    return w.depth + w.prompt + w.new / 2
