"""Read a result that `bench.py` wrote as JSON, and check it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r1.bench.report.fields import ALWAYS, FIELDS, SCHEMA
from r1.bench.report.speedup import set_speedups
from r1.bench.report.types import MACHINE, PAIR, RESULT, ROW, TOGETHER, missing, wrong
from r1.bench.workload import SIZES
from r1.errors import InputError, printable
from r1.reading import read_json

DEEPEST = 20
"""How deep a result's values may be nested."""


def load(path: Path, *, complete: bool = False) -> dict[str, Any]:
    """The result in a file. Raises InputError, which names the file, if it holds no result.

    Every field is of its type (report/types.py), or None. With `complete` the rows must have all
    that a table shows, not only what --compare needs. Fields that older results do not have become
    None.
    """
    result = _read(path)
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
    if complete and any(isinstance(row, dict) and row.get("predicted") is True for row in rows):
        raise InputError(f"{path} holds predictions of r1.guide: --compare shows them")
    result["machine"] = {name: value for name, value in machine.items() if value is not None}
    if problem := _wrong_result(result, complete):
        raise InputError(f"{path}: {problem}: measure again")
    for number, row in enumerate(rows, 1):
        if problem := _wrong_row(row, complete):
            raise InputError(f"{path}, row {number}: {problem}: measure again")
        if complete and not row.get("refused"):
            rows[number - 1] = {name: row.get(name) for name in FIELDS}
    for each in [*rows, *(result.get("pairs") or [])]:
        each.setdefault("refused", None)
        each.setdefault("crashed", False)
    set_speedups(rows)
    return result


def _read(path: Path) -> dict[str, Any]:
    """The file's JSON object, if it is of our schema, with printable texts."""
    try:
        result = _with_printable_texts(read_json(path))
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(
            f"{path} is no JSON ({error}): make one with bench.py --output-file FILE.json"
        ) from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        schema = result.get("schema", "none") if isinstance(result, dict) else "none"
        raise InputError(
            f"{path} is no result of this bench.py (schema {schema}, not {SCHEMA}): "
            "make one with bench.py --output-file FILE.json"
        )
    return result


def _with_printable_texts(value: Any, depth: int = 0) -> Any:
    """The value with control characters of its texts escaped. They will be shown on a terminal."""
    if depth > DEEPEST:
        raise ValueError("its values are nested too deeply for a result")
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_with_printable_texts(each, depth + 1) for each in value]
    if isinstance(value, dict):
        return {
            printable(name): _with_printable_texts(each, depth + 1) for name, each in value.items()
        }
    return value


def _wrong_result(result: dict[str, Any], complete: bool) -> str | None:
    """The first error in the fields outside the rows."""
    machine, pairs = result["machine"], result.get("pairs") or []
    if problem := wrong(result, RESULT) or wrong(machine, MACHINE):
        return problem
    if complete and (
        problem := missing(result, ("repetitions", "workload", "notes", "pairs"))
        or missing(machine, ("torch", "python"))
        or (missing(machine, ("matmul_tflop_s",)) if "copy_gb_s" in machine else None)
    ):
        return problem
    if not isinstance(pairs, list):
        return f"pairs is {pairs!r}, no list"
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, dict):
            return f"pair {number} is no object"
        names = ("pair", *SIZES, *(() if pair.get("refused") else ("parity", "mean_kl")))
        if problem := missing(pair, names) or wrong(pair, PAIR):
            return f"pair {number}: {problem}"
    return None


def _wrong_row(row: Any, complete: bool) -> str | None:
    """The first error in a row."""
    if not isinstance(row, dict):
        return "it is no object"
    for name in ("arm", "kind", *SIZES):
        if row.get(name) is None:
            return f"{name} is None, no {ROW[name].words}"
    if problem := wrong(row, ROW):
        return problem
    if row.get("refused"):
        return None
    if row.get("predicted") is True:
        return None
    if row.get("parity") is None:
        return "parity is None, neither true nor false"
    if not complete:
        return None
    if problem := missing(row, ALWAYS):
        return problem
    for name, others in TOGETHER.items():
        if row.get(name) and (problem := missing(row, others)):
            return f"{name} is {row[name]}, but {problem}"
    return None
