"""The two layers that every transformer has: RMSNorm and the SwiGLU feed-forward.

Shapes: B batch, S sequence, D hidden_size, I intermediate_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`, the statistics in fp32 (arXiv 1910.07467).

    Rounds to x's dtype *before* the multiplication, as transformers does and DeepSeek's demo (and
    `F.rms_norm` with its weight) doesn't: the two differ by one rounding in bf16, and checkpoints
    are compared with transformers."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.shape, self.eps = (dim,), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), same dtype."""
        return self.weight * F.rms_norm(x, self.shape, eps=self.eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2I) whose first half is the gate -> (..., I): `silu(gate) * up` (arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)  # (..., I) each
    return F.silu(gate) * up


class MLP(nn.Module):
    """The SwiGLU feed-forward of dense layers and of the shared experts."""

    def __init__(self, dim: int, intermediate: int) -> None:
        super().__init__()
        # The checkpoint's gate_proj above its up_proj, as one matrix: one product where two would
        # read x twice.
        self.gate_up_proj = nn.Linear(dim, 2 * intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.down_proj(swiglu(self.gate_up_proj(x)))
