"""A matrix object: a weight that is multiplied, however it lies in memory.

Whoever multiplies by a weight asks its matrix object and never looks inside. So a new storage is
one class: it must give `dense`; the other methods are made of that one, and a class overrides those
that it can do better.

Shapes: out and in are a matrix's rows and columns; E experts, n chosen matrices, M sorted rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r1.storage.grouped import grouped_mm
from r1.storage.spec import Spec


class Matrix(nn.Module):
    """A weight of shape (out, in), or (E, out, in): one for each expert.

    It is a module, so its tensors (parameters or buffers) move and are counted with the model's.
    """

    shape: torch.Size
    spec: Spec | None = None  # how packed numbers are to be read (spec.py); None: it is plain
    unpacked_bytes: int = 0  # what making one number dense takes for a time, beside the result
    joint: Any = None  # the Joint (joined.py) of a matrix that is stored as a part of another one

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight, (out, in) or (E, out, in), in `dtype` (None: the model's own)."""
        raise NotImplementedError(f"{type(self).__name__} must define dense(dtype)")

    def matmul(self, x: Tensor) -> Tensor:
        """x W^T: (..., in) -> (..., out)."""
        return F.linear(x, self.dense(x.dtype))

    def through(self, product: Callable[[Matrix], Tensor]) -> Tensor:
        """What `product` multiplies by this matrix, (..., out). It may be given a part of the rows,
        where devices share them.
        """
        return product(self)

    def one(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix of one expert, (out, in)."""
        return self.dense(dtype)[index]

    def pick(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Entries of the first dimension, int64 (n,): experts (n, out, in), or rows (n, in)."""
        return self.dense(dtype).index_select(0, ids)

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """Each row of x (M, in) times its expert's matrix -> (M, out).

        The rows are sorted by expert: expert e owns rows ends[e - 1] to ends[e], int32 (E,).
        """
        return grouped_mm(x, self.dense(x.dtype), ends)

    def stored(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        """The tensors that hold these rows, as views, named as a checkpoint names them.

        Loading copies a checkpoint's `NAME.weight` to "weight", and so on. Saving reads them.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define stored(rows)")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.shape))
