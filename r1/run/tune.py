"""Tuning: search the kernels' launch parameters on this GPU, for the shapes that are asked for.

A decode step's blocks are captured with one parameter of one kernel changed. They are timed as they
will run: with cold weights, and between the kernels before and after. The search takes minutes,
once for each GPU, model shape and batch. Its result is kept in a file (kernels/launches.py).
"""

from __future__ import annotations

import dataclasses
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
"""A change must save so much of the step's time to be kept: timings of the same thing differ by
less."""
CLOSE = 0.05
"""How far a change may move a block's output, relative to the largest: another order of bf16 sums,
and no more."""


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
    output is another.
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
    found: Callable[[], None] = lambda: None,
) -> None:
    """Tune every kernel that `step` launches and `chip` has nothing for yet; `found` is called
    first, and after each.

    One parameter at a time, as long as that helps; what doesn't compile or fit the chip, or makes
    `check` (some blocks' outputs, each from the same input) something else, is passed over.
    """
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
    way = runner.ways["decode"]
    assert isinstance(way, Fused)
    chip, gpu = way.chip, torch.cuda.get_device_name(runner.device)
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
            now = runner.next_step(cache, tokens.shape[1])
            hidden = runner.model.embed_tokens(tokens)
            for block, layer in blocks:
                hidden = block(hidden, now, layer)
            if runner.backend.step_tokens > 2:  # the drafter's second pass reads one token of a row
                blocks[last][0](hidden[:, :1], runner.next_step(cache, 1), blocks[last][1])

    def check() -> list[Tensor]:
        with runner.context():
            now, hidden = (
                runner.next_step(cache, tokens.shape[1]),
                runner.model.embed_tokens(tokens),
            )
            return [blocks[i][0](hidden, now, blocks[i][1]).flatten(0, 1) for i in kinds]

    cache.lengths.fill_(cache.capacity * 3 // 4)
    search(chip, step, check, found=lambda: launches.keep(gpu, chip.tuned))
    cache.reset()
