"""Fixed-point vectors: a token, or a few, times numbers of 4 bits, by whole numbers.

To make fp32 of each number costs more instructions than a chip has in the time that 4 bits take to
be read. But chips add up four products of bytes in one instruction (dp4a). So x first becomes a
vector of whole numbers of 16 bits, as two bytes each: x = scale (256 high + low). Sums of products
are then exact, in int32, and each group of x is rounded finer than its largest number is in bf16
(2^-16 of it against 2^-9).

Kernels that make such an x may store it so (`store_fixed`): the router's, and the last one of the
attention. Elsewhere a small kernel does (`fix`): where x is normed first, and for inner values,
of which a program makes only a few.

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
from r1.storage import activations

GROUP = tl.constexpr(32)
"""Numbers of x that have one scale, and are summed as whole numbers: a sum of their products with 4
bits is below 2^24, which fp32 holds. The weights of a group have one scale, too."""
COLUMNS = 1024
"""Numbers that a program of `fix_kernel` takes."""
LARGEST = tl.constexpr(32512.0)
"""256 * 127: both bytes are signed."""


class Fixed(NamedTuple):
    """A vector of each token, as a kernel's argument."""

    planes: Tensor
    """int32 (N, 4, length / 8)."""
    scales: Tensor
    """fp32 (N, length / GROUP, 2): each group's scale, and the sum of its whole numbers. (Products
    by matrix units have larger groups: experts_bytes.py.)

    Side by side, so that a thread loads those of its own group, and not of four groups at once."""

    @staticmethod
    def empty(like: Tensor, tokens: int, length: int, group: int = GROUP.value) -> Fixed:
        """Memory for the vectors, on the device of `like`."""
        return Fixed(
            like.new_empty(tokens, 4, length // 8, dtype=torch.int32),
            like.new_empty(tokens, length // group, 2, dtype=torch.float32),
        )


def fits(chip: Chip, x: Tensor, length: int, *operands: Operand | None) -> bool:
    """Whether products of vectors of `length` numbers, in x's dtype, with these matrices are so
    computed.

    (fp32 has more bits than fixed-point numbers keep.)
    """
    return (
        chip.byte_products
        and x.itemsize == 2
        and length % GROUP.value == 0
        and all(
            w.FORMAT.value == "int4" and w.PER.value == 8 and w.TOGETHER.value == GROUP.value
            for w in operands
            if w is not None
        )
    )


def storage_sizes(
    chip: Chip, x: Tensor, length: int, *operands: Operand | None, round_x: bool = False
) -> tuple[int, ...]:
    """For launch parameters: nothing for dense matrices; the bits of packed numbers; then a 1 where
    they are multiplied by a fixed-point vector (see `fits`), or else a 0; then the step of products
    by the matrix units (narrow.py); then a 1 where x is to be one narrow number (`round_x`) and can
    be. Zeros at the end are left out.
    """
    given = [w for w in operands if w is not None]
    kind = given[0].FORMAT.value
    if kind not in BITS:
        return ()
    fixed, step = fits(chip, x, length, *given), 0
    if fixed or (kind == "fp8" and chip.ptx and x.itemsize == 2):
        words = all(w.FORMAT.value == kind and w.weight.itemsize == 4 for w in given)
        multiples = (length, *(w.WIDE.value for w in given))
        step = next((n for n in (128, 64) if words and all(m % n == 0 for m in multiples)), 0)
    if round_x and kind == "fp8" and step == activations.GROUP:
        return (BITS[kind], 0, step, 1)
    sizes = (BITS[kind], int(fixed), step)
    return sizes if step else sizes[: 1 + fixed]


def fix(
    chip: Chip, x: Tensor, norm: Tensor | None = None, eps: float = 0.0, group: int = GROUP.value
) -> Fixed:
    """x (N, length), RMS-normed first with the gain `norm` (length,) if there is one. `group`
    numbers have one scale.

    The next kernel may start at once. Before its own wait it reads weights, and no output that is
    younger than the previous kernel's wait (`down_vector_kernel`: the choice of experts).
    """
    tokens, length = x.shape
    fixed = Fixed.empty(x, tokens, length, group)
    chip.run(
        fix_kernel, (ceil_div(length, COLUMNS), tokens), x, x.stride(0), norm, eps, fixed,
        LENGTH=length, BLOCK=COLUMNS, EACH=group, warps=4,
    )  # fmt: skip
    return fixed


@triton.jit
def fix_kernel(
    x, x_stride, norm, eps, fixed, LENGTH: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one token's vector."""
    let_next_start(PDL)
    token, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK
    v = ready_columns(x + token * x_stride, norm, eps, first, LENGTH, BLOCK, PDL)
    store_fixed(fixed, v, token, 1, first, LENGTH, LENGTH, EACH)


@triton.jit
def ready_columns(
    x, norm, eps, first, LENGTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """BLOCK columns of a token x from `first` on, fp32 (1, BLOCK), normed if there is a `norm`.

    It waits for the previous kernel. The gain is a weight: it doesn't need that.
    """
    column = tl.arange(0, BLOCK)[None, :]
    at = first + column
    if norm is not None:
        gain = tl.load(norm + at, mask=at < LENGTH, other=0.0)
    wait_for_previous(PDL)
    v = tl.load(x + at, mask=at < LENGTH, other=0.0).to(tl.float32)
    if norm is not None:
        squares = tl.zeros((1, BLOCK), tl.float32)
        for start in range(0, LENGTH, BLOCK):
            inside = start + column < LENGTH
            u = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
            squares += u * u
        v *= tl.rsqrt(tl.sum(squares) / LENGTH + eps)
        v *= gain.to(tl.float32)
    return v


@triton.jit
def store_fixed(
    fixed, v, token, tokens, first, end, LENGTH: tl.constexpr, EACH: tl.constexpr = GROUP
):
    """Round some numbers, and store them in the vectors of `fixed`.

    `v`, fp32 (T, C), has the columns from `first` on of T tokens from number `token` on, zeros
    where there is none: columns from `end` on and tokens from `tokens` on are not stored. C and
    `first` are multiples of EACH, the numbers that have one scale.
    """
    T: tl.constexpr = v.shape[0]
    WORDS: tl.constexpr = v.shape[1] // 8
    GROUPS: tl.constexpr = v.shape[1] // EACH
    groups = tl.reshape(v, (T, GROUPS, EACH))
    largest = tl.max(tl.abs(groups), axis=2)
    scale = largest / LARGEST + tl.sum(groups * 0.0, axis=2)  # NaN and infinity stay
    shrink = LARGEST / tl.where(largest > 0.0, largest, 1.0)
    whole = tl.floor(groups * shrink[:, :, None] + 0.5).to(tl.int32)
    high = (whole + 128) >> 8
    low = whole - (high << 8)
    row = tl.arange(0, T)[:, None]
    word, group = tl.arange(0, WORDS)[None, :], tl.arange(0, GROUPS)[None, :]
    place = fixed.planes + token * (LENGTH // 2) + first // 8 + row * (LENGTH // 2) + word
    inside = (row < tokens) & (first + word * 8 < end)
    store_planes(place, tl.reshape(high, (T, WORDS, 4, 2)), inside, LENGTH)
    store_planes(place + LENGTH // 4, tl.reshape(low, (T, WORDS, 4, 2)), inside, LENGTH)
    numbers: tl.constexpr = LENGTH // EACH * 2  # of a token's scales
    place = fixed.scales + token * numbers + first // EACH * 2 + row * numbers + 2 * group
    inside = (row < tokens) & (first + group * EACH < end)
    tl.store(place, scale, mask=inside)
    tl.store(place + 1, tl.sum(whole, axis=2).to(tl.float32), mask=inside)


@triton.jit
def store_planes(place, numbers, inside, LENGTH: tl.constexpr):
    """Bytes (T, words, 4, 2) become two planes: of the even columns, and of the odd ones."""
    shift = 8 * tl.arange(0, 4)[None, None, :]
    even, odd = tl.split(numbers & 255)
    tl.store(place, tl.sum(even << shift, axis=2), mask=inside)
    tl.store(place + LENGTH // 8, tl.sum(odd << shift, axis=2), mask=inside)


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
    """Columns from `start` on of a token's slots (slots, 1, 1), of which the first CHOSEN are real:
    (slots, 1, ...).
    """
    real = slot < CHOSEN
    # Counted in words and in groups: then a thread loads four of them in one instruction.
    word = start // 8 + tl.arange(0, COLUMNS // 8)[None, None, :]
    group = start // GROUP + tl.arange(0, COLUMNS // GROUP)[None, None, :]
    inside, some = real & (word < INNER // 8), real & (group < INNER // GROUP)
    at, of = slot * (INNER // 8) + word, slot * (INNER // GROUP) + group
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
