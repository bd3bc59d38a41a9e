"""Read a result that `bench.py -o json` printed, and check it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from r1.bench.report.fields import ALWAYS, FIELDS, SCHEMA
from r1.bench.workload import SIZES
from r1.errors import InputError


def load(path: Path, *, complete: bool = False) -> dict[str, Any]:
    """The result in a file. Raises InputError, which names the file, if it holds no result.

    With `complete` the rows must have all that a table shows, not only what --compare needs.
    Fields that older results do not have become None.
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


def _read(path: Path) -> dict[str, Any]:
    """The file's JSON object, if it is of our schema."""
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
            f"{path} is no result of this bench.py (schema {schema}, not {SCHEMA}): "
            "make it with -o json"
        )
    return result


def _wrong(row: Any) -> str | None:
    """The first error in a row, in the fields that --compare reads."""
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
