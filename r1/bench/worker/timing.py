"""The timed commands: warm up, one repetition of the workload, one MoE layer; and peak memory."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import torch

from r1 import roofline
from r1.bench.process import Answer
from r1.bench.worker import fetching, steps
from r1.bench.worker.subject import Subject
from r1.device import synchronize
from r1.model.config import Config
from r1.placement.sources import Logged
from r1.run.sampler import Sampler
from r1.switches.backend import Backend
from r1.switches.machine import clocks_and_power


def warm(subject: Subject) -> Answer:
    """Run the whole workload twice, also in eager arms.

    The start-up cost is what the first run takes longer than the second.
    """
    (first, _), (second, _) = repetition(subject), repetition(subject)
    return {"start_seconds": sum(max(0.0, first[k] - second[k]) for k in ("ttft", "second_token"))}


def measure(subject: Subject) -> Answer:
    """One repetition. After it the reads of its decode steps are repeated, and timed.

    Answers the seconds to the first token ("ttft"), to the last ("total") and of each step
    ("gaps"); the steps of rows that were not done ("turns"), their accepted drafts, and how many
    steps accepted how many ("accepted_counts"); memory; what experts elsewhere did ("fetched"), and
    in it the rate of those reads without a model ("disk_rate"; see fetching.py).
    """
    answer, reads = repetition(subject)
    if answer["fetched"] is not None:
        answer["fetched"]["disk_rate"] = fetching.disk_rate(subject, reads)
    return answer


def repetition(subject: Subject) -> tuple[Answer, list[Logged]]:
    """One repetition, and the reads of files that it began, in order."""
    w = subject.workload
    subject.fill()
    if subject.device.type != "cpu":
        # building, compiling and the parity check have peaks of their own
        torch.cuda.reset_peak_memory_stats()
    arrivals: list[float] = []
    written: list[list[list[int]]] = []  # by step, then by row
    sampler = Sampler(0.0, seed=w.seed)
    with fetching.counted(subject) as reads:
        start = time.perf_counter()
        for step in subject.engine.steps(
            subject.prompts, w.new, sampler, subject.cache, w.depth, w.assumed
        ):
            arrivals.append(time.perf_counter() - start)
            written.append(step)
    gaps = [after - before for before, after in pairwise(arrivals)]
    subject.text = [
        [token for step in written for token in step[row]][: w.new] for row in range(w.batch)
    ]
    counts = _turns(written, w.batch, w.new)
    answer = {
        "tokens": w.new,
        "turns": sum(counts.values()),
        "accepted": sum(number * count for number, count in counts.items()),
        "accepted_counts": dict(counts),
        "ttft": arrivals[0],
        "total": arrivals[-1],
        "gaps": gaps,
        "second_token": gaps[0] if gaps else 0.0,
        "memory": memory(subject),
        "fetched": fetching.fetched(subject),
    } | clocks_and_power()
    return answer, reads


def _turns(written: list[list[list[int]]], batch: int, new: int) -> Counter[int]:
    """How many of the rows' steps after the first token accepted so many drafts, by that number.

    A row that has all its new tokens is done: its further steps do not count.
    """
    counts = Counter[int]()
    for row in range(batch):
        done = 1
        for step in written[1:]:
            if done < new:
                counts[len(step[row]) - 1] += 1
                done += len(step[row])
    return counts


def memory(subject: Subject) -> dict[str, Any]:
    """Peak memory in bytes.

    "allocated" and "reserved" are the GPU allocator's, during this repetition. "host" is the
    process's, since its start. A CUDA graph computes in memory that is not allocated when it
    replays, but kept for it all the time: so the graphs' pools are added.
    """
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if subject.device.type == "cpu":
        return {"allocated": None, "reserved": None, "host": host}
    pools = [
        segment for segment in torch.cuda.memory_snapshot() if segment["segment_pool_id"] != (0, 0)
    ]
    graphs = sum(segment["total_size"] - segment["allocated_size"] for segment in pools)
    allocated = torch.cuda.max_memory_allocated() + graphs
    return {"allocated": allocated, "reserved": torch.cuda.max_memory_reserved(), "host": host}


LEAST_LAYERS = 16
"""The least number of layers in a row by which one is timed, so that it is one in the middle of a
step: what begins a step is shared by so many (a graph's launch is 10 us or more)."""
COLD = 3
"""A layer runs twice in a row only where its weights take so many times the second-level cache."""


def moe_layer(subject: Subject) -> Answer:
    """Seconds of one MoE layer in a decode step, from the time of all MoE layers in a row.

    Where they are few they run several times in a row (see `passes`). Of a model on several stages:
    of this stage's layers, None if it has no such layer.
    """
    config, model = subject.engine.config, subject.engine.model
    first = model.first_layer
    layers = [n for n in range(len(model.layers)) if config.is_moe(first + n)]
    if not config.is_moe(config.num_hidden_layers - 1):
        return {"seconds": None}
    second_level = 0
    if subject.device.type == "cuda":
        second_level = torch.cuda.get_device_properties(subject.device).L2_cache_size
    layers *= passes(config, subject.engine.backend, len(layers), second_level)
    chain = steps.moe_chain(subject, layers)
    calls, times = 8, []
    for _ in range(7):
        synchronize(subject.device)
        start = time.perf_counter()
        # Without waiting between calls, as between steps: the host launches ahead of the GPU.
        for _ in range(calls):
            chain()
        synchronize(subject.device)
        times.append((time.perf_counter() - start) / calls)
    return {"seconds": statistics.median(times[2:]) / len(layers) if layers else None}


def passes(config: Config, backend: Backend, layers: int, second_level: int) -> int:
    """How many times `moe_layer` goes through so many MoE layers in a row, of one stage.

    Once where they are LEAST_LAYERS. Once, too, where a second pass would find what a step does not
    find: weights in the second-level cache, of so many bytes (0: a CPU), or experts that the first
    pass has brought from elsewhere. Devices that share a layer come to the same number.
    """
    if not 0 < layers < LEAST_LAYERS or not second_level or backend.experts != "device":
        return 1
    # What one device reads for one token. The last layer is a MoE layer.
    model = roofline.model_of(config, dataclasses.replace(backend, pp=1), False)
    last = roofline.weights_of(model.layers[-1])
    one = last.always + last.expert * config.experts.num_experts_per_tok / backend.ep
    return -(-LEAST_LAYERS // layers) if layers * one >= COLD * second_level else 1
