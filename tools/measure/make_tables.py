"""Write the READMEs' tables anew from the committed result files.

    python tools/measure/make_tables.py

A table stands between `<!-- NAME -->` and `<!-- /NAME -->` in one of the PAGES, below the command
that made it. NAME says where it comes from, in tools/measure/results/h100:

- NAME.json: a result of bench.py, compare_peers.py or bench_kernels.py
- NAME, a folder: several results of bench.py, in one table
- h100-x2-NAME, h200-NAME, h200-x2-NAME: NAME.json in the folders h100-x2, h200 and h200-x2 beside
  that one
- `step-N`: a profiled step of the last arm in kernels/N.json
- `buys`: what each rung of the ladder brings, for one row and for 32
- `rung ...`: what a rung measured, in sentences (rungs.py)
- `guide ...`: what the guide predicts (guide_tables.py)
- `quality`: what quantizing costs tiny-r1, from quality/tiny-r1.json beside that folder
- `allreduce`: a result of allreduce.py, h100-x2/allreduce.json beside that folder
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import allreduce
import bench_kernels
import compare_peers
import guide_tables
import quality
import rungs
import shared

from r1.bench import timeline
from r1.bench.load_result import load
from r1.bench.report import text
from r1.bench.report.table import table

RESULTS = Path(__file__).parent / "results" / "h100"
ROOT = Path(__file__).parents[2]
PLACES = ("", "r1", "r1/kernels", "r1/guide", "tools/measure/results")
PAGES = [ROOT / place / "README.md" for place in PLACES]
TOUR = "r1/README.md"
COLUMNS = [
    "arm",
    "batch",
    "TTFT ms",
    "ms/token",
    "p90 ms",
    "tok/s",
    "speed-up",
    "MBU",
    "floor ms",
    "MoE layer µs (floor)",
    "in slots",
    "link MB/step",
    "of the link",
    "disk MB/step",
    "of the disk",
    "host MB/step",
    "of the RAM",
    "start s (warm)",
    "KL (bound)",
    "quantizing: KL, top-1",
]
PREFILL = ["arm", "batch", "TTFT ms", "prefill MFU", "start s (warm)", "KL (bound)"]
"""The columns of runs with prompts of 1,000 tokens and more: they measure the prompt alone."""
LAUNCHED = (timeline.IDLE, "Memcpy", "step_kernel")
"""Parts of a profiled captured step that wait for the host, which the profiler slows down."""

Found = dict[str, Any]


def read(path: Path) -> Found:
    """The content of a result file. One of bench.py is checked, and gets today's speed-ups."""
    found: Found = json.loads(path.read_text(encoding="utf-8"))
    return load(path, complete=True) if "schema" in found else found


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
    """Results of bench.py, each of another batch size, as one table."""
    results = sorted(results, key=lambda found: found["rows"][0]["batch"])
    rows = [row for found in results for row in found["rows"]]
    how = [line for found in results for line in (conditions(found), "")]
    drafting = [row for row in rows if row.get("acceptance") is not None]
    drafts = [line for row in drafting for line in ("", f"{row['arm']}: {text.drafts(row, rows)}")]
    notes = [
        line
        for note in dict.fromkeys(note for found in results for note in found["notes"])
        for line in ("", note)
    ]
    columns = PREFILL if min(row["prompt"] for row in rows) >= 1000 else COLUMNS
    return [*how, *table(rows, columns), *drafts, *notes]


def conditions(found: Found) -> str:
    """The command, and the machine that it ran on."""
    m = found["machine"]
    products = ", ".join(
        f"{rate:.0f} TFLOP/s in {dtype}" for dtype, rate in m["matmul_tflop_s"].items()
    )
    machine = f"{m['name']}, torch {m['torch']}; copy {m['copy_gb_s']:.0f} GB/s"
    medians = f"medians of {found['repetitions']} repetitions"
    command = without_output(found["command"])
    return f"`{command}` ({machine}, matrix products {products}; {medians})"


def without_output(command: str) -> str:
    """The command without its output file, which says nothing about the measurement."""
    return re.sub(r" (-o|--output|--output-file)[ =]\S+", "", command)


def peers_command(how: dict[str, Any]) -> str:
    """The command line of compare_peers.py that gives these arguments."""
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
    """All tables by name."""
    found = {path.stem: lines(read(path)) for path in sorted(RESULTS.glob("*.json"))}
    found |= {
        f"{path.parent.name}-{path.stem}": lines(read(path))
        for folder in ("h100-x2", "h200", "h200-x2")
        for path in sorted((RESULTS.parent / folder).glob("*.json"))
        if path.stem != "allreduce"
    }
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
    costs = quality.lines(read(RESULTS.parent / "quality" / "tiny-r1.json"))
    found |= {"buys": buys(), "quality": costs, "allreduce": sums()} | rungs.sentences()
    return found | guide_tables.tables()


def sums() -> list[str]:
    """The time of a sum over two GPUs, each way, below the command."""
    found = read(RESULTS.parent / "h100-x2" / "allreduce.json")
    arguments = without_output(found["command"]).removeprefix("python ")
    command = f"torchrun --nproc-per-node {found['ranks']} {arguments}"
    about = f"{found['ranks']} x {found['gpu']}, torch {found['torch']}"
    return [f"`{command}` ({about})", "", *allreduce.table(found["rows"])]


def buys() -> list[str]:
    """What each rung of the ladder brings to one row, to 32, and to one of a dense model."""
    lines = [
        "| adds | ms a token | of the bandwidth | 32 rows: ms | of it | 8B distill: ms | of it |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    one, many, dense = (
        read(RESULTS / f"{name}.json")["rows"]
        for name in ("ladder", "ladder-32", "ladder-llama-8b")
    )
    rung_of = {row["arm"]: row for row in dense}
    for row, other in zip(one, many, strict=True):
        name = rung_link(row["arm"])
        if other["arm"] != row["arm"]:  # the same switch with another value
            assert switch_of(other) == switch_of(row)
            name += f" (32 rows: {rung_link(other['arm'])})"
        if row["arm"] == "+ attention=absorbed":  # of a dense model: keys are not repeated
            name, found = f"{name} (8B: `grouped`)", rung_of.pop("+ attention=grouped")
        else:
            found = rung_of.pop(row["arm"], None)
        cells = [name, f"{row['tpot_ms']:.2f}", f"{row['mbu']:.0%}"]
        cells += [f"{other['tpot_ms']:.1f}", f"{other['mbu']:.0%}"]
        cells += [f"{found['tpot_ms']:.2f}", f"{found['mbu']:.0%}"] if found else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    assert not rung_of, "the dense model's ladder has rungs that the other one lacks"
    return lines


def switch_of(row: dict[str, Any]) -> str:
    """The switch that a rung adds, without its value."""
    return str(row["arm"]).partition("=")[0]


def rung_link(rung: str) -> str:
    """The rung's switch, which links to what it changes."""
    switch = rung.removeprefix("+ ")
    name = "the textbook's model" if rung == "baseline" else f"`{switch}`"
    return f"[{name}]({TOUR}#{switch.replace('=', '').replace('_', '-')})"


def filled(texts: list[str], made: Mapping[str, list[str]] | None = None) -> list[str]:
    """The pages' texts with every table made anew. `made`: the tables (None: all)."""
    for name, rows in (tables() if made is None else made).items():
        opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
        place = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
        section = "\n".join([opening, *rows, closing]).replace("\\", r"\\")
        if (places := sum(len(place.findall(text)) for text in texts)) != 1:
            raise ValueError(f"the pages have {places} places for {name}")
        texts = [place.sub(section, text) for text in texts]
    return texts


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return shared.run(__file__, work, shared.parser(__doc__).parse_args(argv))


def work(_arguments: argparse.Namespace) -> int:
    texts = filled([page.read_text(encoding="utf-8") for page in PAGES])
    for page, whole in zip(PAGES, texts, strict=True):
        page.write_text(whole, encoding="utf-8")
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
