"""The reference for models whose fp32 weights would not fit: bf16 storage, every product in fp32.

A bf16 number is an fp32 number, so the results are those of fp32 weights. One matrix at a time is
widened.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.model.layers import Embedding, Linear
from r1.model.moe import EXPERT_MATRICES, Experts
from r1.model.transformer import Transformer
from r1.storage.activations import stored_as
from r1.storage.matrix import Matrix


class Widened(Matrix):
    """Another matrix, whose numbers come out in fp32."""

    def __init__(self, narrow: Matrix) -> None:
        super().__init__()
        self.narrow, self.shape, self.spec = narrow, narrow.shape, stored_as(narrow)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.narrow.dense(dtype or torch.float32)

    def matmul(self, x: Tensor) -> Tensor:
        return self.narrow.through(lambda part: F.linear(x, part.dense(torch.float32)))

    def one(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.narrow.one(index, dtype or torch.float32)

    def pick(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.narrow.pick(ids, dtype or torch.float32)

    def stored(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        return self.narrow.stored(rows)


def upcast(model: Transformer) -> None:
    """Widen every matrix; the norms and the router follow their input's dtype."""
    for module in model.modules():
        if isinstance(module, (Linear, Embedding)):
            module.matrix = Widened(module.matrix)
        elif isinstance(module, Experts):
            for name in EXPERT_MATRICES:
                setattr(module, name, Widened(getattr(module, name)))
