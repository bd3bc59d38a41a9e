"""`tune`: search the kernels' launch parameters on the GPU that is here, for the shapes that are
asked for, and keep them.

A decode step's blocks are captured with one parameter of one kernel changed, and timed as they will
run: with cold weights, and with the kernels before and after beside. So nobody has to guess what a
chip likes; the search takes minutes, once for each GPU, model shape and batch. What it finds is
kept in a file, by the GPU's name."""

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

from r1.errors import InputError
from r1.kernels.attention import AttentionLaunch
from r1.kernels.chip import AnyLaunch, Chip, Launch
from r1.kernels.experts import ExpertsLaunch
from r1.kernels.latent import LatentLaunch
from r1.kernels.linear import LinearLaunch
from r1.kernels.router import RouterLaunch
from r1.run import graphs

if TYPE_CHECKING:
    from r1.model.cache import Cache
    from r1.run.runner import Runner

KINDS: dict[str, type[Launch]] = {
    kind.__name__: kind
    for kind in (AttentionLaunch, ExpertsLaunch, LatentLaunch, LinearLaunch, RouterLaunch)
}
FILE = "launches.json"
REPLAYS = 15
GAIN = 0.001
"""A change must save so much of the step's time to be kept: timings of the same thing differ by
less."""
CLOSE = 0.05
"""How far a change may move a block's output, relative to the largest: another order of bf16 sums,
and no more."""


def path() -> Path:
    """Where the launches are kept: in $R1_CACHE, or the user's cache folder."""
    base = (
        os.environ.get("R1_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r1"
    )
    return Path(base) / FILE


def load(gpu: str) -> dict[str, Launch]:
    """What was found on such a GPU, by Chip's keys. Raises InputError for a file that isn't
    ours."""
    return {key: KINDS[key.split()[0]](**values) for key, values in _kept().get(gpu, {}).items()}


def keep(gpu: str, tuned: dict[str, Launch]) -> None:
    """Write what was found, whole or not at all, beside what is kept already. Raises InputError
    where it can't."""
    everything = _kept()
    everything[gpu] = everything.get(gpu, {}) | {
        key: dataclasses.asdict(launch) for key, launch in tuned.items()
    }
    partial = path().with_suffix(f".{os.getpid()}")
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path())
    except OSError as error:
        raise InputError(
            f"{path()} can't be written ({error.strerror}): name another folder in R1_CACHE"
        ) from None


def _kept() -> dict[str, dict[str, dict[str, int]]]:
    """The file, by GPU, key and parameter; empty where there is none. Raises InputError for one
    that isn't ours."""
    try:
        text = path().read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(
            f"{path()} can't be read ({error.strerror}): name another folder in R1_CACHE"
        ) from None
    try:
        found: dict[str, dict[str, dict[str, int]]] = json.loads(text)
        for launches in found.values():
            for key, values in launches.items():
                kind = KINDS[key.split()[0]]
                if missing := {each.name for each in dataclasses.fields(kind)} - values.keys():
                    raise ValueError(f"{key} has no {min(missing)}")
                kind(**values)
                flags = [each.name for each in dataclasses.fields(kind) if each.type == "bool"]
                for name, value in values.items():
                    # Tiles are powers of two; pipelines have a few stages.
                    sound = type(value) is (bool if name in flags else int) and (
                        1 <= value <= 8
                        if name.endswith("stages")
                        else name in flags or value.bit_count() == 1 <= value
                    )
                    if not sound:
                        raise ValueError(f"{key} has {name}={value!r}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(
            f"{path()} doesn't hold launch parameters of this version ({error}): remove it"
        ) from None
    return found


def captured_seconds(step: Callable[[], object]) -> float:
    """Seconds of one replay of `step`, captured: the median."""
    return statistics.median(
        graphs.replay_seconds(graphs.record(lambda: (step(), None)[1]), REPLAYS)
    )


def climb(
    start: AnyLaunch,
    seconds: Callable[[AnyLaunch], float],
    gain: float,
    going_on: Callable[[], bool] = lambda: True,
) -> AnyLaunch:
    """The best launch found by changing one parameter at a time, as long as that saves a share of
    more than `gain`.

    `seconds` is asked again for what it has told already.
    """
    best, before = start, None
    while best != before and going_on():
        before = best
        for name, values in start.choices.items():
            for value in values:
                other = dataclasses.replace(best, **{name: value})
                if going_on() and seconds(other) < seconds(best) * (1 - gain):
                    best = other
    return best


def off(ours: list[Tensor], right: list[Tensor]) -> float:
    """How far blocks' outputs (N, D) differ, relative to the largest: the worst block's middle
    token.

    Not the worst token's: another order of sums tips near ties between experts, and then a token's
    output is another."""
    gaps = [
        (a.float() - b.float()).abs().amax(dim=-1) / b.float().abs().amax(dim=-1)
        for a, b in zip(ours, right, strict=True)
    ]
    return max(float(gap.median()) for gap in gaps)


def search(
    chip: Chip,
    step: Callable[[], object],
    check: Callable[[], list[Tensor]],
    seconds: Callable[[Callable[[], object]], float] = captured_seconds,
    found: Callable[[], None] = lambda: None,
) -> None:
    """Tune every kernel that `step` launches and `chip` has nothing for yet; `found` is called
    first, and after each.

    One parameter at a time, as long as that helps; what doesn't compile or fit the chip, or makes
    `check` (some blocks' outputs, each from the same input) something else, is passed over."""
    chip.asked.clear()
    step()
    right = check()
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
                    tried[launch] = seconds(step) if off(check(), right) < CLOSE else float("inf")
                except (
                    triton.runtime.errors.OutOfResources,
                    triton.CompilationError,
                    RuntimeError,
                ):
                    tried[launch] = float("inf")
                finally:
                    del chip.tuned[key]
            return tried[launch]

        kind, sizes = chip.asked[key]
        chip.tuned[key] = climb(kind.default(sizes, chip), measure, GAIN)
        found()


def tune(runner: Runner, cache: Cache) -> None:
    """Search what decode steps on `cache` launch, unless it is known already, and keep it. The
    cache is empty afterwards.

    A step of all layers, one behind the other; rows are as long as they are late in an answer.
    """
    assert runner.chip is not None
    chip, gpu = runner.chip, torch.cuda.get_device_name(runner.device)
    count = cache.rows * runner.backend.step_tokens
    tokens = (
        torch.arange(count, device=runner.device).view(cache.rows, -1) % runner.config.vocab_size
    )  # (B, S)
    blocks = list(zip(runner.blocks["decode"], cache.layers, strict=False))
    last = len(blocks) - 1
    kinds = sorted(
        {min(runner.config.experts.first_k_dense_replace, last), 0}
    )  # a sparse layer, and a dense one

    def step() -> None:
        with runner.context():
            now = runner.behind(cache, tokens.shape[1])
            hidden = runner.model.embed_tokens(tokens)
            for block, layer in blocks:
                hidden = block(hidden, now, layer)
            if runner.drafts > 1:  # the drafter's second pass reads one token of a row
                blocks[last][0](hidden[:, :1], runner.behind(cache, 1), blocks[last][1])

    def check() -> list[Tensor]:
        with runner.context():
            now, hidden = runner.behind(cache, tokens.shape[1]), runner.model.embed_tokens(tokens)
            return [blocks[i][0](hidden, now, blocks[i][1]).flatten(0, 1) for i in kinds]

    cache.lengths.fill_(cache.capacity * 3 // 4)
    search(chip, step, check, found=lambda: keep(gpu, chip.tuned))
    cache.reset()
