"""The static cache: allocated once for B rows of T tokens, so shapes and addresses never change.

Each row has a length of its own (ragged batches). What lies behind a row's length is garbage that
the mask hides: padding and rejected drafts are overwritten by the tokens that come to stand there.

Shapes: B rows, T tokens of capacity, H heads, C latent, R rope.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1.model.config import Config

LayerCache = tuple[Tensor, ...]
"""One layer's tensors, each (B, T, ...): the latent (B, T, C + R), or naive attention's keys and
values of every head."""


def token_shapes(config: Config, full: bool) -> list[tuple[int, ...]]:
    """What one token leaves in one layer: the latent, or (`full`) the keys and values of every
    head."""
    if full:
        return [
            (config.attention.num_attention_heads, config.attention.qk_head_dim),
            (config.attention.num_attention_heads, config.attention.v_head_dim),
        ]
    return [(config.attention.latent_dim,)]


def bytes_per_token(
    config: Config, dtype: torch.dtype, full: bool, layers: int | None = None
) -> int:
    """Bytes that one token occupies in `layers` layers (default: the model's, without MTP's)."""
    elements = sum(torch.Size(shape).numel() for shape in token_shapes(config, full))
    return elements * dtype.itemsize * (config.num_hidden_layers if layers is None else layers)


class Cache:
    """The cache of `layers` layers. `lengths`, int64 (B,), counts each row's tokens and lives on
    the device."""

    def __init__(
        self,
        config: Config,
        rows: int,
        capacity: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        full: bool,
        layers: int,
    ) -> None:
        self.rows, self.capacity = rows, capacity
        # Zeros, so that what is hidden is finite: a masked probability of 0 times NaN would be NaN.
        self.layers: list[LayerCache] = [
            tuple(
                torch.zeros(rows, capacity, *s, dtype=dtype, device=device)
                for s in token_shapes(config, full)
            )
            for _ in range(layers)
        ]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.graphs: dict[tuple[Any, ...], Any] = {}
        """Captured steps by what they do and in which shape: bound to these addresses, they live as
        long as the cache."""

    def reset(self) -> None:
        """Forget everything, also what an overflow may have left."""
        self.lengths.zero_()
        for tensor in (t for layer in self.layers for t in layer):
            tensor.zero_()

    def head(self, rows: int, tokens: int) -> list[LayerCache]:
        """Views of the first `tokens` slots of the first `rows` rows, in every layer."""
        return [tuple(tensor[:rows, :tokens] for tensor in layer) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.layers for t in layer)
