"""Matrices that multiply the same input, stored one above the other as a single matrix.

One product then reads the input once, where two would read it twice and be two launches. The
model's pages name each matrix by itself; only `products` knows that some are joined.

Shapes: out and in are a matrix's rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from r1.storage.dense import Dense
from r1.storage.matrix import Matrix


class Part(Matrix):
    """The rows `start` to `stop` of a joined matrix."""

    def __init__(self, whole: Matrix, start: int, stop: int) -> None:
        super().__init__()
        self.whole, self.start, self.stop = whole, start, stop
        self.shape = torch.Size((*whole.shape[:-2], stop - start, whole.shape[-1]))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.whole.dense(dtype)[..., self.start : self.stop, :]

    def stored(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        first, last, _ = rows.indices(self.stop - self.start)
        return self.whole.stored(slice(self.start + first, self.start + last))

    @property
    def nbytes(self) -> int:
        """This part's share of the whole."""
        return self.whole.nbytes * (self.stop - self.start) // self.whole.shape[-2]


def join(*matrices: Matrix) -> list[Part]:
    """Copy dense matrices of one input size into a single one; returns its parts, in order."""
    whole = Dense(torch.cat([matrix.dense() for matrix in matrices], dim=-2))
    parts, start = [], 0
    for matrix in matrices:
        parts.append(Part(whole, start, start + matrix.shape[-2]))
        start = parts[-1].stop
    return parts


def products(product: Callable[[Matrix], Tensor], matrices: Sequence[Matrix]) -> Sequence[Tensor]:
    """`product` of each matrix, (..., out) each; where they are joined, one product, split."""
    whole = matrices[0].whole if isinstance(matrices[0], Part) else None
    if whole is None:
        return [product(matrix) for matrix in matrices]
    for matrix in matrices[1:]:
        if not isinstance(matrix, Part) or matrix.whole is not whole:
            return [product(matrix) for matrix in matrices]
    # Tensor.split would come here too, but by a function of torch's in Python.
    return product(whole).split_with_sizes([matrix.shape[-2] for matrix in matrices], dim=-1)
