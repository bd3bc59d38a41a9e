"""`tune`: search the kernels' launch parameters on the GPU that is here, for the shapes that are asked for, and keep them.

A decode step's blocks are captured with one parameter of one kernel changed, and timed as they will run: with cold weights,
and with the kernels before and after beside. So nobody has to guess what a chip likes; the search takes minutes, once for
each GPU, model shape and batch. What it finds is kept in a file, by the GPU's name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from r1 import graphs
from r1.errors import InputError
from r1.kernels.attention import AttentionLaunch
from r1.kernels.chip import Chip, Launch
from r1.kernels.experts import ExpertsLaunch
from r1.kernels.latent import LatentLaunch
from r1.kernels.linear import LinearLaunch
from r1.kernels.router import RouterLaunch

if TYPE_CHECKING:
    from r1.cache import Cache
    from r1.runner import Runner

KINDS: dict[str, type[Launch]] = {
    kind.__name__: kind for kind in (AttentionLaunch, ExpertsLaunch, LatentLaunch, LinearLaunch, RouterLaunch)
}
FILE = "launches.json"
REPLAYS = 15
GAIN = 0.001
"""A change must save so much of the step's time to be kept: timings of the same thing differ by less."""
CLOSE = 0.05
"""How far a change may move the step's outputs, relative to the largest: another order of bf16 sums, and no more."""


def path() -> Path:
    """Where the launches are kept: in $R1_CACHE, or the user's cache folder."""
    base = os.environ.get("R1_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r1"
    return Path(base) / FILE


def load(gpu: str) -> dict[str, Launch]:
    """What was found on such a GPU, by Chip's keys. Raises InputError for a file that isn't ours."""
    try:
        return {key: KINDS[key.split()[0]](**values) for key, values in _kept().get(gpu, {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path()} doesn't hold launch parameters of this version ({error}): remove it") from None


def keep(gpu: str, tuned: dict[str, Launch]) -> None:
    """Write what was found, whole or not at all, beside what is kept of other GPUs. Raises InputError where it can't."""
    partial = path().with_suffix(f".{os.getpid()}")
    try:
        everything = _kept() | {gpu: {key: dataclasses.asdict(launch) for key, launch in tuned.items()}}
        path().parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path())
    except OSError as error:
        raise InputError(f"{path()} can't be written ({error.strerror}): name another folder in R1_CACHE") from None


def _kept() -> dict[str, dict[str, dict[str, int]]]:
    """The file, by GPU, key and parameter."""
    try:
        found: dict[str, dict[str, dict[str, int]]] = json.loads(path().read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return {}


def captured_seconds(step: Callable[[], object]) -> float:
    """Seconds of one replay of `step`, captured: the median."""
    graph = graphs.record(lambda: (step(), None)[1])
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def search(
    chip: Chip,
    step: Callable[[], Tensor],
    seconds: Callable[[Callable[[], object]], float] = captured_seconds,
    found: Callable[[], None] = lambda: None,
) -> None:
    """Tune every kernel that `step` launches and `chip` has nothing for yet; `found` is called first, and after each.

    One parameter at a time, as long as that helps; what doesn't fit the chip, or computes something else, is passed over.
    """
    chip.asked.clear()
    twin = step().float()
    new = [key for key in chip.asked if key not in chip.tuned]
    if new:
        found()  # who can't keep anything says so before minutes are spent
    for number, key in enumerate(new, 1):
        print(f"tuning kernel {number} of {len(new)}: {key}", file=sys.stderr, flush=True)
        tried: dict[Launch, float] = {}

        def measure(launch: Launch, key: str = key, tried: dict[Launch, float] = tried) -> float:
            """Seconds of the step with this launch; infinite where it can't be used."""
            if launch not in tried:
                chip.tuned[key] = launch
                try:
                    off = float((step().float() - twin).abs().max() / twin.abs().max())
                    tried[launch] = seconds(step) if off < CLOSE else float("inf")
                except triton.runtime.errors.OutOfResources:
                    tried[launch] = float("inf")
                finally:
                    del chip.tuned[key]
            return tried[launch]

        kind, sizes = chip.asked[key]
        best, before = kind.default(sizes, chip), None
        while best != before:
            before = best
            for name, values in best.choices.items():
                for value in values:
                    other = dataclasses.replace(best, **{name: value})
                    if measure(other) < measure(best) * (1 - GAIN):
                        best = other
        chip.tuned[key] = best
        found()


def tune(runner: Runner, cache: Cache) -> None:
    """Search what decode steps on `cache` launch, unless it is known already, and keep it. The cache is empty afterwards.

    A step of all layers, one behind the other; rows are as long as they are late in an answer.
    """
    assert runner.chip is not None
    count = cache.rows * runner.backend.step_tokens
    tokens = torch.arange(count, device=runner.device).view(cache.rows, -1) % runner.config.vocab_size  # (B, S)

    def step() -> Tensor:
        with runner.context():
            now = runner.behind(cache, tokens.shape[1])
            hidden = runner.model.embed_tokens(tokens)
            for block, layer in zip(runner.blocks["decode"], cache.layers, strict=False):
                hidden = block(hidden, now, layer)
            return hidden

    cache.lengths.fill_(cache.capacity * 3 // 4)
    chip, gpu = runner.chip, torch.cuda.get_device_name(runner.device)
    search(chip, step, found=lambda: keep(gpu, chip.tuned))
    cache.reset()
