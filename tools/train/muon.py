"""Muon: momentum whose matrices are made orthogonal before they are applied (Keller Jordan, 2024;
Moonlight, arXiv 2502.16982).

A gradient's few large directions drown the many small ones; with all singular values near 1, each
direction is learned at the same speed. For hidden matrices only: embeddings, norms and the head's
rows are not maps between hidden spaces.

Shapes: M matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz coefficients that lift small singular values fast and leave them all within 0.7 to
1.2."""
ADAM_RMS = 0.2
"""The typical size of an entry of Adam's update: scaled to it, one learning rate suits both
(Moonlight, section 2.2)."""


class Muon:
    """Parameters (R, C), or stacks of them (E, R, C), are grouped by shape: one batch of products
    for all of a shape."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups: dict[str, list[nn.Parameter]] = {}
        for parameter in parameters:
            rows, columns = parameter.shape[-2:]
            self.groups.setdefault(f"{rows}x{columns}", []).append(parameter)
        self.averages = {
            shape: torch.zeros_like(
                torch.cat([p.data.reshape(-1, *p.shape[-2:]) for p in group])
            )  # (M, R, C)
            for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the parameters against their gradients."""
        for shape, group in self.groups.items():
            gradient = torch.cat(
                [p.grad.reshape(-1, *p.shape[-2:]) for p in group if p.grad is not None]
            )  # (M, R, C)
            average = self.averages[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(average, self.momentum))  # Nesterov's look ahead
            rows, columns = update.shape[1:]
            parts = update.split([p.numel() // (rows * columns) for p in group])
            matrices: list[Tensor] = [p.data for p in group]
            torch._foreach_mul_(matrices, 1 - lr * self.weight_decay)
            steps = [part.view_as(p) for part, p in zip(parts, group, strict=True)]
            torch._foreach_add_(matrices, steps, alpha=-lr * ADAM_RMS * max(rows, columns) ** 0.5)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """(M, R, C) -> matrices with the same singular vectors, and singular values near 1; fp32."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    # Half precision suffices, because each step corrects the one before; but on a CPU it is slower.
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.mT if tall else x).float()
