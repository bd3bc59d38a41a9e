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

A step of a loop takes the STEP columns that share a scale, in the weights and in x. So scales cost
a step's few sums, and no weight.

In a fused step the router stores the experts' x so, beside the one that it makes. Elsewhere a small
kernel does (`pairs`).

Shapes: N tokens of `length` numbers; programs have `rows` of W, and ROWS tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.chip import INTERPRETED, Chip, ceil_div, let_next_start
from r1.kernels.fixed import COLUMNS, GROUP, Fixed, fix, ready_columns
from r1.kernels.tiles import Operand
from r1.storage import activations

HALVES = tl.constexpr("and.b32 $0, $2, 0x0F0F0F0F; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;")
TO_REST = tl.constexpr(16.0)
"""An e4m3 number is off by up to a 16th: so its rest, times this, has the same range."""
LEAST = tl.constexpr(activations.LEAST)
"""What the largest number of a group counts for if it is less: a scale must have an inverse."""
UNIT = tl.constexpr(activations.UNIT)
"""The scale of a group whose largest number is 1."""
EVEN = tl.constexpr(activations.EVEN)
"""See `to_e4m3`."""


class Form(NamedTuple):
    """In what numbers a product takes its input, where not as it is: what `Fixed` memory holds."""

    length: int
    """Numbers of a token."""
    group: int = GROUP.value
    """Numbers that have one scale. Products by the matrix units have larger groups."""
    fp8: bool = False
    """Each number is a pair of e4m3, and not a whole number of 16 bits."""

    @staticmethod
    def of(made: Fixed) -> Form:
        fp8 = made.planes.dtype == torch.float8_e4m3fn
        length = made.planes.shape[2] * (1 if fp8 else 8)
        return Form(length, length // made.scales.shape[1], fp8)

    def empty(self, like: Tensor, tokens: int) -> Fixed:
        """Memory for so many tokens, on the device of `like`. Of FP8 the planes are (N, 2, length),
        and the scales (N, length / group).
        """
        if not self.fp8:
            return Fixed.empty(like, tokens, self.length, self.group)
        return Fixed(
            like.new_empty(tokens, 2, self.length, dtype=torch.float8_e4m3fn),
            like.new_empty(tokens, self.length // self.group, dtype=torch.float32),
        )


def narrow(w: Operand) -> Operand:
    """The same matrices, read as bytes: pairs of 4 bits, or FP8."""
    size = w.weight.itemsize
    fp8 = w.FORMAT.value == "fp8"
    return w._replace(
        weight=w.weight.view(torch.float8_e4m3fn if fp8 else torch.int8),
        ROW=tl.constexpr(w.ROW.value * size), EXPERT=tl.constexpr(w.EXPERT.value * size),
        PER=tl.constexpr(1 if fp8 else 2),
    )  # fmt: skip


def pairs(
    chip: Chip, x: Tensor, w: Operand, step: int, norm: Tensor | None = None, eps: float = 0.0
) -> Fixed:
    """x (N, length) for products with `w`, RMS-normed first with the gain `norm` if there is one.

    `step` numbers have one scale.
    """
    if w.FORMAT.value == "int4":
        return fix(chip, x, norm, eps, step)
    tokens, length = x.shape
    made = Form(length, step, fp8=True).empty(x, tokens)
    chip.run(
        pair_kernel, (ceil_div(length, COLUMNS), tokens), x, x.stride(0), norm, eps, made,
        LENGTH=length, BLOCK=COLUMNS, STEP=step, warps=4,
    )  # fmt: skip
    return made


@triton.jit
def pair_kernel(
    x, x_stride, norm, eps, made, LENGTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of one token, as two e4m3 numbers each."""
    let_next_start(PDL)
    token, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK
    v = ready_columns(x + token * x_stride, norm, eps, first, LENGTH, BLOCK, PDL)
    store_pairs(made, v, token, first, LENGTH, STEP)


@triton.jit
def store_pairs(made, v, token, first, LENGTH: tl.constexpr, STEP: tl.constexpr):
    """Store some numbers of a token as two e4m3 numbers each.

    `v`, fp32 (1, C), has the columns from `first` on. Those from LENGTH on are not stored. C and
    `first` are multiples of STEP, the numbers that have one scale.
    """
    STEPS: tl.constexpr = v.shape[1] // STEP
    steps = tl.reshape(v, (STEPS, STEP))
    largest = tl.max(tl.abs(steps), axis=1)
    scale = largest * UNIT + tl.sum(steps * 0.0, axis=1)  # NaN and infinity stay
    steps *= inverse(largest)[:, None]
    high = to_e4m3(steps)
    low = to_e4m3((steps - high) * TO_REST)
    number = tl.arange(0, STEPS)
    at = first + number[:, None] * STEP + tl.arange(0, STEP)[None, :]
    place = made.planes + token * 2 * LENGTH + at
    tl.store(place, high.to(tl.float8e4nv), mask=at < LENGTH)
    tl.store(place + LENGTH, low.to(tl.float8e4nv), mask=at < LENGTH)
    step = first // STEP + number
    tl.store(made.scales + token * (LENGTH // STEP) + step, scale, mask=step < LENGTH // STEP)


@triton.jit
def inverse(largest):
    """What makes the largest number of a group 448."""
    return 1.0 / (tl.maximum(largest, LEAST) * UNIT)


@triton.jit
def to_e4m3(v):
    """The nearest e4m3 numbers to `v` of -448 to 448, in fp32.

    They have 4 bits, down to 2^-6, and are multiples of 2^-9 below: see activations.py. (On an
    H100, numbers that Triton 3.6 made e4m3 and fp32 again were others.)
    """
    bits = v.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    small = (v + EVEN) - EVEN
    return tl.where(tl.abs(v) < 0.015625, small, rounded.to(tl.float32, bitcast=True))


@triton.jit
def twice(rows):
    """(ROWS,) -> (2 ROWS,): each one two times."""
    return tl.reshape(tl.join(rows, rows), (2 * rows.shape[0],))


@triton.jit
def load_pairs(x, w, token, real, first, LENGTH: tl.constexpr, STEP: tl.constexpr):
    """STEP columns of tokens' pairs, from `first` on: (STEP, 2 ROWS), of 4 bits the even ones and
    the odd ones, (STEP / 2, 2 ROWS) each. `token` and `real` (2 ROWS,) have each token twice.
    """
    plane = token * 2 * LENGTH + tl.arange(0, token.shape[0]) % 2 * LENGTH  # high, low
    if w.FORMAT == "fp8":
        place = x.planes + plane[None, :] + first + tl.arange(0, STEP)[:, None]
        v = tl.load(place, real[None, :], 0.0)
    else:
        planes = x.planes.to(tl.pointer_type(tl.int8), bitcast=True)
        place = planes + plane[None, :] + first // 2 + tl.arange(0, STEP // 2)[:, None]
        odd = place + LENGTH // 2
        v = (tl.load(place, real[None, :], 0), tl.load(odd, real[None, :], 0))
    return v


@triton.jit
def load_scales(x, w, token, real, first, LENGTH: tl.constexpr, STEP: tl.constexpr):
    """Of the same columns: each token's scale, and its sum for zero points, fp32 (1, ROWS). Beyond
    the last column, any.
    """
    step = token * (LENGTH // STEP) + tl.minimum(first, LENGTH - STEP) // STEP
    if w.FORMAT == "fp8":
        scale = tl.load(x.scales + step, real, 0.0)
        total = scale
    else:
        scale = tl.load(x.scales + 2 * step, real, 0.0)
        total = tl.load(x.scales + 2 * step + 1, real, 0.0)
    return scale[None, :], total[None, :]


@triton.jit
def load_factors(matrix, row, wanted, first, limit, w):
    """The rows' scales and zero points of these columns, fp32 (rows, 1). Beyond the last, any."""
    _place, factors, zeros, _stride, scale_stride = matrix
    block = row // w.TALL * scale_stride + tl.minimum(first, limit - 1) // w.WIDE
    off = tl.load(zeros + block, wanted, 0).to(tl.float32) if w.ZEROS else 8.0
    return tl.load(factors + block, wanted, 0.0).to(tl.float32), off


@triton.jit
def add_pairs(sums, matrix, row, wanted, first, w, v, factors, scales, STEP: tl.constexpr):
    """fp32 sums (rows, ROWS) + STEP columns of the matrix times the pairs."""
    place, stride = matrix[0], matrix[3]
    factor, off = factors
    scale, total = scales
    R: tl.constexpr = sums.shape[0]
    T: tl.constexpr = sums.shape[1]
    if w.FORMAT == "fp8":
        at = first + tl.arange(0, STEP)[None, :]
        tile, pair = tl.load(place + row * stride + at, wanted, 0.0), v
        if INTERPRETED:
            tile, pair = tile.to(tl.float32), pair.to(tl.float32)
        both = tl.dot(tile, pair, tl.zeros((R, 2 * T), tl.float32))
        highs, lows = tl.split(tl.reshape(both, (R, T, 2)))
        products = highs + lows * (1.0 / TO_REST)
    else:
        at = first // 2 + tl.arange(0, STEP // 2)[None, :]
        low, high = halves(tl.load(place + row * stride + at, wanted, 0))
        both = tl.dot(low, v[0], tl.zeros((R, 2 * T), tl.int32), out_dtype=tl.int32)
        both = tl.dot(high, v[1], both, out_dtype=tl.int32)
        highs, lows = tl.split(tl.reshape(both, (R, T, 2)))
        products = (256 * highs + lows).to(tl.float32) - off * total
    return sums + products * (factor * scale)


@triton.jit
def halves(pairs):
    """int8 -> the numbers 0 to 15 in the low and in the high halves, int8 both."""
    if INTERPRETED:
        low, high = pairs & 15, (pairs >> 4) & 15
    else:
        low, high = tl.inline_asm_elementwise(
            HALVES, "=r,=r,r", [pairs], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    return low, high
