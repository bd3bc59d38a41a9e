"""Muon: an optimizer that makes each matrix of momentum orthogonal before it applies it.

A gradient has a few large directions and many small ones. With all singular values near 1, each
direction is learned at the same speed. Muon is for hidden matrices only: embeddings, norms and the
output head are not maps between hidden spaces. Sources: Keller Jordan, 2024; Moonlight, arXiv
2502.16982.

Shapes: M matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz coefficients. They raise small singular values fast; all end near 0.7 to 1.2."""
ADAM_RMS = 0.2
"""The typical size of an entry of Adam's update (Moonlight, section 2.2).

Muon's update is scaled to it, so one learning rate suits both optimizers."""


class Muon:
    """The optimizer. It takes matrices (R, C) and stacks of matrices (E, R, C).

    Matrices of one shape are a group, so that one batched product serves all of them.
    """

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
    """Set the singular values of matrices (M, R, C) near 1 and keep their vectors. Returns fp32."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    # bf16 suffices, because each step corrects the one before. On a CPU bf16 is slower than fp32.
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.mT if tall else x).float()
