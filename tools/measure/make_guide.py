"""Write r1/guide/measured.json: the rows of the committed results that the guide starts from.

    python tools/measure/make_guide.py

Run it after a result file of bench.py is added below tools/measure/results, and make_tables.py
after it. Only the fastest rows of each work are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared

from r1.guide import measured
from r1.guide.measured import Measured

RESULTS = Path(__file__).parent / "results"
OLDER = ("h200-x2/r1-whole.json",)
"""Measured when the host still had more to do between a layer's choice and its copies."""


def rows() -> list[Measured]:
    """The rows to keep, in the order of their files. The guide predicts no experts=cpu."""
    found = []
    for path in sorted(RESULTS.rglob("*.json")):
        if path.relative_to(RESULTS).as_posix() in OLDER:
            continue
        if "schema" in json.loads(path.read_text(encoding="utf-8")):
            found += measured.rows_of(path)
    kept = [*measured.best(found), *measured.best_prompts(found)]
    return [row for row in found if row in kept and row.experts != "cpu"]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return shared.run(__file__, work, shared.parser(__doc__).parse_args(argv))


def work(_arguments: argparse.Namespace) -> int:
    measured.FILE.write_text(measured.dump(rows()), encoding="utf-8")
    print(measured.FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
