"""Write the README's tables anew from the files that the benchmarks wrote.

    python tools/measure/make_tables.py

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, and comes from
tools/measure/results/h100/NAME.json: a result of bench.py, compare_peers.py or bench_kernels.py; or
from the folder NAME, where several runs of bench.py make one table. Above it stands the command
that made it. `tiny-r1` is the accuracy on its model card, `step-N` a profiled step of the last arm
of kernels/N."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs from a checkout, without installing r1
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import bench_kernels
import card
import compare_peers

from r1.bench import report, timeline

RESULTS = Path(__file__).parent / "results" / "h100"
README = Path(__file__).parents[2] / "README.md"
COLUMNS = [
    "arm",
    "batch",
    "TTFT ms",
    "TPOT ms (p90)",
    "tok/s",
    "speed-up",
    "MBU",
    "floor ms",
    "MoE layer µs (floor)",
]
COLUMNS += ["start s (warm)", "KL (bound)"]
PREFILL = ["arm", "batch", "TTFT ms", "prefill MFU", "start s (warm)", "KL (bound)"]
"""Of runs with a prompt of a thousand tokens and more, which are about nothing else."""
LAUNCHED = (timeline.IDLE, "Memcpy", "step_kernel")
"""Of a captured step that was profiled: what stands behind the host, which is slow then."""

Found = dict[str, Any]


def read(path: Path) -> Found:
    found: Found = json.loads(path.read_text(encoding="utf-8"))
    return found


def lines(found: Found) -> list[str]:
    """A result as Markdown: the command, the machine, the table."""
    if "figures" in found:
        return [
            f"`{peers_command(found['arguments'])}` ({found['machine']})",
            "",
            *compare_peers.table(found)[2:],
        ]
    if isinstance(found["machine"], str):
        about = f"{found['machine']}, torch {found['torch']}; copy {found['copy_gb_s']:.0f} GB/s"
        return [f"`{without_output(found['command'])}` ({about})", "", *bench_kernels.table(found)]
    return together([found])


def together(results: list[Found]) -> list[str]:
    """bench.py's results, of which each is about a batch size of its own, as one table."""
    results = sorted(results, key=lambda found: found["rows"][0]["batch"])
    rows = [row for found in results for row in found["rows"]]
    how = [line for found in results for line in (conditions(found), "")]
    drafting = [row for row in rows if row.get("acceptance") is not None]
    drafts = [
        line for row in drafting for line in ("", f"{row['arm']}: {report.drafts(row, rows)}")
    ]
    notes = [
        line
        for note in dict.fromkeys(note for found in results for note in found["notes"])
        for line in ("", note)
    ]
    columns = PREFILL if min(row["prompt"] for row in rows) >= 1000 else COLUMNS
    return [*how, *report.table(rows, columns), *drafts, *notes]


def conditions(found: Found) -> str:
    """The command and what it ran on."""
    m = found["machine"]
    products = ", ".join(
        f"{rate:.0f} TFLOP/s in {dtype}" for dtype, rate in m["matmul_tflop_s"].items()
    )
    machine = f"{m['name']}, torch {m['torch']}; copy {m['copy_gb_s']:.0f} GB/s, matrix products {products}"
    return f"`{without_output(found['command'])}` ({machine}; medians of {found['repetitions']} repetitions)"


def without_output(command: str) -> str:
    """Where the result went is nobody's business."""
    return re.sub(r" -o \S+", "", command)


def peers_command(how: dict[str, Any]) -> str:
    """The command that these arguments of compare_peers.py were given with."""
    defaults = vars(compare_peers.parser().parse_args([]))
    changed = {
        name: value
        for name, value in how.items()
        if value != defaults.get(name) and name != "output"
    }
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in changed.items()
    ]
    return " ".join(["python tools/measure/compare_peers.py", *flags])


def tables() -> dict[str, list[str]]:
    """All of them by name."""
    found = {path.stem: lines(read(path)) for path in sorted(RESULTS.glob("*.json"))}
    found |= {
        path.name: together([read(run) for run in path.glob("*.json")])
        for path in RESULTS.iterdir()
        if path.is_dir()
    }
    for name in ("batch-1", "batch-32"):
        parts = read(RESULTS / "kernels" / f"{name}.json")["rows"][-1]["kernel_times"]
        found[f"step-{name}"] = timeline.table(
            [part for part in parts if not part["kernel"].startswith(LAUNCHED)]
        )
    record, evaluations, _ = card.shipped()
    return found | {"tiny-r1": card.accuracies(record["figures"], evaluations)}


def filled(text: str) -> str:
    """The README's text with every table made anew."""
    for name, rows in tables().items():
        table = "\n".join(rows)
        opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
        place = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
        text, places = place.subn(lambda _, between=f"{opening}\n{table}\n{closing}": between, text)  # type: ignore[misc]
        if places != 1:
            raise ValueError(f"README.md has {places} places for {name}")
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
