"""The layers that every transformer has: Linear, Embedding, RMSNorm and the SwiGLU feed-forward.

Shapes: B rows, S tokens of a row, D hidden_size, I inner size, W vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r1.storage.dense import Dense
from r1.storage.joined import products
from r1.storage.matrix import Matrix

Multiply = Callable[[Matrix, Tensor], Tensor]
"""W (out, in) and x (..., in) -> x W^T (..., out). A call of the model may bring another one than
the storage's own: Step.multiply."""


def matmul(matrix: Matrix, x: Tensor) -> Tensor:
    """The storage's own product."""
    return matrix.matmul(x)


class Linear(nn.Module):
    """x times the transposed weight, no bias. The matrix object knows how the weight is stored."""

    matrix: Matrix  # (out, in)

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = Dense.empty(outputs, inputs)

    def forward(self, x: Tensor, multiply: Multiply = matmul) -> Tensor:
        """(..., in) -> (..., out)."""
        return multiply(self.matrix, x)


def project(x: Tensor, multiply: Multiply, *layers: Linear) -> Sequence[Tensor]:
    """Each layer's output for the same x. Weights that are stored as one need one product only."""
    return products(lambda matrix: multiply(matrix, x), *[layer.matrix for layer in layers])


class Embedding(nn.Module):
    """Looks up one row of the matrix for each token."""

    matrix: Matrix  # (W, D)

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.matrix = Dense.empty(tokens, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (B, S) -> (B, S, D)."""
        return self.matrix.pick(tokens.flatten()).unflatten(0, tokens.shape)


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`, where rms(x) is the root of the mean square (arXiv 1910.07467).

    x / rms(x) is computed in fp32 and rounded to x's dtype *before* the weight multiplies it, as in
    transformers, our reference. DeepSeek's demo (and `F.rms_norm` with a weight) rounds after it.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.shape, self.eps = (dim,), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim). With fp32 weights the result is fp32, also for a bf16 x."""
        return self.weight * F.rms_norm(x, self.shape, eps=self.eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """(..., I) and (..., I) -> (..., I): `silu(gate) * up` (arXiv 2002.05202)."""
    return F.silu(gate) * up


class MLP(nn.Module):
    """The SwiGLU feed-forward of dense layers and of the shared experts."""

    def __init__(self, dim: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, intermediate)
        self.up_proj = Linear(dim, intermediate)
        self.down_proj = Linear(intermediate, dim)

    def forward(self, x: Tensor, multiply: Multiply = matmul) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        gate, up = project(x, multiply, self.gate_proj, self.up_proj)  # (B, S, I) each
        return self.down_proj(swiglu(gate, up), multiply)
