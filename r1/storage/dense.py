"""The plain storage: one tensor of numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r1.storage.grouped import grouped_mm
from r1.storage.matrix import Matrix


class Dense(Matrix):
    """A weight as it is: a parameter of shape (out, in) or (E, out, in)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self.shape = weight.shape

    @staticmethod
    def empty(*shape: int) -> Dense:
        """One whose numbers are not set yet, fp32 (build.py gives it the model's dtype)."""
        return Dense(torch.empty(*shape, dtype=torch.float32))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight if dtype is None else self.weight.to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def one(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.weight[index]
        return weight if dtype is None else weight.to(dtype)

    def pick(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        weights = self.weight.index_select(0, ids)
        return weights if dtype in (None, weights.dtype) else weights.to(dtype)

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_mm(x, self.weight, ends)

    def stored(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        return {"weight": self.weight.data[..., rows, :]}
