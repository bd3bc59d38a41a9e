"""Which rows of a result each panel draws."""

from __future__ import annotations

from collections.abc import Callable

from r1.bench.plot.style import Row
from r1.bench.workload import SIZES


def steps(rows: list[Row]) -> list[Row]:
    """Rows of the first panel, baseline first.

    The ladder of the first workload that has one; without a ladder each switch alone.
    """
    for kinds in (("baseline", "ladder"), ("baseline", "alone", "together")):
        for workload in _workloads(rows).values():
            chosen = sorted(
                (r for r in workload if r["kind"] in kinds), key=lambda r: kinds.index(r["kind"])
            )
            if any(r["kind"] != "baseline" for r in chosen) and any(is_timed(r) for r in chosen):
                return chosen
    return [r for r in rows if r["kind"] == "baseline" and is_timed(r)][:1]


def over_batches(rows: list[Row]) -> list[list[Row]]:
    """The baseline and the fullest arm, each over at least two batch sizes.

    All other sizes are equal. Of several such series the longest is taken.
    """
    return _series(rows, same=("prompt", "new", "depth"), by=lambda r: int(r["batch"]))


def over_context(rows: list[Row]) -> list[list[Row]]:
    """The baseline and the fullest arm, each over at least two context lengths.

    The batch size is the same. Of several such series the longest is taken.
    """
    return _series(rows, same=("batch",), by=context)


def context(r: Row) -> float:
    """The average number of tokens that attention reads in the row's decode steps."""
    return float(r["depth"] + r["prompt"] + r["new"] / 2)


def fullest(workload: list[Row]) -> Row | None:
    """The row with the most switches on.

    All together, if there is such a row; else the ladder's end; else the last single switch.
    """
    for kind in ("together", "ladder", "alone"):
        if of_kind := [r for r in workload if r["kind"] == kind]:
            return of_kind[-1]
    return None


def _series(rows: list[Row], same: tuple[str, ...], by: Callable[[Row], float]) -> list[list[Row]]:
    """The two arms' rows, sorted `by` a value, from the workloads with the `same` sizes."""
    groups: dict[tuple[int, ...], list[list[Row]]] = {}
    for workload in _workloads(rows).values():
        ends = [next((r for r in workload if r["kind"] == "baseline"), None), fullest(workload)]
        lines = groups.setdefault(tuple(workload[0][name] for name in same), [[], []])
        for line, r in zip(lines, ends, strict=True):
            if r is not None and is_timed(r):
                line.append(r)
    widest = max(
        groups.values(), key=lambda lines: len({by(r) for line in lines for r in line}), default=[]
    )
    if len({by(r) for line in widest for r in line}) < 2:
        return []
    return [sorted(line, key=by) for line in widest if line]


def _workloads(rows: list[Row]) -> dict[tuple[int, ...], list[Row]]:
    """The rows of each workload, by its sizes."""
    workloads: dict[tuple[int, ...], list[Row]] = {}
    for r in rows:
        workloads.setdefault(tuple(r[name] for name in SIZES), []).append(r)
    return workloads


def is_timed(r: Row) -> bool:
    """Whether a row has a time per token."""
    return not r.get("refused") and bool(r.get("tpot_ms"))
