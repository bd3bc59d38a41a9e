"""Fixed-point vectors: a token, or a few, times numbers of 4 bits, by whole numbers.

To make fp32 of each number costs more instructions than a chip has in the time that 4 bits take to
be read. But chips add up four products of bytes in one instruction (dp4a). So a small kernel first
makes x a vector of whole numbers of 16 bits, as two bytes each: x = scale (256 high + low). Sums of
products are then exact, in int32, and each block of x is rounded finer than its largest number is
in bf16 (2^-16 of it against 2^-9).

A word of weights has the columns 8 k, 8 k + 1, ... 8 k + 7, the even ones in the low halves of its
bytes. So x has four planes of words: the high bytes of its even columns, of its odd ones, the low
bytes of its even columns, of its odd ones.

Shapes: N tokens, `length` numbers of each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.chip import INTERPRETED, Chip, ceil_div, let_next_start, wait_for_previous
from r1.kernels.tiles import BITS, Operand

BLOCK = tl.constexpr(128)
"""Numbers of x that have one scale."""
GROUP = tl.constexpr(32)
"""Columns that are summed as whole numbers: a sum of products with 4 bits is below 2^24, which
fp32 holds. The weights of a group have one scale, too."""
LARGEST = tl.constexpr(32512.0)
"""256 * 127: both bytes are signed."""


class Fixed(NamedTuple):
    """A vector of each token, as a kernel's argument."""

    planes: Tensor
    """int32 (N, 4, length / 8)."""
    scales: Tensor
    """fp32 (N, length / GROUP, 2): each group's scale, and the sum of its whole numbers.

    Side by side, so that a thread loads those of its own group, and not of four groups at once."""


def fits(chip: Chip, x: Tensor, *operands: Operand | None) -> bool:
    """Whether the product of x (..., length) with these matrices is so computed.

    (fp32 has more bits than fixed-point numbers keep.)
    """
    return (
        chip.byte_products
        and x.itemsize == 2
        and x.shape[-1] % GROUP.value == 0
        and all(
            w.FORMAT.value == "int4" and w.PER.value == 8 and w.TOGETHER.value == GROUP.value
            for w in operands
            if w is not None
        )
    )


def storage_sizes(chip: Chip, x: Tensor, *operands: Operand | None) -> tuple[int, ...]:
    """For launch parameters: nothing for dense matrices; the bits of packed numbers; and a 1 after
    them where these are multiplied by a fixed-point vector.
    """
    bits = BITS.get(next(w for w in operands if w is not None).FORMAT.value)
    if bits is None:
        return ()
    return (bits, 1) if fits(chip, x, *operands) else (bits,)


def fix(
    chip: Chip, x: Tensor, norm: Tensor | None = None, eps: float = 0.0, early: bool = False
) -> Fixed:
    """x (N, length), RMS-normed first with the gain `norm` (length,) if there is one.

    `early`: the next kernel may start at once. It reads nothing but weights before its own wait.
    """
    tokens, length = x.shape
    planes = x.new_empty(tokens, 4, length // 8, dtype=torch.int32)
    scales = x.new_empty(tokens, length // GROUP.value, 2, dtype=torch.float32)
    programs = ceil_div(length, 8 * BLOCK.value)
    chip.run(
        fix_kernel, (programs, tokens), x, x.stride(0), norm, eps, planes, scales, LENGTH=length,
        BLOCKS=8, EARLY=early, warps=4,
    )  # fmt: skip
    return Fixed(planes, scales)


@triton.jit
def fix_kernel(
    x, x_stride, norm, eps, planes, scales, LENGTH: tl.constexpr, BLOCKS: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of one token's vector."""
    size: tl.constexpr = BLOCKS * BLOCK
    token = tl.program_id(1).to(tl.int64)
    x += token * x_stride
    if EARLY:
        let_next_start(PDL)
    first = tl.program_id(0) * size
    word = first // 8 + tl.arange(0, size // 8)
    at = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    if norm is not None:  # the gain is a weight: it doesn't need the wait
        gain = tl.load(norm + at, mask=at < LENGTH, other=0.0)
    wait_for_previous(PDL)
    if not EARLY:
        let_next_start(PDL)
    v = tl.load(x + at, mask=at < LENGTH, other=0.0).to(tl.float32)  # (words, 8)
    if norm is not None:
        squares = tl.zeros((size,), tl.float32)
        for start in range(0, LENGTH, size):
            column = start + tl.arange(0, size)
            u = tl.load(x + column, mask=column < LENGTH, other=0.0).to(tl.float32)
            squares += u * u
        v *= tl.rsqrt(tl.sum(squares, axis=0) / LENGTH + eps)
        v *= gain.to(tl.float32)
    blocks = tl.reshape(v, (BLOCKS, BLOCK))
    largest = tl.max(tl.abs(blocks), axis=1)
    scale = largest / LARGEST + tl.sum(blocks * 0.0, axis=1)  # NaN and infinity stay
    shrink = LARGEST / tl.where(largest > 0.0, largest, 1.0)
    whole = tl.floor(blocks * shrink[:, None] + 0.5).to(tl.int32)
    high = (whole + 128) >> 8
    low = whole - (high << 8)
    place = planes + token * (LENGTH // 2) + word
    store_planes(place, tl.reshape(high, (size // 8, 4, 2)), word, LENGTH)
    store_planes(place + LENGTH // 4, tl.reshape(low, (size // 8, 4, 2)), word, LENGTH)
    groups: tl.constexpr = BLOCK // GROUP
    total = tl.sum(tl.reshape(whole, (BLOCKS, groups, GROUP)), axis=2).to(tl.float32)
    group = first // GROUP + tl.reshape(tl.arange(0, size // GROUP), (BLOCKS, groups))
    place = scales + token * (LENGTH // GROUP * 2) + 2 * group
    inside = group < LENGTH // GROUP
    tl.store(place, tl.broadcast_to(scale[:, None], (BLOCKS, groups)), mask=inside)
    tl.store(place + 1, total, mask=inside)


@triton.jit
def store_planes(place, numbers, word, LENGTH: tl.constexpr):
    """Bytes (words, 4, 2) become two planes: of the even columns, and of the odd ones."""
    shift = 8 * tl.arange(0, 4)[None, :]
    even, odd = tl.split(numbers & 255)
    inside = word < LENGTH // 8
    tl.store(place, tl.sum(even << shift, axis=1), mask=inside)
    tl.store(place + LENGTH // 8, tl.sum(odd << shift, axis=1), mask=inside)


@triton.jit
def load_fixed(x, token, word, group, inside, some, LENGTH: tl.constexpr):
    """A token's words and groups, as `times_fixed` takes them; `inside` and `some` mask them."""
    place = x.planes + token * (LENGTH // 2) + word
    scale = x.scales + token * (LENGTH // GROUP * 2) + 2 * group
    return (
        tl.load(place, inside, 0),
        tl.load(place + LENGTH // 8, inside, 0),
        tl.load(place + LENGTH // 4, inside, 0),
        tl.load(place + LENGTH // 8 * 3, inside, 0),
        tl.load(scale, some, 0.0),
        tl.load(scale + 1, some, 0.0),
    )


@triton.jit
def columns_fixed(x, token, start, LENGTH: tl.constexpr, COLUMNS: tl.constexpr):
    """A token's columns from `start` on, (1, ...): zeros beyond the last."""
    word = start // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    group = start // GROUP + tl.arange(0, COLUMNS // GROUP)[None, :]
    return load_fixed(x, token, word, group, word < LENGTH // 8, group < LENGTH // GROUP, LENGTH)


@triton.jit
def slots_fixed(
    h, token, slot, start, LENGTH: tl.constexpr, CHOSEN: tl.constexpr, INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns from `start` on of each of a token's slots, (1, slots, ...)."""
    first, real = slot[None, :, None] * INNER + start, (slot < CHOSEN)[None, :, None]
    word = 8 * tl.arange(0, COLUMNS // 8)[None, None, :]
    group = GROUP * tl.arange(0, COLUMNS // GROUP)[None, None, :]
    inside, some = real & (start + word < INNER), real & (start + group < INNER)
    at, of = (first + word) // 8, (first + group) // GROUP
    return load_fixed(h, token, at, of, inside, some, LENGTH)


PRODUCTS = tl.constexpr(
    """{
    .reg .b32 even, odd, sum;
    and.b32 even, $1, 0x0F0F0F0F;
    shr.u32 odd, $1, 4;
    and.b32 odd, odd, 0x0F0F0F0F;
    dp4a.u32.s32 sum, even, $2, 0;
    dp4a.u32.s32 sum, odd, $3, sum;
    shl.b32 sum, sum, 8;
    dp4a.u32.s32 sum, even, $4, sum;
    dp4a.u32.s32 $0, odd, $5, sum;
    }"""
)


@triton.jit
def times_fixed(loaded, v, w):
    """`times` (tiles.py) with a fixed-point vector: fp32 (..., C / GROUP)."""
    words, factor, off = loaded
    even_high, odd_high, even_low, odd_low, scale, total = v
    if INTERPRETED:
        sums = 256 * (four(words, even_high) + four(words >> 4, odd_high))
        sums += four(words, even_low) + four(words >> 4, odd_low)
    else:
        sums = tl.inline_asm_elementwise(
            PRODUCTS, "=r,r,r,r,r,r", [words, even_high, odd_high, even_low, odd_low],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    each: tl.constexpr = GROUP // w.PER
    if len(sums.shape) == 3:
        split = tl.reshape(sums, (sums.shape[0], sums.shape[1], sums.shape[2] // each, each))
    else:
        split = tl.reshape(sums, (sums.shape[0], sums.shape[1] // each, each))
    whole = tl.sum(split, axis=len(sums.shape)).to(tl.float32)
    zero = off if w.ZEROS else 8.0
    return (whole - zero * total) * (factor * scale)


@triton.jit
def four(words, v):
    """The sum of 4 products: the low halves of a word's bytes by the bytes of `v`, int32."""
    return (
        (words & 15) * (v << 24 >> 24)
        + ((words >> 8) & 15) * (v << 16 >> 24)
        + ((words >> 16) & 15) * (v << 8 >> 24)
        + ((words >> 24) & 15) * (v >> 24)
    )
