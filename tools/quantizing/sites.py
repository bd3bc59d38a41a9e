"""The places of a block where matrices multiply the same input, and what is seen there.

Matrices are named by their paths in the block: "self_attn.o_proj", or "mlp.experts.gate_proj" for a
stack of experts.

Shapes: M real tokens (no padding), in a matrix's columns, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.model.dispatch import Dispatch, Loop
from r1.model.gqa import GQA
from r1.model.layers import Linear
from r1.model.moe import Experts, MoE
from r1.model.transformer import Block
from r1.storage.dense import Dense
from r1.storage.matrix import Matrix

ATTENTION, FEED_FORWARD, SHARED, EXPERTS = (
    "self_attn", "mlp", "mlp.shared_experts", "mlp.experts",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """Matrices that multiply the same input."""

    readers: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.readers[0]


def sites(block: Block) -> tuple[tuple[Site, ...], ...]:
    """A block's sites in the order in which they are computed; those of a stage are independent."""
    stages: list[tuple[Site, ...]] = [(_site(ATTENTION, *names),) for names in _attention(block)]
    parts = [FEED_FORWARD]
    if block.sparse:
        parts = [EXPERTS, *([SHARED] if cast(MoE, block.mlp).shared_experts is not None else [])]
    inner = [f"{part}.{name}" for part in parts for name in ("gate_proj", "up_proj")]
    stages.append((Site(tuple(inner)),))
    stages.append(tuple(_site(part, "down_proj") for part in parts))
    return tuple(stages)


def _attention(block: Block) -> list[tuple[str, ...]]:
    """The matrices of the attention, by the input that they read."""
    if isinstance(block.self_attn, GQA):
        return [("q_proj", "k_proj", "v_proj"), ("o_proj",)]
    if block.self_attn.shape.q_lora_rank is None:
        return [("q_proj", "kv_a_proj_with_mqa"), ("o_proj",)]
    return [("q_a_proj", "kv_a_proj_with_mqa"), ("q_b_proj",), ("o_proj",)]


def _site(part: str, *names: str) -> Site:
    return Site(tuple(f"{part}.{name}" for name in names))


def matrix(block: Block, path: str) -> Matrix:
    """The matrix object of a name."""
    module = block.get_submodule(path)
    return cast(Matrix, module.matrix if isinstance(module, Linear) else module)


def weight(block: Block, path: str) -> Tensor:
    """A matrix's numbers, to be read or changed in place: (out, in) or (E, out, in)."""
    return cast(Dense, matrix(block, path)).weight.data


@dataclass
class Statistics:
    """What is kept of the inputs x of a site, and not the inputs themselves."""

    h: Tensor
    """fp32 (..., in, in): the mean of x x^T."""
    size: Tensor
    """fp32 (..., in): the mean of |x|."""
    tokens: int = 0

    @staticmethod
    def empty(shape: Sequence[int], device: torch.device) -> Statistics:
        """`shape` is that of a matrix or a stack of them."""
        lead, columns = shape[:-2], shape[-1]
        h = torch.zeros((*lead, columns, columns), device=device)
        return Statistics(h, torch.zeros((*lead, columns), device=device))

    def add(self, x: Tensor, at: int | None = None) -> None:
        """Count inputs (M, in), of one expert (`at`) or of the only matrix.

        Every expert gets the same tokens, so the first one's are counted.
        """
        h, size = (self.h, self.size) if at is None else (self.h[at], self.size[at])
        x = x.float()
        h.addmm_(x.T, x)
        size += x.abs().sum(0)
        self.tokens += len(x) if not at else 0

    def mean(self) -> Statistics:
        """The sums, divided by the number of tokens."""
        count = max(1, self.tokens)
        return Statistics(self.h / count, self.size / count, self.tokens)


class Watched(Matrix):
    """A matrix that shows its inputs to a watcher, and multiplies as before."""

    def __init__(self, inner: Matrix, seen: Statistics, watcher: Watcher) -> None:
        super().__init__()
        self.inner, self.seen, self.shape = inner, seen, inner.shape
        self.watcher = [watcher]  # in a list, or nn.Module would take it for a part

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.inner.dense(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        self.seen.add(x.flatten(0, -2)[self.watcher[0].real])
        return self.inner.matmul(x)


@dataclass
class Watcher:
    """Collects the statistics of some sites, for as long as `watch` is open."""

    real: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Which tokens of a batch are no padding, bool (B S,). Set it before each batch."""
    seen: dict[str, Statistics] = field(default_factory=dict)
    """By the name of a site."""
    loads: Tensor | None = None
    """How many tokens chose each expert, int64 (E,)."""


class VisitEvery(Dispatch):
    """Shows every expert every token. The output is the chosen experts' alone, as before.

    With the chosen tokens only, an expert that few of them choose would be rounded by what those
    few happen to be.
    """

    name = "visit"

    def __init__(self, watcher: Watcher, inner: bool, down: bool) -> None:
        """Which inputs to look at: those of the inner layer, and those of down_proj."""
        self.watcher, self.inner, self.down = watcher, inner, down

    def __call__(self, experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        real, seen = self.watcher.real, self.watcher.seen
        every = x[real]  # (M, D)
        loads = indices[real].flatten().bincount(minlength=experts.count)
        self.watcher.loads = loads + (0 if self.watcher.loads is None else self.watcher.loads)
        if self.inner:
            seen[f"{EXPERTS}.gate_proj"].add(every)
        for expert in range(experts.count if self.down else 0):
            h = experts.inner(lambda m: F.linear(every, m.one(expert, x.dtype)))  # noqa: B023
            seen[f"{EXPERTS}.down_proj"].add(h, expert)  # (M, I)
        return Loop()(experts, x, indices, weights)


@contextmanager
def watch(block: Block, wanted: Sequence[Site]) -> Iterator[Watcher]:
    """Look at some sites of a block. The block computes what it did."""
    watcher = Watcher()
    before: list[tuple[Any, str, Any]] = []

    def swap(owner: Any, name: str, new: Any) -> None:
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    for site in wanted:
        source = matrix(block, site.name)
        shape, device = source.shape, weight(block, site.name).device
        shared = site.name == f"{EXPERTS}.gate_proj"  # all experts read the same tokens
        watcher.seen[site.name] = Statistics.empty(shape[-2:] if shared else shape, device)
        if len(shape) == 2:  # experts show their inputs through the slot `dispatch`
            owner = block.get_submodule(site.name)
            swap(owner, "matrix", Watched(source, watcher.seen[site.name], watcher))
    if block.sparse:
        inner, down = (f"{EXPERTS}.{name}_proj" in watcher.seen for name in ("gate", "down"))
        visit = VisitEvery(watcher, inner, down)
        swap(block.mlp, "dispatch", {"prefill": visit, "decode": visit})
    try:
        yield watcher
    finally:
        for owner, name, old in reversed(before):
            setattr(owner, name, old)
