"""Packed numbers become fp32 in registers: "unpack these words of W".

A thread loads words of 32 bits (narrower ones, where rows are no whole number of those), and each
word becomes numbers that lie side by side. A product with a vector multiplies first, adds up the
columns that share a scale, and scales the few sums.

NVIDIA chips from sm_89 on (`Operand.PTX`) do it in fewer instructions. A product with one token has
no more than some ten for each number, before the arithmetic takes longer than the bytes.

| format | by the chip | by plain operations |
|---|---|---|
| fp8 | cvt: two numbers become fp16 | its bits are those of an fp16 number, a 256th of it |
| int8 | prmt puts a byte below 2^23 | the same with a shift and two bit operations |
| int4 | lop3 puts half a byte below 2^23, fma shifts it | likewise |

A number n below 2^23 in the lowest bits of the fp32 number 2^23 makes it 2^23 + n. That is two
operations at full speed, where a chip converts integers at a quarter of it.

Shapes: (..., W) words; (..., C) numbers, `PER` of each word; one scale for each TOGETHER columns.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

MAGIC = tl.constexpr(0x4B000000)
"""The bits of 2^23."""


def _bits(number: float) -> str:
    """An fp32 constant, as PTX spells it."""
    return f"0f{struct.unpack('>I', struct.pack('>f', number))[0]:08X}"


def _halves(zero: int) -> str:
    """PTX: the 8 halves of the bytes of a word, less `zero`.

    Half number i of 16 bits stands 4 i bits too high: the fma divides by this, too.
    """
    lines = [".reg .b32 high, t;", "shr.b32 high, $8, 16;"]
    for number in range(8):
        word, place = ("$8", number) if number < 4 else ("high", number - 4)
        step = 2.0 ** (-4 * place)
        lines.append(f"lop3.b32 t, {word}, {15 << 4 * place:#x}, {MAGIC.value:#x}, 0xea;")
        lines.append(f"fma.rn.f32 ${number}, t, {_bits(step)}, {_bits(-(2**23) * step - zero)};")
    return "{" + "\n".join(lines) + "}"


def _bytes() -> str:
    """PTX: the 4 bytes of a word, as unsigned numbers, less 128."""
    lines = [".reg .b32 t;"]
    for number in range(4):
        lines.append(f"prmt.b32 t, $4, {MAGIC.value:#x}, {0x7650 + number:#x};")
        lines.append(f"add.f32 ${number}, t, {_bits(-(2.0**23) - 128)};")
    return "{" + "\n".join(lines) + "}"


HALVES, HALVES_LESS_8, BYTES = (tl.constexpr(text) for text in (_halves(0), _halves(8), _bytes()))
E4M3 = tl.constexpr(
    """{
    .reg .b16 a, b, c, d;
    .reg .b32 low, high;
    mov.b32 {a, b}, $4;
    cvt.rn.f16x2.e4m3x2 low, a;
    cvt.rn.f16x2.e4m3x2 high, b;
    mov.b32 {a, b}, low;
    mov.b32 {c, d}, high;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
    }"""
)
FOUR, EIGHT = tl.constexpr("=r,=r,=r,=r,r"), tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r")
"""The operands of these: the numbers, then the word."""


@triton.jit
def load_words(place, stride, row, real, column, first, limit, w):
    """The words of a tile of packed numbers: see load_tile in tiles.py for rows and columns."""
    # Compared as words, the mask is the same for four words side by side: then a thread loads them
    # in one instruction.
    word = first // w.PER + along(
        tl.arange(0, column.shape[len(column.shape) - 1] // w.PER), column
    )
    inside = real & (word < (limit + w.PER - 1) // w.PER)
    return tl.load(place + row * stride + word, inside, 0)


@triton.jit
def unpack(words, w):
    """int (..., W) -> fp32 (..., C): the numbers of W before scales and zero points. (Of fp8, where
    the chip does not do it, a 256th of them. Of int4 without zero points they are less 8.)
    """
    if w.PER == 8:
        if w.PTX:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                HALVES if w.ZEROS else HALVES_LESS_8, EIGHT, [words],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32,
                       tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True, pack=1,
            )  # fmt: skip
        else:
            a, b, c, d = one(words, 0, w), one(words, 1, w), one(words, 2, w), one(words, 3, w)
            e, f, g, h = one(words, 4, w), one(words, 5, w), one(words, 6, w), one(words, 7, w)
        even = tl.join(tl.join(a, e), tl.join(c, g))
        odd = tl.join(tl.join(b, f), tl.join(d, h))
        tile = tl.join(even, odd)
    elif w.PER == 4:
        if w.PTX:
            if w.FORMAT == "int8":
                words ^= -0x7F7F7F80  # each byte's highest bit: -128 to 127 become 0 to 255
            a, b, c, d = tl.inline_asm_elementwise(
                E4M3 if w.FORMAT == "fp8" else BYTES, FOUR, [words],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            a, b, c, d = one(words, 0, w), one(words, 1, w), one(words, 2, w), one(words, 3, w)
        tile = tl.join(tl.join(a, c), tl.join(b, d))
    elif w.PER == 2:
        tile = tl.join(one(words, 0, w), one(words, 1, w))
    else:
        tile = one(words, 0, w)
    return columns_of(tile, words, w.PER)


@triton.jit
def one(words, NUMBER: tl.constexpr, w):
    """Number NUMBER of each word, by plain operations."""
    if w.FORMAT == "int4":
        n = (words.to(tl.int32) >> (4 * NUMBER)) & 15
        LESS: tl.constexpr = 0.0 if w.ZEROS else 8.0
        number = (n | MAGIC).to(tl.float32, bitcast=True) - (8388608.0 + LESS)
    elif w.FORMAT == "int8":
        n = ((words.to(tl.int32) >> (8 * NUMBER)) & 255) ^ 128
        number = (n | MAGIC).to(tl.float32, bitcast=True) - (8388608.0 + 128.0)
    else:
        # e4m3 is SEEEEMMM and fp16 SEEEEEMMMMMMMMMM, with exponents biased by 7 and 15. So the same
        # bits are a 256th of the number.
        n = words.to(tl.int32) >> (8 * NUMBER)
        bits = ((n & 0x80) << 8) | ((n & 0x7F) << 7)
        number = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return number


@triton.jit
def unpacked(loaded, w):
    """The numbers of a tile that `load` (tiles.py) has loaded, less their zero points, and its
    scales. Dense numbers stay as they are.
    """
    numbers, factor, off = loaded
    if w.FORMAT != "dense":
        numbers = unpack(numbers, w)
        if w.ZEROS:
            less = by_columns(numbers, numbers.numel // factor.numel)
            numbers = tl.reshape(less - tl.expand_dims(off, len(off.shape)), numbers.shape)
    return numbers, factor


@triton.jit
def times_unpacked(tile, v, w):
    """`times` (tiles.py) of a tile that `unpacked` has made once, for several vectors."""
    numbers, factor = tile
    if w.FORMAT == "dense":
        sums = numbers.to(tl.float32) * v
    else:
        N: tl.constexpr = numbers.numel // factor.numel
        sums = tl.sum(by_columns(numbers * v, N), axis=len(numbers.shape)) * factor
    return sums


@triton.jit
def columns_of(tile, words, PER: tl.constexpr):
    """(..., W, 2, ..., 2) -> (..., W PER)."""
    if len(words.shape) == 3:
        flat = tl.reshape(tile, (words.shape[0], words.shape[1], words.shape[2] * PER))
    else:
        flat = tl.reshape(tile, (words.shape[0], words.shape[1] * PER))
    return flat


@triton.jit
def by_columns(tile, N: tl.constexpr):
    """(..., C) -> (..., C / N, N)."""
    if len(tile.shape) == 3:
        split = tl.reshape(tile, (tile.shape[0], tile.shape[1], tile.shape[2] // N, N))
    else:
        split = tl.reshape(tile, (tile.shape[0], tile.shape[1] // N, N))
    return split


@triton.jit
def along(numbers, column):
    """One dimension of numbers, made to lie as `column` lies: along the last dimension."""
    return numbers[None, None, :] if len(column.shape) == 3 else numbers[None, :]
