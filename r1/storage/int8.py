"""Whole numbers of 8 bits, with a scale for each row, for each block, or for a group of columns.

Shapes: out and in are a matrix's rows and columns; E experts, M rows of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.storage.grouped import expert_by_expert
from r1.storage.quantized import Quantized, product_dtype

FEW_ROWS = 4
"""Up to so many rows of x torch's own CPU operator is faster than widening the matrix."""
ALIGNMENT = 32
"""It reads so many columns at a time, also those beyond the end of a row."""


class Int8(Quantized):
    """q is int8 (..., out, in), as it is: -128 to 127. Zero points, where there are some, int16.

    With one scale for a row the scales are factored out of a product: x q^T is computed with whole
    numbers, which bf16 holds exactly, and then multiplied by the scales.
    """

    KIND = "int8"

    @staticmethod
    def pack(q: Tensor) -> Tensor:
        return q

    @staticmethod
    def unpack(q: Tensor, columns: int) -> Tensor:
        return q

    @staticmethod
    def packed_shape(shape: tuple[int, ...]) -> tuple[tuple[int, ...], torch.dtype]:
        return shape, torch.int8

    def _factors(self, dtype: torch.dtype) -> bool:
        """Whether scales can be factored out. Sums of whole numbers could exceed fp16's range."""
        alone = self.zero is None and self.group is None and dtype != torch.float16
        return alone and (self.spec.rows, self.spec.columns) == (1, 0)

    def matmul(self, x: Tensor) -> Tensor:
        dtype = product_dtype(x)
        if not self._factors(dtype):
            return super().matmul(x)
        y = product(x.to(dtype).flatten(0, -2), self.q, self.scale)
        return y.unflatten(0, x.shape[:-1])

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        dtype = product_dtype(x)
        if x.is_cuda or not self._factors(dtype):
            return super().grouped(x, ends)
        return _grouped(x.to(dtype), self.q, self.scale, ends)


def product(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x (M, in), int8 q (out, in), scale (out, 1) -> (M, out), in x's dtype."""
    few = x.dtype == torch.bfloat16 and not x.is_cuda and x.shape[0] <= FEW_ROWS
    if few and q.shape[1] % ALIGNMENT == 0:
        whole: Tensor = torch.ops.aten._weight_int8pack_mm(
            x.contiguous(), q.contiguous(), scale[:, 0].to(x.dtype)
        )
        return whole
    return (F.linear(x, q.to(x.dtype)) * scale[:, 0]).to(x.dtype)


@torch.library.custom_op("r1::grouped_int8", mutates_args=())
def _grouped(x: Tensor, q: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    return expert_by_expert(x, ends, q.shape[1], lambda rows, e: product(rows, q[e], scale[e]))


@_grouped.register_fake
def _(x: Tensor, q: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], q.shape[1])
