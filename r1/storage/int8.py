"""Whole numbers of 8 bits, with a scale for each row, for each block, or for a group of columns.

Shapes: out and in are a matrix's rows and columns; E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.storage.quantized import Quantized


class Int8(Quantized):
    """q is int8 (..., out, in), as it is: -128 to 127. Zero points, where there are some, int16."""

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
