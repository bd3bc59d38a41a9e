"""The inputs that all layers share in one call of the model.

Shapes: B rows, S tokens of a row, T slots of the cache that the call may see, R rope dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r1.model.cache import LayerCache


@dataclass
class Step:
    """Where the call's tokens stand, their rotation, and which keys each of them sees."""

    phase: str
    """"prefill" or "decode": selects one of the two strategies in each slot."""
    positions: Tensor
    """int64 (B, S): the place of each token in its row."""
    cos: Tensor
    sin: Tensor
    """fp32 (B, S, 1, R): the rotation at each position, as rope.py makes it."""
    rows: Tensor
    """int64 (B, 1): the number of each row. With `positions` it addresses the cache."""
    starts_rows: bool = False
    """True: these are the first tokens of their rows, and each sees itself and earlier ones.
    False: keys are read from the cache."""
    mask: Tensor | None = None
    """bool (B, 1, S, T): the slots that each token sees. Made for strategies that need "mask"."""
    bias: Tensor | None = None
    """The same as fp32 (B, 1, S, T) to add to scores, 0 or -inf. For those that need "bias"."""

    def write(self, cache: LayerCache, *new: Tensor) -> tuple[Tensor, ...]:
        """Write each `new` (B, S, ...) to its buffer (B, T, ...); returns the keys to attend to."""
        if len(new) != len(cache):
            writes = f"the strategy writes {len(new)} tensors of a token to the cache"
            raise ValueError(f"{writes}, and its `entry` names {len(cache)}")
        for buffer, tensor in zip(cache, new, strict=True):
            buffer.index_put_((self.rows, self.positions), tensor.to(buffer.dtype))
        return new if self.starts_rows else cache


def visible(positions: Tensor, slots: int) -> Tensor:
    """The mask of tokens at `positions` (B, S): slots 0 to the token's own, bool (B, 1, S, T)."""
    slot = torch.arange(slots, device=positions.device)  # (T,)
    return (slot <= positions[..., None])[:, None]


def bias_of(mask: Tensor) -> Tensor:
    """A mask as numbers to add to scores: 0 where it is True, -inf where not, fp32."""
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_fill(~mask, float("-inf"))
