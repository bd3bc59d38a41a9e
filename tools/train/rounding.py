"""Train with rounded weights: forward and backward see each weight as FP8 blocks will store it.

The gradient at the rounded weights moves the exact weights. (This is a straight-through estimate:
the backward pass treats rounding as the identity.) So the weights settle where rounding changes the
loss little.

Shapes: M matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.files.names import is_projection, places
from r1.model.transformer import Transformer
from r1.storage import fp8


class Rounding:
    """The matrices of a model that its checkpoint stores as FP8, by shape."""

    def __init__(self, model: Transformer) -> None:
        assert model.config.files.fp8_block is not None, (
            "a checkpoint without FP8 has nothing to round"
        )
        self.block = model.config.files.fp8_block
        self.groups: dict[tuple[int, ...], list[Tensor]] = {}
        for key, matrix in places(model).items():
            if is_projection(key):
                self.groups.setdefault(tuple(matrix.shape), []).append(matrix)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Round the weights in place, and restore them bit for bit at the end of the block."""
        exact = {shape: torch.stack(group) for shape, group in self.groups.items()}  # (M, R, C)
        with torch.no_grad():
            for shape, group in self.groups.items():
                torch._foreach_copy_(group, list(round_blocks(exact[shape], self.block)))
        try:
            yield
        finally:
            with torch.no_grad():
                for shape, group in self.groups.items():
                    torch._foreach_copy_(group, list(exact[shape]))


def round_blocks(matrices: Tensor, block: tuple[int, int]) -> Tensor:
    """Round fp32 matrices (M, R, C) as fp8.quantize does, all at once. Same shape, still fp32."""
    _, rows, columns = matrices.shape
    padded = F.pad(matrices, (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.unflatten(2, (-1, block[1])).unflatten(
        1, (-1, block[0])
    )  # (M, R / 128, 128, C / 128, 128)
    scale = blocks.abs().amax(dim=(2, 4), keepdim=True).clamp(min=1e-12) / fp8.E4M3_MAX
    rounded = (blocks / scale).to(fp8.E4M3).float() * scale
    return rounded.flatten(3, 4).flatten(1, 2)[:, :rows, :columns]
