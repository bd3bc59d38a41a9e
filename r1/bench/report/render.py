"""A result in the form that `-o` names."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from r1.bench.report.fields import FIELDS, NESTED
from r1.bench.report.issue import issue
from r1.bench.report.text import markdown

FORMS = ("md", "json", "jsonl", "csv")
"""What `-o` may name. They are also the endings of --output-file."""
ISSUE = "issue"
"""What `-o` may name too: a block to paste, which is no file of its own."""


def render(result: dict[str, Any], form: str, wide: bool = False) -> str:
    """The result in one of FORMS, or as ISSUE.

    jsonl has one line a row, csv lacks the nested fields.
    `wide` puts all columns into the table of md.
    """
    rows = result["rows"]
    if form == "json":
        return json.dumps(result, indent=1)
    if form == "jsonl":
        return "\n".join(json.dumps({**r, "machine": result["machine"]["name"]}) for r in rows)
    if form == "csv":
        return _csv(rows)
    if form == ISSUE:
        return issue(result)
    return markdown(result, wide)


def _csv(rows: list[dict[str, Any]]) -> str:
    """A line for each row, below a line of names."""
    out = io.StringIO()
    names = [name for name in FIELDS if name not in NESTED]
    writer = csv.DictWriter(out, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip()
