"""The static cache: allocated once for B rows of T slots, so shapes and addresses never change.

A slot holds one token. Each row has its own length (ragged batches). The slots after it may hold
padding or rejected drafts (r1/run). Masks hide these, and the row's next tokens replace them.

Shapes: B rows, T slots of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LayerCache = tuple[Tensor, ...]
"""One layer's tensors, each (B, T, ...): what its attention keeps of a token."""

Entry = Sequence[tuple[int, ...]]
"""The shapes that one token leaves in one layer; an attention strategy says which (attend.py)."""


def bytes_per_token(entry: Entry, dtype: torch.dtype, layers: int) -> int:
    """Bytes that one token occupies in `layers` layers."""
    return sum(torch.Size(shape).numel() for shape in entry) * dtype.itemsize * layers


class Cache:
    """The cache of several layers. `lengths`, int64 (B,), counts the tokens of each row; `numbers`
    (B, 1) are the rows' own.
    """

    def __init__(
        self, entry: Entry, rows: int, capacity: int, layers: int, *,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.rows, self.capacity = rows, capacity
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.numbers = torch.arange(rows, device=device)[:, None]
        self.layers: list[LayerCache] = []
        self.extend(entry, layers, dtype)
        self.graphs: dict[tuple[Any, ...], Any] = {}
        """CUDA graphs that use this cache's addresses, by their kind and shapes. Freed with it."""

    def extend(self, entry: Entry, layers: int, dtype: torch.dtype) -> None:
        """Add layers after the others: those of a model that shares the rows and their lengths."""
        device = self.lengths.device
        self.layers += [
            tuple(_empty(self.rows, self.capacity, each, dtype, device) for each in entry)
            for _ in range(layers)
        ]

    def reset(self) -> None:
        """Set all lengths and entries to 0."""
        self.lengths.zero_()
        for tensor in (tensor for layer in self.layers for tensor in layer):
            tensor.zero_()

    def first(self, rows: int, tokens: int) -> list[LayerCache]:
        """Views of the first `tokens` slots of the first `rows` rows, in every layer."""
        return [tuple(tensor[:rows, :tokens] for tensor in layer) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


def _empty(
    rows: int, capacity: int, each: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One tensor of a layer, (B, T, *each).

    Zeros, so that hidden slots are finite: a probability of 0 times NaN would be NaN. The slots of
    one head lie side by side in memory, so that a product can read a head's keys in place.
    """
    *heads, size = each
    memory = torch.zeros(rows, *heads, capacity, size, dtype=dtype, device=device)
    return memory.movedim(-2, 1)
