"""Quantize one block: what the methods do to it, and what becomes of its matrices.

Shapes: B rows, S tokens of a row, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from quantizing import awq
from quantizing.gptq import gptq
from quantizing.rounding import Grid, by_parts, expert_of, rtn
from quantizing.sites import EXPERTS, Site, Statistics, Watcher, sites, watch, weight
from r1 import InputError
from r1.model.step import Step
from r1.model.transformer import Block
from r1.storage.codes import Codes, dequantize

METHODS = ("rtn", "gptq", "awq")
BATCH_TOKENS = 16384
"""The most tokens, with padding, that go through a layer at a time."""


@dataclass
class Batch:
    """Some rows of the calibration, and what a layer reads of them."""

    tokens: Tensor
    """int64 (B, S); the end of a row is padding."""
    real: Tensor
    """bool (B, S): which tokens are no padding."""
    hidden: Tensor
    """(B, S, D), on the CPU."""


def batches(rows: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Rows of tokens -> batches of similar lengths: tokens and `real`, (B, S) each."""
    out, pending = [], sorted(rows, key=len, reverse=True)
    while pending:
        longest = len(pending[0])
        some = pending[: max(1, BATCH_TOKENS // longest)]
        pending = pending[len(some) :]
        tokens = torch.zeros(len(some), longest, dtype=torch.int64)
        real = torch.zeros(len(some), longest, dtype=torch.bool)
        for row, ids in enumerate(some):
            tokens[row, : len(ids)] = torch.tensor(ids)
            real[row, : len(ids)] = True
        out.append((tokens, real))
    return out


@dataclass
class Done:
    """What became of a block."""

    codes: dict[str, Codes] = field(default_factory=dict)
    """The quantized matrices, by their paths in the block."""
    loads: Tensor | None = None
    """How many of the calibration's tokens chose each expert, int64 (E,)."""
    folded: list[str] = field(default_factory=list)
    """AWQ's sites whose scales are not all 1."""


class Calibrated:
    """A block with its calibration, which goes through it again whenever statistics are needed."""

    def __init__(
        self, block: Block, batches: Sequence[Batch], step: Callable[[Tensor], Step]
    ) -> None:
        self.block, self.batches, self.step = block, batches, step

    def output(self) -> list[Tensor]:
        """What the block makes of each batch, (B, S, D) on the CPU."""
        return [self._call(batch).cpu() for batch in self.batches]

    def seen(self, wanted: Sequence[Site]) -> Watcher:
        """The statistics of some sites, as means over all real tokens."""
        with watch(self.block, wanted) as watcher:
            for batch in self.batches:
                watcher.real = batch.real.flatten().to(self.device)
                self._call(batch)
        watcher.seen = {name: statistics.mean() for name, statistics in watcher.seen.items()}
        for name, statistics in watcher.seen.items():
            if not bool(statistics.h.isfinite().all()):
                raise InputError(
                    f"the calibration makes NaN or infinite inputs of {name}: check that the model "
                    "answers sensibly, or use --dtype fp32"
                )
        return watcher

    @property
    def device(self) -> torch.device:
        return self.block.input_layernorm.weight.device

    def _call(self, batch: Batch) -> Tensor:
        out: Tensor = self.block(batch.hidden.to(self.device), self.step(batch.tokens), None)
        return out


def quantize(calibrated: Calibrated, method: str, grid: Grid, quantized: Collection[str]) -> Done:
    """Quantize the matrices of these paths, in place: the block computes with the result."""
    block, done = calibrated.block, Done()
    stages = [[s for s in stage if {*s.readers} & {*quantized}] for stage in sites(block)]
    stages = [stage for stage in stages if stage]
    if method == "rtn":
        for path in quantized:
            _put(block, path, rtn(weight(block, path), grid), grid, done)
    elif method == "awq":
        watcher = calibrated.seen([site for stage in stages for site in stage])
        done.loads = watcher.loads
        for site in (site for stage in stages for site in stage):
            if awq.fold(block, site, quantized, watcher.seen, grid) is not None:
                done.folded.append(site.name)
        for path, stats in _readers(stages, quantized, watcher.seen):
            codes = by_parts(partial(awq.clipped, grid=grid), weight(block, path), stats.h)
            _put(block, path, codes, grid, done)
    else:
        for stage in stages:  # later stages see the quantized earlier ones
            watcher = calibrated.seen(stage)
            done.loads = done.loads if watcher.loads is None else watcher.loads
            for path, stats in _readers([stage], quantized, watcher.seen):
                codes = by_parts(partial(gptq, grid=grid), weight(block, path), stats.h)
                _put(block, path, codes, grid, done)
    return done


def _readers(
    stages: Sequence[Sequence[Site]], quantized: Collection[str], seen: Mapping[str, Statistics]
) -> list[tuple[str, Statistics]]:
    """The quantized matrices with the statistics of their inputs."""
    return [
        (path, seen[site.name])
        for stage in stages
        for site in stage
        for path in site.readers
        if path in quantized
    ]


def _put(block: Block, path: str, codes: Codes, grid: Grid, done: Done) -> None:
    """Let the block compute with a quantized matrix, as r1 will read it."""
    place = weight(block, path)
    spec = grid.spec(place.shape[-1])
    if place.dim() == 2:
        place.copy_(dequantize(codes, spec))
    for expert in range(len(place) if place.dim() > 2 else 0):
        place[expert].copy_(dequantize(expert_of(codes, expert), spec))
    done.codes[path] = codes


def paths(block: Block) -> list[str]:
    """Every matrix of a block that may be quantized."""
    return [path for stage in sites(block) for site in stage for path in site.readers]


def experts_of(path: str) -> bool:
    """Whether a path is that of a stack of routed experts."""
    return path.startswith(f"{EXPERTS}.")
