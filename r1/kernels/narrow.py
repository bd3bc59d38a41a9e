"""Products of packed weights by the matrix units, in numbers as narrow as the weights.

`tl.dot` of bf16 needs each packed number unpacked, converted and written to shared memory first.
Here weights of FP8 go into it as they are, and of 4 bits as bytes, after three bit operations for
eight of them. x is what must fit: each of its numbers becomes two narrow ones, and `tl.dot` gets
them as two columns, side by side. So nothing of x is lost that bf16 has, and a thread has the sums
of both columns, and joins them.

| weights | x = scale times | its columns | sums |
|---|---|---|---|
| int4 | 256 high + low, two bytes (fixed.py) | the even ones, then the odd ones | int32, exact |
| fp8 | high + low / 16, both e4m3 | in their order | fp32 |

Of FP8 weights x may be one e4m3 number (r1/storage/activations.py): half the products, and x has 4
bits left. EACH is how many numbers each one of x has become, 2 or 1.

Here x is made; narrow_products.py multiplies.

Shapes: N tokens of `length` numbers; programs have ROWS tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.chip import Chip, ceil_div, let_next_start
from r1.kernels.fixed import COLUMNS, Fixed, fix, ready_columns
from r1.kernels.tiles import Operand
from r1.storage import activations
from r1.storage.activations import GROUP

TO_REST = tl.constexpr(16.0)
"""An e4m3 number is off by up to a 16th: so its rest, times this, has the same range."""
WIDEST = 128
"""Rows of W that are one product. Of twice as many a program makes two, one after the other."""
LARGEST = tl.constexpr(activations.LARGEST)
"""Of e4m3."""
LEAST = tl.constexpr(activations.LEAST)
"""What is less, and the largest of its group, is 0: the group's scale must have an inverse."""


def narrow(w: Operand) -> Operand:
    """The same matrices, read as bytes: pairs of 4 bits, or FP8."""
    size = w.weight.itemsize
    fp8 = w.FORMAT.value == "fp8"
    return w._replace(
        weight=w.weight.view(torch.float8_e4m3fn if fp8 else torch.int8),
        ROW=tl.constexpr(w.ROW.value * size), EXPERT=tl.constexpr(w.EXPERT.value * size),
        PER=tl.constexpr(1 if fp8 else 2),
    )  # fmt: skip


def rounds(*operands: Operand | None) -> bool:
    """Whether the inputs of products with these matrices may be one e4m3 number each: `takes` of
    activations.py.
    """
    given = [w for w in operands if w is not None]
    return all(w.FORMAT.value == "fp8" and w.WIDE.value % GROUP == 0 for w in given)


def pairs(
    chip: Chip, x: Tensor, w: Operand, step: int, norm: Tensor | None = None, eps: float = 0.0,
    each: int = 2,
) -> Fixed:  # fmt: skip
    """x (N, length) for products with `w`, RMS-normed first with the gain `norm` if there is one.

    Of FP8 the planes are (N, each, length), and the scales (N, length / step).
    """
    if w.FORMAT.value == "int4":
        return fix(chip, x, norm, eps, step)
    tokens, length = x.shape
    made = narrow_memory(x, tokens, length, step, each)
    chip.run(
        pair_kernel, (ceil_div(length, COLUMNS), tokens), x, x.stride(0), norm, eps, made,
        LENGTH=length, BLOCK=COLUMNS, STEP=step, EACH=each, warps=4,
    )  # fmt: skip
    return made


def narrow_memory(like: Tensor, tokens: int, length: int, step: int, each: int) -> Fixed:
    """Memory for such an x of FP8, on the device of `like`."""
    return Fixed(
        like.new_empty(tokens, each, length, dtype=torch.float8_e4m3fn),
        like.new_empty(tokens, length // step, dtype=torch.float32),
    )


@triton.jit
def pair_kernel(
    x, x_stride, norm, eps, made, LENGTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    EACH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one token, as EACH e4m3 numbers."""
    let_next_start(PDL)
    token, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK
    v = ready_columns(x + token * x_stride, norm, eps, first, LENGTH, BLOCK, PDL)
    steps = tl.reshape(v, (BLOCK // STEP, STEP))
    largest = tl.max(tl.abs(steps), axis=1)
    scale = largest / LARGEST + tl.sum(steps * 0.0, axis=1)  # NaN and infinity stay
    steps *= inverse(largest)[:, None]
    high = to_e4m3(steps)
    number = tl.arange(0, BLOCK // STEP)
    at = first + number[:, None] * STEP + tl.arange(0, STEP)[None, :]
    place = made.planes + token * EACH * LENGTH + at
    tl.store(place, high.to(tl.float8e4nv), mask=at < LENGTH)
    if EACH == 2:
        low = to_e4m3((steps - high) * TO_REST)
        tl.store(place + LENGTH, low.to(tl.float8e4nv), mask=at < LENGTH)
    step = first // STEP + number
    tl.store(made.scales + token * (LENGTH // STEP) + step, scale, mask=step < LENGTH // STEP)


@triton.jit
def store_rounded(made, v, row, real, first, LENGTH: tl.constexpr):
    """A step of each token's numbers, fp32 (STEP, ROWS), from column `first` on: one e4m3 number
    each, to the tokens' rows of `made`.
    """
    # NaN becomes infinity: so does the scale, and the products are no numbers.
    largest = tl.max(tl.where(v == v, tl.abs(v), float("inf")), axis=0)
    high = to_e4m3(v * inverse(largest)[None, :])
    place = made.planes + row[None, :] * LENGTH + first + tl.arange(0, v.shape[0])[:, None]
    tl.store(place, high.to(tl.float8e4nv), mask=real[None, :])
    step = row * (LENGTH // v.shape[0]) + first // v.shape[0]
    tl.store(made.scales + step, largest / LARGEST, mask=real)


@triton.jit
def inverse(largest):
    """What makes the largest number of a group 448."""
    return 1.0 / (tl.where(largest > LEAST, largest, LARGEST) / LARGEST)


@triton.jit
def to_e4m3(v):
    """The nearest e4m3 numbers to `v` of -448 to 448, in fp32.

    They have 4 bits, down to 2^-6, and are multiples of 2^-9 below. (On an H100, numbers that
    Triton 3.6 made e4m3 and fp32 again were others.)
    """
    bits = v.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    small = tl.floor(v * 512.0 + 0.5) / 512.0
    return tl.where(tl.abs(v) < 0.015625, small, rounded.to(tl.float32, bitcast=True))
