"""How far predictions are from rows that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from r1.errors import InputError
from r1.guide import measured
from r1.guide.gpus import Gpu, all_gpus
from r1.guide.links import LEAST_STEP_GB
from r1.guide.measured import Measured
from r1.guide.page import table
from r1.guide.predict import Like, nearest, step_ms


@dataclass(frozen=True)
class Check:
    """A measured row, and what is predicted for it from other rows."""

    row: Measured
    start: Measured
    """The row that the prediction starts from: of other work."""
    predicted_ms: float

    @property
    def error(self) -> float:
        """By what part of the measured time the prediction is too long."""
        assert self.row.tpot_ms
        return self.predicted_ms / self.row.tpot_ms - 1


def check(row: Measured, others: Sequence[Measured]) -> Check | None:
    """Predict a row from rows of other work; None if there is none of its kind."""
    known = [each for each in others if each.work != row.work and each.kind == row.kind]
    like = Like.of_row(row)
    start = nearest(known, like, row.batch, row.step_gb * 1e9)
    if start is None:
        return None
    predicted = step_ms(row.floor_ms, row.read, start, like) + row.exchange_ms
    return Check(row, start, predicted)


def read(paths: Sequence[Path]) -> list[Measured]:
    """The rows of result files. Raises InputError for a file where none tells a step's time."""
    rows = []
    for path in paths:
        found = measured.best(measured.rows_of(path))
        if not found:
            raise InputError(
                f"--calibrate {path}: no row of it tells a step's time: it takes a passing arm "
                f"with --new {measured.LEAST_NEW} or more, on a GPU with --cuda-graphs "
                f"(or --experts host, or --pp), of a model that reads {LEAST_STEP_GB:g} GB a step"
            )
        rows += measured.rows_of(path)
    return rows


def machine_of(rows: Sequence[Measured], gpu: Gpu) -> Gpu:
    """The machine, with the name that the rows have for it. Raises InputError if it is another."""
    names = {row.machine for row in rows}
    if gpu.machine in names:
        return gpu
    known = {each.machine: each for each in all_gpus().values() if each.machine}
    other = next((known[name] for name in names if name in known), None)
    if len(names) > 1 or other:
        meant = f", so use --gpu {other.name}" if other else ": give files of one machine"
        raise InputError(f"--calibrate has rows of {', '.join(sorted(names))}{meant}")
    return replace(gpu, machine=names.pop())


def report(rows: Sequence[Measured]) -> list[str]:
    """The error of each measured row: from the committed rows, and from its neighbours too."""
    own = measured.best(rows)
    known = measured.best(measured.committed())
    body = []
    for row in own:
        cells = [row.describe(), f"{row.tpot_ms:.3g}"]
        for others in (known, [*known, *own]):
            found = check(row, others)
            cells += [f"{found.predicted_ms:.3g}", f"{found.error:+.0%}"] if found else ["", ""]
        body.append(cells)
    heads = ["row", "measured ms", "predicted before", "error", "from all other rows", "error"]
    return table([heads, *body])
