"""`--compare`: results of several machines in one table.

Only rows that did the same work are compared: the same model config, batch, prompt, new tokens and
depth. Each machine has its baseline, and its fastest arm that passes parity; with --wide all its
arms. What is left out is named below the table.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1.bench.load_result import load
from r1.bench.report.aligned import aligned
from r1.bench.report.text import busy, model_name, threads
from r1.bench.workload import SIZES
from r1.errors import InputError

MOST_NAMED = 3
"""Switches of a ladder's rung that are all named."""
Row = dict[str, Any]
Sizes = tuple[int, int, int, int]
"""The values of SIZES."""
Work = tuple[str, Sizes]
"""A model's config, as JSON, and the sizes."""
Done = dict[Work, dict[int, list[Row]]]
"""For each work the rows that did it, by the number of their file."""


@dataclass
class Files:
    """The results that are compared, and what is shown of each."""

    paths: list[Path]
    results: list[dict[str, Any]]
    names: list[str]
    prices: list[float] | None
    wide: bool
    """Whether all arms are shown."""


def compare(paths: list[Path], price: list[float] | None = None, wide: bool = False) -> str:
    """The table, in Markdown.

    `price` is the cost of an hour on each machine: one number for each file, or one for all. `wide`
    shows all arms.
    """
    results = [load(path) for path in paths]
    files = Files(paths, results, _names(paths, results), _prices(price, len(paths)), wide)
    done = _work_done(results)
    shared = {work: by for work, by in done.items() if len(by) > 1 or len(paths) == 1}
    if not shared:
        did = "; ".join(f"{path}: {_did(files, i, done)}" for i, path in enumerate(paths))
        raise InputError(f"there is nothing to compare, for no two files did the same work ({did})")
    lines: list[str] = []
    for model in dict.fromkeys(model for model, _ in shared):
        of_model = {sizes: by for (m, sizes), by in shared.items() if m == model}
        lines += [*_model_table(files, of_model), ""]
    lines += _dropped(files, shared)
    for path, result in zip(paths, results, strict=True):
        if sentence := busy(result["machine"]):
            lines += [f"{path}: {sentence}.", ""]
    for i, path in enumerate(paths):
        alone = {work: by for work, by in done.items() if i in by and work not in shared}
        if alone:
            lines.append(
                "Note: the files' workloads differ; left out, since no other file has it: "
                f"{path}: {_did(files, i, alone)}."
            )
    if files.prices:
        lines.append(
            "Price: that of an hour / (tok/s x 3600) x 1,000,000; decoded tokens only, "
            "the machine never idle."
        )
    return "\n".join(lines).rstrip()


def _work_done(results: list[dict[str, Any]]) -> Done:
    """All work, in the order in which it first comes up."""
    done: Done = {}
    for i, result in enumerate(results):
        model = json.dumps(result["config"], sort_keys=True)
        for row in result["rows"]:
            sizes: Sizes = (row["batch"], row["prompt"], row["new"], row["depth"])
            done.setdefault((model, sizes), {}).setdefault(i, []).append(row)
    return done


def _model_table(files: Files, shared: dict[Sizes, dict[int, list[Row]]]) -> list[str]:
    """The rows of one model: its name, a table, and the sizes that are the same in every row."""
    varying = [k for k in range(1, 4) if len({sizes[k] for sizes in shared}) > 1]
    columns: dict[str, list[str]] = {}
    for sizes, by in sorted(shared.items()):
        for i, rows in by.items():
            for arm, row in _chosen(rows, files.wide):
                cells = {
                    "machine": files.names[i],
                    "memory GB": _number(files.results[i]["machine"].get("memory_gb"), 0),
                    "arm": arm,
                    "dtype": _dtype(row),
                }
                cells |= {SIZES[k]: str(sizes[k]) for k in (0, *varying)} | _figures(row)
                if files.prices:
                    cells["price / M tokens"] = _per_million(row, files.prices[i])
                for name, cell in cells.items():
                    columns.setdefault(name, []).append(cell)
    first_sizes, first_files = next(iter(shared.items()))
    fixed = [f"{SIZES[k]} {first_sizes[k]}" for k in range(1, 4) if k not in varying]
    said = ["", f"In every row: {', '.join(fixed)}."] if fixed else []
    return [model_name(files.results[next(iter(first_files))]), "", *aligned(columns), *said]


def _prices(price: list[float] | None, files: int) -> list[float] | None:
    """A price for each file."""
    if not price:
        return None
    if len(price) not in (1, files):
        raise InputError(
            f"--price has {len(price)} numbers for {files} files: give one for each, or one for all"
        )
    if not all(math.isfinite(p) and p >= 0 for p in price):
        raise InputError(
            f"--price is {', '.join(f'{p:g}' for p in price)}: "
            "the price of an hour is a number, 0 or more"
        )
    return price if len(price) == files else price * files


def _names(paths: list[Path], results: list[dict[str, Any]]) -> list[str]:
    """The machines' names and threads. The file's name is added if two machines have the same."""
    machines = [result["machine"] for result in results]
    names = [", ".join(filter(None, (m["name"], threads(m)))) for m in machines]
    return [
        name if names.count(name) == 1 else f"{name} ({path.stem})"
        for name, path in zip(names, paths, strict=True)
    ]


def _chosen(rows: list[Row], wide: bool) -> list[tuple[str, Row]]:
    """The baseline, then the fastest arm that passes parity, each with the arm's name. Of a file of
    r1.guide, what it predicts: its arm begins with PREDICTED.

    `wide`: all arms, in the order of the file.
    """
    if wide:
        return [(_arm(rows, row), row) for row in rows]
    out = [("baseline", row) for row in rows if row["kind"] == "baseline"][:1]
    out += [(_arm(rows, row), row) for row in rows if row.get("predicted")]
    passing = [
        row for row in rows if not row.get("refused") and row.get("parity") and row.get("tpot_ms")
    ]
    if passing:
        fastest = min(passing, key=lambda row: float(row["tpot_ms"]))
        if fastest["kind"] != "baseline":
            out.append((_arm(rows, fastest), fastest))
    return out


def _dropped(files: Files, shared: Done) -> list[str]:
    """A line for each file whose arms are not all shown: their names."""
    lines = []
    for i, path in enumerate(files.paths):
        names: list[str] = []
        for rows in (by[i] for by in shared.values() if i in by):
            shown = [row for _, row in _chosen(rows, files.wide)]
            names += [_arm(rows, row) for row in rows if not any(row is each for each in shown)]
        if names:
            lines.append(f"Left out of {path}: {'; '.join(dict.fromkeys(names))}.")
    return [*lines, "--wide shows all arms.", ""] if lines else []


def _arm(rows: list[Row], row: Row) -> str:
    """The switches of an arm. A rung of the ladder has those of all rungs before it too.

    High rungs have many, so these are named by the last one.
    """
    if row["kind"] != "ladder":
        return str(row["arm"])
    ladder = [r for r in rows if r["kind"] == "ladder"]
    upto = next(i for i, r in enumerate(ladder) if r is row)
    names = [r["arm"].removeprefix("+ ") for r in ladder[: upto + 1]]
    return " + ".join(names) if len(names) <= MOST_NAMED else f"ladder up to {names[-1]}"


def _figures(row: Row) -> dict[str, str]:
    """The measurements of a row."""
    if row.get("refused") or not (row.get("predicted") or row["parity"]):
        return {"ms/token": "n/a" if row.get("refused") else "parity fails", "tok/s": "", "MBU": ""}
    share = "" if row.get("mbu") is None else f"{100 * row['mbu']:.0f}%"
    return {
        "ms/token": _number(row.get("tpot_ms"), 2),
        "tok/s": _number(row.get("decode_tok_s"), 1),
        "MBU": share,
    }


def _per_million(row: Row, hour: float) -> str:
    """The price of a million tokens, if an hour costs `hour`."""
    right = row.get("predicted") or row.get("parity")
    if row.get("refused") or not right or not row.get("decode_tok_s"):
        return ""
    cost = hour / (row["decode_tok_s"] * 3600) * 1e6
    return f"{cost:,.2f}" if cost >= 0.1 or cost == 0 else f"{cost:.2g}"


def _number(value: Any, digits: int) -> str:
    """A number as a cell. Anything else, and 0, is an empty cell."""
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) and value else ""


def _dtype(row: Row) -> str:
    """The dtype of the weights, and of autocast."""
    backend = row.get("backend")
    if not isinstance(backend, dict):
        return ""
    amp = backend.get("amp", "off")
    return f"{backend.get('dtype', '')}" + (f", amp {amp}" if amp != "off" else "")


def _did(files: Files, i: int, done: Done) -> str:
    """The work in `done` that file `i` did, in words."""
    sizes = "; ".join(
        ", ".join(f"{name} {n}" for name, n in zip(SIZES, work[1], strict=True))
        for work, by in done.items()
        if i in by
    )
    return f"{model_name(files.results[i])}, {sizes}"
