"""The folder of a quantization that is not finished: one run at a time, and only of one plan."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from r1 import InputError
from r1.reading import read_json
from r1.writing import check_new, new_file

LOCK, PLAN = "lock", "plan.json"


@contextmanager
def work_folder(target: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """The folder beside `target`, new or of a run of the same plan that was killed.

    It is deleted when the context ends without an error, or before anything was written to it.
    Raises InputError if `target` exists, if another run is at work, and for the folder of another
    plan.
    """
    target = check_new(target)
    folder = target.with_name(f"{target.name}.quantizing")
    missing = [above for above in folder.parents if not above.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = set(os.listdir(folder))
        if found - {LOCK} and PLAN not in found:
            raise InputError(
                f"{folder} is no unfinished quantization: move it, or name another OUT"
            )
        with open(folder / LOCK, "w", encoding="utf-8") as lock:
            _hold(lock, folder)
            check_new(target)  # another run may have just finished
            _same_plan(folder, plan)
            try:
                yield folder
            except BaseException:
                if not set(os.listdir(folder)) - {LOCK, PLAN}:
                    _delete(folder, missing)
                raise
            _delete(folder, [])
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"{folder} can't be written ({reason}): make room, or name another OUT"
        ) from None


def _delete(folder: Path, missing: list[Path]) -> None:
    """Delete the folder, and those above it that were made for it if they are empty."""
    shutil.rmtree(folder)
    for above in missing:  # the innermost first
        with suppress(OSError):  # it has content now
            above.rmdir()


def _hold(lock: IO[str], folder: Path) -> None:
    """Lock the folder until the file is closed. A killed process holds no lock."""
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK))
    except OSError:
        same = False  # held, or the other run has just deleted the folder
    if not same:
        raise InputError(f"another run is at work in {folder}: wait for it, or name another OUT")


def _same_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or compare it with that of the run before."""
    path = folder / PLAN
    plan = json.loads(json.dumps(plan))  # lists for tuples, as a file has them
    if not path.exists():
        write_json(path, plan)
        return
    try:
        before = read_json(path)
        changed = sorted(name for name in plan if before.get(name) != plan[name])
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} can't be read ({error}): delete its folder") from None
    if changed:
        raise InputError(
            f"{folder} is an unfinished quantization with other {', '.join(changed)}: give the "
            "same flags and files to go on with it, or delete it"
        )


def write_json(path: Path, value: Any) -> None:
    with new_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that all may read. It appears whole. Raises OSError."""
    with new_file(path) as partial:
        try:
            save_file(tensors, partial, metadata={"format": "pt"})
        except SafetensorError as error:  # the library's name for an OSError
            raise OSError(str(error)) from None
        partial.chmod(0o644)


def write_list(path: Path, tensors: list[Tensor]) -> None:
    write_tensors(path, {str(n): tensor.contiguous() for n, tensor in enumerate(tensors)})


def read_list(path: Path) -> list[Tensor]:
    """The tensors of `write_list`, in order. Raises InputError for a damaged file."""
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} can't be read ({error}): delete its folder") from None
    return [found[str(n)] for n in range(len(found))]


def write_rows(path: Path, rows: list[list[int]]) -> None:
    write_list(path, [torch.tensor(row) for row in rows])


def read_rows(path: Path) -> list[list[int]]:
    return [row.tolist() for row in read_list(path)]
