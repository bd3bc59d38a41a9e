"""Tuning: search the kernels' launch parameters on this GPU, for the shapes that are asked for.

A decode step's blocks are captured with one parameter of one kernel changed. They are timed as they
will run: with cold weights, and between the kernels before and after. The search takes minutes,
once for each GPU, model shape and batch. Its result is kept in a file (kernels/launches.py).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from r1.kernels import launches
from r1.kernels.chip import AnyLaunch, Chip, Launch
from r1.model.cache import Cache
from r1.run import graphs
from r1.run.runner import Runner
from r1.run.ways import Fused

REPLAYS = 15
GAIN = 0.001
"""The share of the step's time that a change must save to be kept. Two timings of the same launch
differ by less."""
CLOSE = 0.05
"""How far a change may move a block's output, relative to the largest value. Another order of bf16
sums moves it by less."""


def captured_seconds(step: Callable[[], object]) -> float:
    """Seconds of one replay of `step`, captured: the median."""

    def once() -> None:
        step()

    return statistics.median(graphs.replay_seconds(graphs.record(once), REPLAYS))


def changed(launch: AnyLaunch, name: str, value: int) -> AnyLaunch:
    """`launch` with one parameter changed.

    If that changes the choices (fewer than 16 rows do without tl.dot), every other parameter takes
    the nearest of its new choices.
    """
    other = dataclasses.replace(launch, **{name: value})
    if other.choices == launch.choices:
        return other
    fields = dataclasses.asdict(other)
    for each, values in other.choices.items():
        if each != name and fields[each] not in values:
            fields[each] = min(values, key=lambda choice: abs(choice - fields[each]))
    return dataclasses.replace(launch, **fields)


def climb(
    start: AnyLaunch,
    seconds: Callable[[AnyLaunch], float],
    gain: float,
    going_on: Callable[[], bool] = lambda: True,
) -> AnyLaunch:
    """The best launch that changing one parameter at a time leads to.

    A change is kept if it saves more than the share `gain`. `seconds` is asked more than once for
    the same launch.
    """
    best, before = start, None
    while best != before and going_on():
        before = best
        for name in best.choices:
            for value in best.choices.get(name, ()):
                other = changed(best, name, value)
                if going_on() and seconds(other) < seconds(best) * (1 - gain):
                    best = other
    return best


def difference(ours: list[Tensor], right: list[Tensor]) -> float:
    """How far blocks' outputs (N, D) differ, relative to the largest value.

    It is the worst block's, but of a block the middle token's: another order of sums tips near ties
    between experts, and such a token's output is another.
    """
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
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Tune every kernel that `step` launches and that `chip` has no parameters for yet.

    `check` returns some blocks' outputs, each from the same input. Parameters are passed over if
    they do not compile, do not fit the chip, or change these outputs. `keep` is called first, so
    that a file that can't be written is reported before minutes are spent, and after each kernel.
    """
    chip.asked.clear()
    step()
    right = check()
    new = [key for key in chip.asked if key not in chip.tuned]
    if new:
        keep()
    for number, key in enumerate(new, 1):
        print(f"tuning kernel {number} of {len(new)}: {key}", file=sys.stderr, flush=True)
        tried: dict[Launch, float] = {}

        def measure(launch: Launch, key: str = key, tried: dict[Launch, float] = tried) -> float:
            """Seconds of the step with this launch; infinite where it can't be used."""
            if launch not in tried:
                tried[launch] = math.inf
                chip.tuned[key] = launch
                try:
                    if difference(check(), right) < CLOSE:
                        tried[launch] = seconds(step)
                except (
                    triton.runtime.errors.OutOfResources,
                    triton.CompilationError,
                    RuntimeError,
                ):
                    pass  # it can't be used
                finally:
                    del chip.tuned[key]
            return tried[launch]

        kind, sizes = chip.asked[key]
        chip.tuned[key] = climb(kind.default(sizes, chip), measure, GAIN)
        keep()


def tune(runner: Runner, cache: Cache) -> None:
    """Search parameters for the decode steps on `cache`, unless they are known, and keep them.

    The step that is timed runs all layers in a row, at rows three quarters full. The cache is
    empty afterwards.
    """
    way = runner.ways["decode"]
    assert isinstance(way, Fused)
    chip, gpu = way.chip, torch.cuda.get_device_name(runner.device)
    count, width = cache.rows * runner.backend.step_tokens, runner.backend.step_tokens
    numbers = torch.arange(count, device=runner.device) % runner.config.vocab_size
    tokens = numbers.view(cache.rows, width)  # (B, S)
    blocks = list(zip(runner.blocks["decode"], cache.layers, strict=False))
    last = len(blocks) - 1
    sparse = min(runner.config.experts.first_k_dense_replace, last)

    def step() -> None:
        with runner.context():
            now = runner.next_step(cache, width)
            hidden = runner.model.embed_tokens(tokens)
            for block, layer in blocks:
                hidden = block(hidden, now, layer)
            if width > 2:  # the drafter's second pass reads one token of a row
                blocks[last][0](hidden[:, :1], runner.next_step(cache, 1), blocks[last][1])

    def check() -> list[Tensor]:
        with runner.context():
            now, hidden = runner.next_step(cache, width), runner.model.embed_tokens(tokens)
            kinds = [blocks[i] for i in sorted({0, sparse})]
            return [block(hidden, now, layer).flatten(0, 1) for block, layer in kinds]

    cache.lengths.fill_(cache.capacity * 3 // 4)
    search(chip, step, check, keep=lambda: launches.keep(gpu, chip.tuned))
    cache.reset()
