"""Results of several machines in one table: `compare([Path("h100.json"), Path("cpu.json")], [2.5,
0.2])`.

Side by side stand only rows that did the same work: the same model config, batch, prompt, new
tokens and depth. Of each machine there is the baseline, and the fastest arm that passes parity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from r1.bench.arms import SIZES
from r1.bench.report import ALWAYS, FIELDS, SCHEMA, aligned, model_name
from r1.errors import InputError

Row = dict[str, Any]
Sizes = tuple[int, int, int, int]


def load(path: Path, *, complete: bool = False) -> dict[str, Any]:
    """A result that `bench.py -o json` printed. Raises InputError, naming the file, for what is
    none.

    `complete`: what a whole table needs must be there, not only what a comparison reads; fields
    that came later are null."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is no JSON ({error}): make one with bench.py -o json > FILE"
        ) from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        schema = result.get("schema", "none") if isinstance(result, dict) else "none"
        raise InputError(
            f"{path} is no result of this bench.py (schema {schema}, not {SCHEMA}): make it with -o json"
        )
    rows = result.get("rows")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} has no rows: measure again")
    machine = result.get("machine")
    if (
        not isinstance(machine, dict)
        or not isinstance(machine.get("name"), str)
        or not isinstance(result.get("config"), dict)
    ):
        raise InputError(f"{path} doesn't say which machine or model it is about: measure again")
    for number, row in enumerate(rows, 1):
        if wrong := _wrong(row):
            raise InputError(f"{path}, row {number}: {wrong}: measure again")
        if complete and not row.get("refused"):
            rows[number - 1] = row = {name: row.get(name) for name in FIELDS}
            if lacking := [name for name in ALWAYS if row[name] is None]:
                raise InputError(
                    f"{path}, row {number}: it has no {', '.join(lacking)}: measure again"
                )
    return result


def _wrong(row: Any) -> str | None:
    """What is wrong with a row, as far as the table reads it."""
    if not isinstance(row, dict):
        return "it is no object"
    for name in ("arm", "kind"):
        if not isinstance(row.get(name), str):
            return f"{name} is {row.get(name)!r}, no text"
    for name in SIZES:
        if type(row.get(name)) is not int or row[name] < 0:
            return f"{name} is {row.get(name)!r}, no whole number"
    if row.get("refused"):
        return None
    if not isinstance(row.get("parity"), bool):
        return f"parity is {row.get('parity')!r}, neither true nor false"
    for name in ("tpot_ms", "decode_tok_s", "mbu"):
        value = row.get(name)
        if value is not None and (
            type(value) not in (int, float) or not math.isfinite(value) or value < 0
        ):
            return f"{name} is {value!r}, no number"
    return None


def compare(paths: list[Path], price: list[float] | None = None) -> str:
    """The table, in markdown. `price` is what an hour of each machine costs: one a file, or one for
    all."""
    results = [load(path) for path in paths]
    prices = _prices(price, len(paths))
    names = _names(paths, results)
    # Which files did which work, in the order in which it first comes up.
    found: dict[tuple[str, Sizes], dict[int, list[Row]]] = {}
    for i, result in enumerate(results):
        model = json.dumps(result["config"], sort_keys=True)
        for row in result["rows"]:
            sizes: Sizes = (row["batch"], row["prompt"], row["new"], row["depth"])
            found.setdefault((model, sizes), {}).setdefault(i, []).append(row)
    shared = {work: files for work, files in found.items() if len(files) > 1 or len(paths) == 1}
    if not shared:
        did = "; ".join(f"{path}: {_did(result, [s for (_, s), f in found.items() if i in f])}" for i,
        (path, result) in
                        enumerate(zip(paths, results, strict=True)))  # fmt: skip
        raise InputError(f"there is nothing to compare, for no two files did the same work ({did})")

    models = list(dict.fromkeys(model for model, _ in shared))
    lines: list[str] = []
    for model in models:
        first = next(i for (m, _), files in shared.items() if m == model for i in files)
        lines += [model_name(results[first]), ""]
        varying = [
            k for k in range(1, 4) if len({sizes[k] for m, sizes in shared if m == model}) > 1
        ]
        columns: dict[str, list[str]] = {}
        for (_, sizes), files in sorted(
            (item for item in shared.items() if item[0][0] == model), key=lambda item: item[0][1]
        ):
            for i, rows in files.items():
                for arm, row in _chosen(rows):
                    memory = _number(results[i]["machine"].get("memory_gb"), 0)
                    cells = {
                        "machine": names[i],
                        "memory GB": memory,
                        "arm": arm,
                        "dtype": _dtype(row),
                    }
                    cells |= {SIZES[k]: str(sizes[k]) for k in (0, *varying)} | _figures(row)
                    if prices:
                        cells["price / M tokens"] = _per_million(row, prices[i])
                    for name, cell in cells.items():
                        columns.setdefault(name, []).append(cell)
        lines += aligned(columns)
        fixed = [
            f"{SIZES[k]} {next(s for m, s in shared if m == model)[k]}"
            for k in range(1, 4)
            if k not in varying
        ]
        lines += ["", f"In every row: {', '.join(fixed)}."] if fixed else []
        lines.append("")
    for i, path in enumerate(paths):
        alone = [work[1] for work, files in found.items() if i in files and work not in shared]
        if alone:
            lines.append(
                f"Note: the files' workloads differ; left out, since no other file has it: {path}: {_did(results[i], alone)}."
            )
    if prices:
        lines.append(
            "Price: that of an hour / (tok/s x 3600) x 1,000,000; decoded tokens only, the machine never idle."
        )
    return "\n".join(lines).rstrip()


def _prices(price: list[float] | None, files: int) -> list[float] | None:
    if not price:
        return None
    if len(price) not in (1, files):
        raise InputError(
            f"--price has {len(price)} numbers for {files} files: give one for each, or one for all"
        )
    if not all(math.isfinite(p) and p >= 0 for p in price):
        raise InputError(
            f"--price is {', '.join(f'{p:g}' for p in price)}: the price of an hour is a number, 0 or more"
        )
    return price if len(price) == files else price * files


def _names(paths: list[Path], results: list[dict[str, Any]]) -> list[str]:
    """The machines' names, and the file's where two files are from machines of one name."""
    names = [result["machine"]["name"] for result in results]
    return [
        name if names.count(name) == 1 else f"{name} ({path.stem})"
        for name, path in zip(names, paths, strict=True)
    ]


def _chosen(rows: list[Row]) -> list[tuple[str, Row]]:
    """Baseline, then the fastest arm that passes parity, with what they are called."""
    out = [("baseline", row) for row in rows if row["kind"] == "baseline"][:1]
    passing = [
        row for row in rows if not row.get("refused") and row["parity"] and row.get("tpot_ms")
    ]
    if passing:
        fastest = min(passing, key=lambda row: float(row["tpot_ms"]))
        if fastest["kind"] != "baseline":
            out.append((_arm(rows, fastest), fastest))
    return out


def _arm(rows: list[Row], row: Row) -> str:
    """What an arm has switched on; a step of the ladder has all steps above it, too."""
    if row["kind"] != "ladder":
        return str(row["arm"])
    ladder = [r for r in rows if r["kind"] == "ladder"]
    upto = next(i for i, r in enumerate(ladder) if r is row)
    return " + ".join(r["arm"].removeprefix("+ ") for r in ladder[: upto + 1])


def _figures(row: Row) -> dict[str, str]:
    if row.get("refused") or not row["parity"]:
        return {"TPOT ms": "n/a" if row.get("refused") else "parity fails", "tok/s": "", "MBU": ""}
    share = "" if row.get("mbu") is None else f"{100 * row['mbu']:.0f}%"
    return {
        "TPOT ms": _number(row.get("tpot_ms"), 2),
        "tok/s": _number(row.get("decode_tok_s"), 1),
        "MBU": share,
    }


def _per_million(row: Row, hour: float) -> str:
    if row.get("refused") or not row["parity"] or not row.get("decode_tok_s"):
        return ""
    cost = hour / (row["decode_tok_s"] * 3600) * 1e6
    return f"{cost:,.2f}" if cost >= 0.1 or cost == 0 else f"{cost:.2g}"


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) and value else ""


def _dtype(row: Row) -> str:
    backend = row.get("backend")
    if not isinstance(backend, dict):
        return ""
    amp = backend.get("amp", "off")
    return f"{backend.get('dtype', '')}" + (f", amp {amp}" if amp != "off" else "")


def _did(result: dict[str, Any], work: list[Sizes]) -> str:
    """A file's work in words."""
    sizes = "; ".join(
        ", ".join(f"{name} {n}" for name, n in zip(SIZES, s, strict=True)) for s in work
    )
    return f"{model_name(result)}, {sizes}"
