"""Whole numbers of a few bits, packed into bytes and words.

Shapes: out and in are a matrix's rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(q: Tensor) -> Tensor:
    """Numbers 0 to 15 (..., in) -> uint8 (..., ceil(in / 2)).

    The even column is in a byte's low half. An odd last column gets a neighbour of 0.
    """
    q = q.to(torch.uint8)
    if q.shape[-1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    return q[..., 0::2] | (q[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The inverse: uint8 (..., ceil(count / 2)) -> uint8 (..., count)."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :count]


def unpack_words(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 words (..., n) -> uint8 (..., n * 32 / bits), from the least significant bits on.

    `order` gives, for each of a word's numbers, the place where its bits are; None: in order.
    `bits` is 2, 4 or 8.
    """
    places = torch.tensor(order or range(32 // bits), device=words.device) * bits
    # int32 shifts keep the sign; the mask takes away what that adds.
    numbers = (words[..., None] >> places.to(torch.int32)) & (2**bits - 1)
    return numbers.flatten(-2).to(torch.uint8)


def pack_words(numbers: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The inverse of `unpack_words`: numbers (..., n) -> int32 (..., n * bits / 32)."""
    places = torch.tensor(order or range(32 // bits), device=numbers.device) * bits
    spread = numbers.long().unflatten(-1, (-1, 32 // bits)) << places
    word = spread.sum(dim=-1)  # 0 to 2^32 - 1
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)
