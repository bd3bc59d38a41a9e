"""What devices that share a layer exchange: each is an object in a slot, and one call.

They use torch's functional operators, which compiled code can hold. All ranks of a group must call
alike, in the same order. All ranks get the same bits, so they go on alike.

Shapes: n ranks of a group; M rows; ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r1.storage.matrix import Matrix

_ops = torch.ops._c10d_functional

Group = Any
"""A process group of torch.distributed. None where only sizes are asked for."""


class Sum:
    """Adds up what the ranks of a group made of one sum. For the slots of a Block.

    By torch.distributed's own engine: NCCL (AMD: RCCL), on a CPU gloo. Other ways to do it are
    classes with the same call: symmetric.py.
    """

    def __init__(self, group: Group) -> None:
        self.name = group.group_name if group is not None else ""

    def __call__(self, y: Tensor) -> Tensor:
        """(...) on each rank -> the sum, (...), on every rank, in the same dtype."""
        summed: Tensor = _ops.wait_tensor(_ops.all_reduce(y.contiguous(), "sum", self.name))
        return summed


class Gather:
    """Puts together what the ranks of a group made, in the order of the ranks."""

    def __init__(self, group: Group, ranks: int) -> None:
        self.name, self.ranks = group.group_name if group is not None else "", ranks

    def rows(self, x: Tensor) -> Tensor:
        """(M, ...) on each rank -> (n M, ...) on every rank."""
        whole: Tensor = _ops.wait_tensor(
            _ops.all_gather_into_tensor(x.contiguous(), self.ranks, self.name)
        )
        return whole

    def last(self, x: Tensor) -> Tensor:
        """(..., M) on each rank -> (..., n M) on every rank."""
        parts = self.rows(x[None])  # (n, ..., M)
        return parts.movedim(0, -2).flatten(-2)  # (..., n, M) -> (..., n M)


class SpreadRows(Matrix):
    """A matrix (out, in) whose rows lie on several ranks, an equal share on each. `shape` is that
    of the share here.

    Whoever asks need not know: each answer is that of the whole matrix.
    """

    def __init__(self, here: Matrix, rank: int, sum_: Sum, gather: Gather) -> None:
        super().__init__()
        self.here, self.shape, self.spec = here, here.shape, here.spec
        self.first, self.sum, self.gather = rank * here.shape[0], sum_, gather

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.gather.rows(self.here.dense(dtype))

    def through(self, product: Callable[[Matrix], Tensor]) -> Tensor:
        return self.gather.last(product(self.here))

    def matmul(self, x: Tensor) -> Tensor:
        return self.through(lambda here: here.matmul(x))

    def pick(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Each row is on one rank; the others add zeros."""
        local = ids - self.first
        held = (local >= 0) & (local < self.shape[0])
        rows = self.here.pick(local.where(held, torch.zeros_like(local)), dtype)  # (n, in)
        return self.sum(rows.where(held[:, None], torch.zeros_like(rows)))

    def stored(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        return self.here.stored(rows)
