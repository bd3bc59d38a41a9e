"""The file of tuned launch parameters, by the GPU's name (run/tune.py searches them)."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from r1.errors import InputError
from r1.kernels.attention import AttentionLaunch
from r1.kernels.chip import Launch
from r1.kernels.experts_launch import ExpertsLaunch
from r1.kernels.grouped import GroupedLaunch
from r1.kernels.latent import LatentLaunch
from r1.kernels.linear_launch import LinearLaunch
from r1.kernels.router import RouterLaunch
from r1.reading import read_json
from r1.writing import locked, new_file

KINDS: dict[str, type[Launch]] = {
    kind.__name__: kind
    for kind in (
        AttentionLaunch,
        ExpertsLaunch,
        GroupedLaunch,
        LatentLaunch,
        LinearLaunch,
        RouterLaunch,
    )
}
FILE = "launches.json"
LARGEST = 2**20
"""The largest parameter that a file may give. Triton's tiles have no more elements."""


def path() -> Path:
    """The file's path: in $R1_CACHE, or in the user's cache folder."""
    if named := os.environ.get("R1_CACHE"):
        return Path(named) / FILE
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "r1" / FILE
    try:
        return Path.home() / ".cache" / "r1" / FILE
    except RuntimeError:
        raise InputError(
            "this user has no home folder for tuned launch parameters: name a folder in R1_CACHE"
        ) from None


def load(gpu: str) -> dict[str, Launch]:
    """The launches that were tuned on such a GPU, by Chip's keys.

    Raises InputError for a file with other content.
    """
    return {key: KINDS[key.split()[0]](**values) for key, values in _kept().get(gpu, {}).items()}


def keep(gpu: str, tuned: dict[str, Launch]) -> None:
    """Add a GPU's launches to the file, all of them or none.

    What another process adds meanwhile is kept. Raises InputError where the file can't be written.
    """
    new = {key: dataclasses.asdict(launch) for key, launch in tuned.items()}
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        with locked(path().parent), new_file(path()) as partial:
            everything = _kept()
            everything[gpu] = everything.get(gpu, {}) | new
            partial.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path()} can't be written ({error.strerror}): name another folder in R1_CACHE"
        ) from None


def _kept() -> dict[str, dict[str, dict[str, int]]]:
    """The file's content, by GPU, key and parameter; empty where there is no file.

    Raises InputError for a file with other content.
    """
    try:
        content = read_json(path())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(
            f"{path()} can't be read ({error.strerror}): name another folder in R1_CACHE"
        ) from None
    except ValueError as error:
        raise _other_content(error) from None
    try:
        for launches in content.values():
            for key, values in launches.items():
                _check(key, values)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _other_content(error) from None
    kept: dict[str, dict[str, dict[str, int]]] = content
    return kept


def _check(key: str, values: dict[str, int]) -> None:
    """Raise one of many errors for values that are no launch parameters of the key's kernel."""
    name, *sizes = key.split()
    kind = KINDS[name]
    if not all(size.isdecimal() for size in sizes):
        raise ValueError(f"{key} has sizes that are no numbers")
    if missing := {each.name for each in dataclasses.fields(kind)} - values.keys():
        raise ValueError(f"{key} has no {min(missing)}")
    kind(**values)
    flags = [each.name for each in dataclasses.fields(kind) if each.type == "bool"]
    for name, value in values.items():
        # Tiles are powers of two; pipelines have a few stages, and few tiles are loaded ahead.
        sound = type(value) is (bool if name in flags else int) and (
            1 <= value <= 8
            if name.endswith("stages") or name == "ahead"
            else name in flags or (value.bit_count() == 1 and 1 <= value <= LARGEST)
        )
        if not sound:
            raise ValueError(f"{key} has {name}={value!r}")


def _other_content(error: Exception) -> InputError:
    return InputError(
        f"{path()} doesn't hold launch parameters of this version ({error}): remove it"
    )
