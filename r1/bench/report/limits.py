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
from r1.bench.routing import is_file
from r1.bench.workload import Workload
from r1.files.config_json import load_config
from r1.model.config import Config
from r1.placement.profile import load
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


def fetches(
    config: Config, routing: str, rates: Rates, repetitions: list[Answer]
) -> dict[str, Any]:
    """What experts elsewhere cost, in the repetition of the median step; of a drive, which is now
    fast and now slow, in all repetitions.

    `routing` is the workload's. `rates`: with the drive's in these (see `_at_the_time`).
    """
    if not repetitions[0].get("fetched"):
        return {}
    each = _median(repetitions)
    f, seconds = each["fetched"], _step_seconds(each)
    per_step = f["copied"] / max(1, f["calls"])
    even = min(1.0, f["slots"] / config.experts.n_routed_experts)
    on_host = f.get("multiplied", 0) / max(1, f["calls"])
    profile = load(routing, config) if is_file(routing) else None
    return {
        "expert_hits": f["hits"] / f["visits"] if f["visits"] else None,
        "expert_hits_even": even,
        "expert_hits_recorded": profile and profile.found(f["slots"]),
        "expert_slots": f["slots"],
        "guesses_right": f["right"] / f["guessed"] if f["guessed"] else None,
        "link_mb": per_step / 1e6,
        "link_share": per_step / seconds / rates.link if seconds else None,
        "prompt_link_share": f["prompt"] / each["ttft"] / rates.link,
        "host_computed": f.get("computed", 0) / f["visits"] if f["visits"] and rates.ram else None,
        "host_mb": on_host / 1e6,
        "host_share": on_host / seconds / rates.ram if seconds and rates.ram else None,
        **_drive(rates, repetitions),
    }


def _drive(rates: Rates, repetitions: list[Answer]) -> dict[str, Any]:
    """What was read of files, in all repetitions together."""
    names = ("read", "calls", "prompt_read")
    read, calls, prompt = (sum(r["fetched"][name] for r in repetitions) for name in names)
    steps = sum(r["total"] - r["ttft"] for r in repetitions)
    first = sum(r["ttft"] for r in repetitions)
    return {
        "disk_mb": read / max(1, calls) / 1e6,
        "disk_share": read / steps / rates.disk if steps and rates.disk else None,
        "prompt_disk_share": prompt / first / rates.disk if rates.disk else None,
    }


def _at_the_time(rates: Rates, repetitions: list[Answer]) -> Rates:
    """With the drive's rate right after the repetitions, by the same reads, of all together.

    The rate of the start stays where no step read files.
    """
    found = [f for r in repetitions if (f := r.get("fetched")) and f.get("disk_rate")]
    seconds = sum(f["read"] / f["disk_rate"] for f in found)
    disk = sum(f["read"] for f in found) / seconds if seconds else rates.disk
    return dataclasses.replace(rates, disk=disk)


def _median(repetitions: list[Answer]) -> Answer:
    """The repetition of the median step."""
    return sorted(repetitions, key=_step_seconds)[len(repetitions) // 2]


def _step_seconds(repetition: Answer) -> float:
    """Seconds of a decode step, on average."""
    seconds: float = repetition["total"] - repetition["ttft"]
    return seconds / max(1, len(repetition["gaps"]))


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
    rates = _at_the_time(Rates(**reference["rates"][backend.compute]), repetitions)
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
    fetched = fetches(config, w.routing, rates, repetitions)
    link, disk, host = (1e6 * fetched.get(f"{name}_mb", 0.0) for name in ("link", "disk", "host"))
    # The device does not read what the host multiplies.
    own = max(0.0, work.weight_bytes - host)
    work = dataclasses.replace(
        work, weight_bytes=own, link_bytes=link, disk_bytes=disk, host_bytes=host
    )
    ttft = statistics.median(r["ttft"] for r in repetitions)
    seconds = statistics.median(map(_step_seconds, repetitions))
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
        **fetched,
    }


def _context(w: Workload) -> float:
    """The average number of tokens that a decode step's attention reads."""
    return w.depth + w.prompt + w.new / 2
