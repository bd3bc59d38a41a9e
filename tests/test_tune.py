"""Tests the search for launch parameters: what it takes, what it refuses, what it keeps.

Holds to account: r1/run/tune.py and r1/kernels/launches.py.

Times here are made up, not measured.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY, V3, runner, unit_gain
from refusals import refused
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need the triton package: pip install triton")

from r1 import InputError
from r1.kernels import launches
from r1.kernels.attention import AttentionLaunch
from r1.kernels.chip import Chip, Launch
from r1.kernels.experts_launch import ExpertsLaunch
from r1.kernels.latent import LatentLaunch
from r1.kernels.linear_launch import LinearLaunch
from r1.run import tune
from r1.run.engine import Engine
from r1.switches.backend import Backend
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

GPU = "NVIDIA H100 80GB HBM3"
KEY = "LinearLaunch 1 64 32 2"
LINEAR = LinearLaunch(rows=16, outputs=16, inputs=64, warps=4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("R1_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def chip() -> Chip:
    return Chip(processors=132, shared=227 * 1024, dependent_launch=True)


def step_on(
    chip: Chip, wrong: Callable[[LinearLaunch], bool] = lambda _: False
) -> Callable[[], list[Tensor]]:
    """A step of two kernels, whose output is right unless the linear's launch is `wrong`."""

    def step() -> list[Tensor]:
        linear = chip.launch(LinearLaunch, 1, 64, 32, 2)
        chip.launch(LatentLaunch, 1, 16, 128, 512, 2)
        return [torch.ones(1, 3), torch.full((1, 3), 2.0 if wrong(linear) else 1.0)]

    return step


def timer(chip: Chip) -> Callable[[Callable[[], object]], float]:
    """Likes 4 outputs, 8 warps; 64 columns of the latent."""

    def seconds(_step: Callable[[], object]) -> float:
        linear, latent = (
            chip.launch(LinearLaunch, 1, 64, 32, 2),
            chip.launch(LatentLaunch, 1, 16, 128, 512, 2),
        )
        return 1 + abs(linear.outputs - 4) + 1 / linear.warps + abs(latent.columns - 64)

    return seconds


def test_a_search_finds_what_is_fastest() -> None:
    here = chip()
    kept: list[set[str]] = []
    tune.search(
        here, step_on(here), step_on(here), timer(here), lambda: kept.append(set(here.tuned))
    )
    assert kept == [set(), {KEY}, {KEY, "LatentLaunch 1 16 128 512 2"}], (
        "whoever stops the search has what it found"
    )
    linear, latent = here.tuned[KEY], here.tuned["LatentLaunch 1 16 128 512 2"]
    assert linear == dataclasses.replace(
        LinearLaunch.default((1, 64, 32, 2), here), outputs=4, warps=8
    )
    assert latent == dataclasses.replace(
        LatentLaunch.default((1, 16, 128, 512, 2), here), columns=64
    )
    assert here.launch(LinearLaunch, 1, 64, 32, 2) == linear

    def never(_step: Callable[[], object]) -> float:
        raise AssertionError("known shapes are not searched again")

    tune.search(here, step_on(here), step_on(here), never)


def test_a_search_goes_from_few_rows_to_tiles_and_back() -> None:
    """Their other parameters have no choice in common: 4 outputs are too few for a tile."""
    few, tile = LinearLaunch(4, 4, 1024, 1), LinearLaunch(16, 16, 256, 4, 2)
    assert tune.changed(few, "rows", 16) == tile
    assert tune.changed(tile, "rows", 8) == LinearLaunch(8, 16, 512, 4, 2)
    assert tune.changed(few, "rows", 2) == LinearLaunch(2, 4, 1024, 1)

    def seconds(launch: LinearLaunch) -> float:
        return abs(launch.rows - 16) + 1 / launch.outputs + 1 / launch.stages

    assert tune.climb(few, seconds, 0.001) == LinearLaunch(16, 128, 256, 4, 6)
    experts = tune.changed(ExpertsLaunch(1, 4, 1024, 8, 512, 1), "rows", 16)
    assert experts == ExpertsLaunch(16, 16, 256, 16, 256, 4, 2)
    assert tune.changed(experts, "rows", 1) == ExpertsLaunch(1, 8, 512, 8, 256, 4, 2)


def test_what_computes_something_else_is_passed_over() -> None:
    here = chip()
    step = step_on(here, lambda launch: launch.outputs == 4)
    tune.search(here, step, step, timer(here))
    found = here.tuned[KEY]
    assert isinstance(found, LinearLaunch) and found.outputs == 2, "4 would be faster, and is wrong"


def test_what_does_not_fit_is_passed_over() -> None:
    from triton.runtime.errors import OutOfResources

    here = chip()

    def step() -> list[Tensor]:
        if here.launch(LinearLaunch, 1, 64, 32, 2).warps == 8:
            raise OutOfResources(300000, 232448, "shared memory")
        return [torch.ones(1, 3)]

    tune.search(here, step, step, lambda _: 1 / here.launch(LinearLaunch, 1, 64, 32, 2).warps)
    found = here.tuned[KEY]
    assert isinstance(found, LinearLaunch) and found.warps == 4


def test_a_tipped_expert_is_no_error() -> None:
    """Of a block's tokens the middle one counts, of several blocks the worst."""
    right = [torch.randn(5, 8), torch.randn(5, 8)]
    tipped = [right[0], torch.cat((-right[1][:2], right[1][2:]))]
    assert tune.difference(tipped, right) == 0.0
    assert (
        tune.difference([right[0], -right[1]], right) > 1
        and tune.difference([-right[0], right[1]], right) > 1
    )


def test_what_was_found_is_kept_by_gpu(cache: Path) -> None:
    assert launches.load(GPU) == {}
    found: dict[str, Launch] = {
        KEY: LinearLaunch(1, 4, 512, 8),
        "LatentLaunch 1 16 128 512 2": LatentLaunch(16, 64),
    }
    launches.keep(GPU, found)
    launches.keep("another", {})
    assert launches.load(GPU) == found and launches.load("another") == {}
    assert [path.name for path in cache.iterdir()] == [launches.FILE], (
        "nothing half-written is left"
    )


LATENT = "LatentLaunch 1 16 128 512 2"
SOUND = {"rows": 16, "columns": 64, "warps": 4}
ATTENTION = {
    "heads": 16,
    "keys": 16,
    "splits": 1,
    "warps": 4,
    "stages": 1,
    "apart": 1,
    "early": False,
    "sum_rows": 16,
    "values": 32,
    "latents": 128,
    "sum_warps": 4,
    "sum_stages": 2,
}


def told(name: str, launch: Any) -> str:
    """A file that holds one launch for this GPU."""
    return json.dumps({GPU: {name: launch}})


NOT_OURS = {
    "no end": "[" * 10**5,
    "half of one": "{",
    "a list": "[]",
    "an unknown kernel": told("Other 1", {}),
    "an unknown field": told(LATENT, {"x": 1}),
    "a field too few": told(LATENT, {"rows": 16, "columns": 64}),
    "zero": told(LATENT, {**SOUND, "columns": 0}),
    "a word": told(LATENT, {**SOUND, "columns": "a"}),
    "true for a number": told(LATENT, {**SOUND, "columns": True}),
    "1 for true": told("AttentionLaunch 1", ATTENTION),
    "no power of two": told(LATENT, {**SOUND, "columns": 48}),
    "a power of two without end": told(LATENT, {**SOUND, "columns": 2**4000}),
    "digits without end": "1" * 5000,
    "sizes that are none": told("LatentLaunch x", SOUND),
    "a terminal's codes": told("\x1b[2J\n", SOUND),
    "null": json.dumps({GPU: None}),
    "a list of launches": json.dumps({GPU: [[LATENT, SOUND]]}),
}


def test_two_searches_at_once_keep_what_both_found(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads the file, waits, and writes it."""
    kept = launches._kept

    def slowly() -> Any:
        content = kept()
        time.sleep(0.2)
        return content

    monkeypatch.setattr(launches, "_kept", slowly)
    found = {f"LinearLaunch {rows} 64 32 2": LINEAR for rows in (1, 2, 4)}
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda each: launches.keep(GPU, dict([each])), found.items()))
    assert launches.load(GPU) == found
    assert [path.name for path in cache.iterdir()] == [launches.FILE]


def test_a_folder_that_cant_be_locked_is_used_all_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "no lock on a folder")

    monkeypatch.setattr(fcntl, "flock", refuse)
    launches.keep(GPU, {KEY: LINEAR})
    assert launches.load(GPU) == {KEY: LINEAR}


def test_a_file_that_is_not_ours_is_told(cache: Path) -> None:
    cache.mkdir()
    for text in NOT_OURS.values():
        (cache / launches.FILE).write_text(text)
        with pytest.raises(InputError, match="remove it"):
            launches.load(GPU)
        assert (cache / launches.FILE).read_text() == text
    (cache / launches.FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="remove it"):
        launches.load(GPU)
    (cache / launches.FILE).write_text(told(LATENT, SOUND))
    assert launches.load(GPU)[LATENT] == LatentLaunch(**SOUND)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_something_else_in_place_of_the_file(make: Callable[[Path], Any], cache: Path) -> None:
    """A pipe is not waited for, and nothing half-written is left."""
    cache.mkdir()
    make(cache / launches.FILE)
    for use in (launches.load, lambda gpu: launches.keep(gpu, {})):
        with refused("launches.json can't be read", "R1_CACHE"):
            use(GPU)
    assert [path.name for path in cache.iterdir()] == [launches.FILE]


def test_a_full_disk_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, _text: str, **_: Any) -> int:
        path.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with refused("can't be written (.*No space left)"):
        launches.keep(GPU, {})
    assert list(cache.iterdir()) == []


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("R1_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with refused("R1_CACHE"):
        launches.load(GPU)


def test_a_folder_that_cant_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("R1_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(InputError, match="name another folder in R1_CACHE"):
        launches.keep(GPU, {})
    with pytest.raises(InputError):
        launches.load(GPU)
    assert (tmp_path / "file").read_text() == "mine"


def test_every_kind_survives_the_file() -> None:
    sizes = {
        "AttentionLaunch": (8, 128, 512, 64, 4096, 2),
        "ExpertsLaunch": (8, 6, 64, 2048, 1408, 2),
        "GroupedLaunch": (8, 32, 8, 128, 4096, 2),
        "LatentLaunch": (8, 16, 128, 512, 2),
        "LinearLaunch": (8, 2048, 2048, 2),
        "RouterLaunch": (8, 64, 2048),
    }
    found: dict[str, Launch] = {
        f"{name} {' '.join(map(str, sizes[name]))}": kind.default(sizes[name], chip())
        for name, kind in launches.KINDS.items()
    }
    launches.keep(GPU, found)
    assert launches.load(GPU) == found
    (attention,) = (launch for launch in found.values() if isinstance(launch, AttentionLaunch))
    assert attention.heads == 64 and attention.apart, "Hopper's warp groups are kept busy"
    assert all(launch.choices.keys() <= vars(launch).keys() for launch in found.values())
    assert json.loads(launches.path().read_text())[GPU].keys() == found.keys()


def test_tune_is_of_the_fused_kernels() -> None:
    with pytest.raises(InputError, match="add kernels=triton"):
        resolve(Backend(tune=True), TINY, Machine.here())


def test_a_cache_is_tuned_for_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Any] = []
    monkeypatch.setattr(tune, "tune", lambda runner, cache: searched.append((runner, cache)))
    run = runner(unit_gain(V3))
    for wanted in (False, True):
        engine = Engine(run.model, dataclasses.replace(run.backend, tune=wanted))
        made = engine.cache(1, 8)
        assert searched == ([(engine.runner, made)] if wanted else [])
