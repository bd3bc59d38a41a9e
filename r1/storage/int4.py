"""Whole numbers of 4 bits, two in a byte, with a scale for each group of columns of a row.

Shapes: out and in are a matrix's rows and columns; E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.storage.packing import pack_nibbles, unpack_nibbles
from r1.storage.quantized import Quantized


class Int4(Quantized):
    """q is uint8 (..., out, ceil(in / 2)): numbers 0 to 15, the even column in a byte's low half.

    A weight is (q - 8) * scale, or (q - zero) * scale with zero points, uint8. A row's bytes lie
    side by side, so threads that read one row along `in` read whole lines of memory. Scales and
    zero points are (..., out, groups), in the same order, beside it. These bytes are those of
    compressed-tensors' `pack-quantized` (its int32 words, read as little-endian bytes), so the most
    frequent published format is loaded without being repacked. A kernel that wants words views them
    as int32 where `in` is a multiple of 8. It may take low and high halves as two tiles, of even
    and odd columns of x: the order of a sum does not matter.
    """

    KIND = "int4"
    NAMES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")

    @staticmethod
    def pack(q: Tensor) -> Tensor:
        return pack_nibbles(q)

    @staticmethod
    def unpack(q: Tensor, columns: int) -> Tensor:
        return unpack_nibbles(q, columns)

    @staticmethod
    def packed_shape(shape: tuple[int, ...]) -> tuple[tuple[int, ...], torch.dtype]:
        return (*shape[:-1], -(-shape[-1] // 2)), torch.uint8
