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


@dataclass(frozen=True, eq=False)
class Joint:
    """The parts of one joined matrix, in order."""

    whole: Matrix
    parts: tuple[Part, ...]
    sizes: list[int]
    """Rows of each part."""


def join(*matrices: Matrix) -> tuple[Part, ...]:
    """Copy dense matrices of one input size into a single one; returns its parts, in order."""
    whole = Dense(torch.cat([matrix.dense() for matrix in matrices], dim=-2))
    sizes = [matrix.shape[-2] for matrix in matrices]
    ends = list(itertools.accumulate(sizes))
    parts = tuple(Part(whole, end - size, end) for size, end in zip(sizes, ends, strict=True))
    for part in parts:
        part.joint = Joint(whole, parts, sizes)
    return parts


def products(product: Callable[[Matrix], Tensor], *matrices: Matrix) -> Sequence[Tensor]:
    """`product` of each matrix, (..., out) each; where they are joined, one product, split."""
    joint = matrices[0].joint
    if joint is None or matrices != joint.parts:
        return [product(matrix) for matrix in matrices]
    return product(joint.whole).split_with_sizes(joint.sizes, dim=-1)
