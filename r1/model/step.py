"""The inputs that all layers share in one call of the model.

Shapes: B rows, S tokens of a row, T slots of the cache that the call may see, R rope dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r1.model.cache import LayerCache
from r1.model.layers import Multiply, matmul


@dataclass
class Step:
    """Where the call's tokens stand, their rotation, and which keys each of them sees."""

    phase: str  # "prefill" or "decode": selects the strategy in each slot
    positions: Tensor  # int64 (B, S): the place of each token in its row
    cos: Tensor  # fp32 (B, S, 1, R): the rotation at each position, made by rope.py
    sin: Tensor  # fp32 (B, S, 1, R), with the minus of the rotation at even places
    rows: Tensor  # int64 (B, 1): 0 to B - 1; with `positions` it addresses the cache
    starts_rows: bool = False  # True: the first tokens of their rows, which need no earlier keys
    # Which slots a token sees. At most one of the two is made: the one that the strategy needs.
    mask: Tensor | None = None  # bool (B, 1, S, T)
    bias: Tensor | None = None  # fp32 (B, 1, S, T), to add to scores: 0, or -inf for a hidden slot
    multiply: Multiply = matmul  # the product with a projection's matrix: run/ways.py has another

    def write(self, cache: LayerCache, *new: Tensor) -> tuple[Tensor, ...]:
        """Write each `new` (B, S, ...) to its buffer (B, T, ...); returns tensors to attend to."""
        if len(new) != len(cache):
            raise ValueError(f"{len(new)} tensors are written; `entry` has {len(cache)}")
        for buffer, tensor in zip(cache, new, strict=True):
            buffer.index_put_((self.rows, self.positions), tensor.to(buffer.dtype))
        return new if self.starts_rows else cache


def visible(positions: Tensor, slots: int) -> Tensor:
    """The mask of tokens at `positions` (B, S): slots 0 to the token's own, bool (B, 1, S, T)."""
    slot = torch.arange(slots, device=positions.device)  # (T,)
    return (slot <= positions[..., None])[:, None]  # (B, S, T) -> (B, 1, S, T)


def bias_of(mask: Tensor) -> Tensor:
    """A mask as fp32 of the same shape: log(1) = 0 where it is True, log(0) = -inf elsewhere."""
    return mask.float().log()
