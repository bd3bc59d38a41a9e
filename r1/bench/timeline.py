"""Where a decode step's time goes, kernel by kernel, from the profiler's trace.

A kernel may start before the one ahead of it has ended, and then it waits. Its duration counts this
wait, so all durations add up to more than the step. Instead, a kernel *adds* the time from the end
of all kernels that ended before it to its own end, less the time in which nothing ran. That time is
a line of its own. All lines add up to the step.

Example: one kernel runs from 0 to 10, one from 4 to 13 and one from 15 to 20. The first adds 10,
the second 3, the third 5, and for 2 nothing ran.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict, deque
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from r1.bench.report.aligned import aligned

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""The trace's categories of work on a GPU."""
IDLE = "(nothing runs)"
"""Time between two kernels. It includes the host's launches, which the profiler slows down."""


def parts(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """A Chrome trace as a list of `{"kernel", "calls", "us"}`, the costliest kernel first.

    `us` is the time that all calls of the kernel add to the step, in microseconds. A kernel that
    runs on several grids has one entry for each number of programs. IDLE has 0 calls.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("cat") in ON_GPU]
    added: dict[str, list[float]] = defaultdict(list)
    gaps = _gaps([(e["ts"], e["ts"] + e["dur"]) for e in events])
    over = min((e["ts"] for e in events), default=0.0)
    for event in sorted(events, key=lambda e: float(e["ts"] + e["dur"])):
        end = event["ts"] + event["dur"]
        idle = 0.0
        while gaps and gaps[0][0] < end:
            idle += gaps.popleft()[1]
        added[_label(event)].append(end - over - idle)
        if idle:
            added[IDLE].append(idle)
        over = end
    rows = [
        {"kernel": name, "calls": 0 if name == IDLE else len(times), "us": sum(times)}
        for name, times in added.items()
    ]
    return sorted(rows, key=lambda row: -float(row["us"]))


def load(path: Path) -> list[dict[str, Any]]:
    """`parts` of a trace file that the profiler wrote."""
    return parts(json.loads(path.read_text(encoding="utf-8")))


def _gaps(spans: list[tuple[float, float]]) -> deque[tuple[float, float]]:
    """The gaps between these spans (start, end), as (start, length), in order of time."""
    gaps: deque[tuple[float, float]] = deque()
    spans = sorted(spans)
    over = spans[0][1] if spans else 0.0
    for start, end in spans[1:]:
        if start > over:
            gaps.append((over, start - over))
        over = max(over, end)
    return gaps


def _label(event: dict[str, Any]) -> str:
    """A kernel's name without namespaces and template arguments: `vector_kernel, 1824 programs`."""
    name = re.sub(r"\(anonymous namespace\)::", "", event["name"])
    name = re.split(r"[<(]", name.removeprefix("void "))[0].split("::")[-1].strip()
    grid = event.get("args", {}).get("grid")
    return f"{name or event['name']}, {prod(grid)} programs" if grid else event["name"]


def table(rows: Sequence[dict[str, Any]], most: int = 16) -> list[str]:
    """`parts` as lines of a Markdown table: the `most` costliest, then the sum of the others."""
    whole = sum(row["us"] for row in rows)
    shown, rest = list(rows[:most]), rows[most:]
    if rest:
        shown.append(
            {
                "kernel": f"{len(rest)} others",
                "calls": sum(r["calls"] for r in rest),
                "us": sum(r["us"] for r in rest),
            }
        )
    shown.append({"kernel": "the step", "calls": sum(r["calls"] for r in rows), "us": whole})
    return aligned(
        {
            "kernel": [row["kernel"] for row in shown],
            "calls": [str(row["calls"] or "") for row in shown],
            "µs each": [
                f"{row['us'] / row['calls']:.1f}" if row["calls"] else "" for row in shown[:-1]
            ]
            + [""],
            "µs": [f"{row['us']:.1f}" for row in shown],
            "share": [f"{row['us'] / whole:.1%}" for row in shown],
        }
    )
