"""The commands that profile one decode step: its kernels, and a trace of it."""

from __future__ import annotations

import json
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from r1.bench import exchange, timeline
from r1.bench.process import Answer
from r1.bench.worker import steps
from r1.bench.worker.subject import Subject
from r1.device import synchronize


def kernels(subject: Subject) -> Answer:
    """How many kernels a decode step runs, what each adds to it (timeline.py), and the time of
    those that exchange numbers among devices (exchange.py). None on a CPU.
    """
    if subject.device.type == "cpu":
        return {"count": None, "parts": None, "exchange_us": None}
    path = _export(subject, _profile(subject))
    traced = json.loads(path.read_text(encoding="utf-8"))
    parts = timeline.parts(traced)
    count = sum(part["calls"] for part in parts)
    return {"count": count, "parts": parts, "exchange_us": exchange.busy_us(traced)}


def trace(subject: Subject) -> Answer:
    """Write a Chrome trace of one decode step.

    Answers its path, and a table of the costliest kernels (on a CPU: operators).
    """
    profiled = _profile(subject)
    path = _export(subject, profiled)
    if subject.device.type == "cpu":
        table = profiled.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60
        )
    else:
        table = "\n".join(timeline.table(timeline.load(path)))
    return {"path": str(path), "table": table}


def _export(subject: Subject, profiled: profile) -> Path:
    """Write the Chrome trace of a profile; returns its path.

    Processes that share a model share the folder, too, and write at the same time.
    """
    path = subject.folder / f"trace-{subject.place.rank}.json"
    profiled.export_chrome_trace(str(path))
    return path


def _profile(subject: Subject) -> profile:
    """Profile one step, after one step that is not profiled."""
    step = steps.next_turn(subject)
    step()
    gpu = subject.device.type != "cpu"
    with profile(
        activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU], acc_events=True
    ) as profiled:
        step()
        synchronize(subject.device)
    return profiled
