"""A result as a block to paste into an issue: the machine, its clocks and rates, and the rows.

It holds what somebody else needs to see whether their machine does the same. Results hold no paths.
"""

from __future__ import annotations

from typing import Any

from r1.bench.report.speedup import baseline_of
from r1.bench.report.table import Row, table
from r1.switches.backend import Backend

SHOWN = (
    "arm", "batch", "prompt", "new", "depth", "TTFT ms", "ms/token", "p90 ms", "p99 ms",
    "95% interval ms", "tok/s", "speed-up", "MBU", "floor ms", "waits for", "W", "J/token",
    "memory GB", "correct?", "KL (bound)",
)  # fmt: skip


def issue(result: dict[str, Any]) -> str:
    """The block: the fastest row that passes parity, for each workload, below its baseline."""
    machine, rows = result["machine"], chosen(result["rows"])
    lines = [
        f"machine: {machine['name']}, {machine.get('memory_gb', 0):.0f} GB, "
        f"{machine.get('system', 'system unknown')}",
        f"torch {machine['torch']}, Python {machine['python']}, {result.get('when', 'no date')}",
        f"command: {result['command']}",
        f"rates: {_rates(machine)}",
        f"clocks: {_clocks(rows)}",
        "",
        *table(rows, SHOWN),
        "",
        *(f"{row['arm']}: {_switches(row)}" for row in rows),
    ]
    lines += [f"{row['arm']}: {row['refused']}" for row in result["rows"] if row["refused"]]
    return "\n".join(["```", *lines, "```"])


def chosen(rows: list[Row]) -> list[Row]:
    """For each baseline: itself, then the fastest other row of its workload that passes parity."""
    out = []
    for base in rows:
        if base["kind"] != "baseline" or base["refused"]:
            continue
        out.append(base)
        timed = [
            row
            for row in rows
            if row is not base and not row["refused"] and baseline_of(row, rows) is base
        ]
        passing = [row for row in timed if row["parity"] and row["tpot_ms"]]
        out += sorted(passing, key=lambda row: float(row["tpot_ms"]))[:1]
        out += [row for row in timed if not row["parity"]]
    return out


def _rates(machine: dict[str, Any]) -> str:
    if "copy_gb_s" not in machine:
        return "not measured"
    products = (f"{rate:.0f} TFLOP/s in {name}" for name, rate in machine["matmul_tflop_s"].items())
    return f"copy {machine['copy_gb_s']:.0f} GB/s, matrix products {', '.join(products)}"


def _clocks(rows: list[Row]) -> str:
    """Of the last row that has them."""
    for row in reversed(rows):
        if row.get("sm_mhz"):
            return f"{row['sm_mhz']:.0f} MHz, {row['power_w']:.0f} W after the last repetition"
    return "not read"


def _switches(row: Row) -> str:
    """The row's switches that are not at their defaults."""
    given = row.get("backend") or {}
    known = vars(Backend())
    changed = {n: v for n, v in given.items() if v != known.get(n)}
    return ", ".join(f"{name}={value}" for name, value in changed.items())
