"""Matrices that multiply the same input, stored one above the other as a single matrix.

One product then reads the input once, where two would read it twice and be two launches. The
model's pages name each matrix by itself; only `products` knows that some are joined.

Shapes: out and in are a matrix's rows and columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r1.storage.dense import Dense
from r1.storage.matrix import Matrix
from r1.storage.quantized import Quantized, stack_rows


class Part(Matrix):
    """The rows `start` to `stop` of a joined matrix."""

    def __init__(self, whole: Matrix, start: int, stop: int) -> None:
        super().__init__()
        self.whole, self.start, self.stop = whole, start, stop
        self.shape = torch.Size((*whole.shape[:-2], stop - start, whole.shape[-1]))
        self.unpacked_bytes = whole.unpacked_bytes

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.whole.dense(dtype)[..., self.start : self.stop, :]

    def one(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.whole.one(index, dtype)[self.start : self.stop]

    def pick(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if len(self.shape) == 2:  # rows
            return self.whole.pick(ids + self.start, dtype)
        return self.whole.pick(ids, dtype)[:, self.start : self.stop]

    def stored(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        first, last, _ = rows.indices(self.stop - self.start)
        return self.whole.stored(slice(self.start + first, self.start + last))

    @property
    def nbytes(self) -> int:
        """This part's share of the whole."""
        return self.whole.nbytes * (self.stop - self.start) // self.whole.shape[-2]


def whole_of(matrix: Matrix) -> Matrix:
    """The matrix that is stored: the joined one of a part, and of others themselves."""
    return matrix.whole if isinstance(matrix, Part) else matrix


@dataclass(eq=False)
class Joint:
    """The parts of one joined matrix, in order."""

    whole: Matrix
    parts: tuple[Part, ...]
    sizes: list[int]
    """Rows of each part."""

    def store(self, whole: Matrix) -> None:
        """Store the same numbers in another way."""
        self.whole = whole
        for part in self.parts:
            part.whole = whole


def join(*matrices: Matrix) -> tuple[Matrix, ...]:
    """Copy matrices of one input size and one storage into a single one; its parts, in order.

    Returns the matrices themselves where they can't be one: their storages differ, or a block that
    shares a scale would reach from one into the next.
    """
    whole = _whole(matrices)
    if whole is None:
        return matrices
    sizes = [matrix.shape[-2] for matrix in matrices]
    ends = list(itertools.accumulate(sizes))
    parts = tuple(Part(whole, end - size, end) for size, end in zip(sizes, ends, strict=True))
    for part in parts:
        part.joint = Joint(whole, parts, sizes)
    return parts


def _whole(matrices: Sequence[Matrix]) -> Matrix | None:
    """The matrices, one above the other, as one. None where that can't be."""
    if all(isinstance(matrix, Dense) for matrix in matrices):
        return Dense(torch.cat([matrix.dense() for matrix in matrices], dim=-2))
    quantized = [matrix for matrix in matrices if isinstance(matrix, Quantized)]
    return stack_rows(*quantized) if len(quantized) == len(matrices) else None


def products(product: Callable[[Matrix], Tensor], *matrices: Matrix) -> Sequence[Tensor]:
    """`product` of each matrix, (..., out) each; where they are joined, one product, split."""
    joint = matrices[0].joint
    if joint is None or matrices != joint.parts:
        return [product(matrix) for matrix in matrices]
    return product(joint.whole).split_with_sizes(joint.sizes, dim=-1)
