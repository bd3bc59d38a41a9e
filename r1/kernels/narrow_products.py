"""The products of narrow.py: an x of narrow numbers times packed weights, by the matrix units.

A step of a loop takes the STEP columns that share a scale, in the weights and in x. So scales cost
a step's few sums, and no weight. EACH is how many numbers each one of x has become, 2 or 1.

Shapes: N tokens of `length` numbers; programs have `rows` of W, and ROWS tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.chip import INTERPRETED
from r1.kernels.narrow import TO_REST

HALVES = tl.constexpr("and.b32 $0, $2, 0x0F0F0F0F; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;")


@triton.jit
def lanes(rows, EACH: tl.constexpr):
    """(ROWS,) -> (EACH ROWS,): each one EACH times."""
    many = rows
    if EACH == 2:
        many = tl.reshape(tl.join(rows, rows), (2 * rows.shape[0],))
    return many


@triton.jit
def load_pairs(
    x, w, token, real, first, LENGTH: tl.constexpr, STEP: tl.constexpr, EACH: tl.constexpr
):
    """STEP columns of tokens' pairs, from `first` on: (STEP, EACH ROWS), of 4 bits the even ones
    and the odd ones, (STEP / 2, 2 ROWS) each. `token` and `real` are `lanes`.
    """
    plane = token * EACH * LENGTH
    if EACH == 2:
        plane += tl.arange(0, token.shape[0]) % 2 * LENGTH  # high, low
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
def rows_of(first, row, wanted, limit, w, EACH: tl.constexpr):
    """Rows `row` of a matrix, from number `first` on, and which of them are `wanted`, (R, 1) both;
    then the same of the rows whose scales are loaded.

    Of one number, where all rows share a scale, that is the first row alone. So a sum costs one
    operation, a multiplication and an addition.
    """
    if EACH == 1 and w.TALL % row.shape[0] == 0:
        found = (row, wanted, first, first < limit)
    else:
        found = (row, wanted, row, wanted)
    return found


@triton.jit
def product_of(
    x, token, real, matrix, rows, factors, w, LENGTH: tl.constexpr, STEP: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """The matrix's rows (`rows_of`) times the tokens' x: fp32 (R, ROWS). `factors` are those of the
    first step: scales are loaded one step ahead, because the pipeline, which loads the rest, leaves
    them out.
    """
    many, many_real = lanes(token, EACH), lanes(real, EACH)
    scales = load_scales(x, w, token, real, 0, LENGTH, STEP)
    sums = tl.zeros((rows[0].shape[0], token.shape[0]), tl.float32)
    for first in range(0, LENGTH, STEP):
        v = load_pairs(x, w, many, many_real, first, LENGTH, STEP, EACH)
        next_factors = load_factors(matrix, rows[2], rows[3], first + STEP, LENGTH, w)
        next_scales = load_scales(x, w, token, real, first + STEP, LENGTH, STEP)
        sums = add_pairs(sums, matrix, rows, first, w, v, factors, scales, STEP, EACH)
        factors, scales = next_factors, next_scales
    return sums


@triton.jit
def two_products(
    x, token, real, one, one_rows, a, one_w, other, other_rows, b, other_w, LENGTH: tl.constexpr,
    STEP: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The same of two matrices, or of other rows of one: what is loaded of x serves both. `a` and
    `b` are their first factors.
    """
    many, many_real = lanes(token, EACH), lanes(real, EACH)
    one_sum = tl.zeros((one_rows[0].shape[0], token.shape[0]), tl.float32)
    other_sum = tl.zeros((other_rows[0].shape[0], token.shape[0]), tl.float32)
    scales = load_scales(x, one_w, token, real, 0, LENGTH, STEP)
    for first in range(0, LENGTH, STEP):
        v = load_pairs(x, one_w, many, many_real, first, LENGTH, STEP, EACH)
        after = first + STEP
        next_a = load_factors(one, one_rows[2], one_rows[3], after, LENGTH, one_w)
        next_b = load_factors(other, other_rows[2], other_rows[3], after, LENGTH, other_w)
        next_scales = load_scales(x, one_w, token, real, after, LENGTH, STEP)
        one_sum = add_pairs(one_sum, one, one_rows, first, one_w, v, a, scales, STEP, EACH)
        other_sum = add_pairs(
            other_sum, other, other_rows, first, other_w, v, b, scales, STEP, EACH
        )
        a, b, scales = next_a, next_b, next_scales
    return one_sum, other_sum


@triton.jit
def load_factors(matrix, row, wanted, first, limit, w):
    """The rows' scales and zero points of these columns, fp32 (rows, 1). Beyond the last, any."""
    _place, factors, zeros, _stride, scale_stride = matrix
    block = row // w.TALL * scale_stride + tl.minimum(first, limit - 1) // w.WIDE
    off = tl.load(zeros + block, wanted, 0).to(tl.float32) if w.ZEROS else 8.0
    return tl.load(factors + block, wanted, 0.0).to(tl.float32), off


@triton.jit
def add_pairs(
    sums, matrix, rows, first, w, v, factors, scales, STEP: tl.constexpr, EACH: tl.constexpr
):
    """fp32 sums (rows, ROWS) + STEP columns of the matrix times the pairs."""
    place, stride, row, wanted = matrix[0], matrix[3], rows[0], rows[1]
    factor, off = factors
    scale, total = scales
    R: tl.constexpr = sums.shape[0]
    T: tl.constexpr = sums.shape[1]
    if w.FORMAT == "fp8":
        at = first + tl.arange(0, STEP)[None, :]
        tile, pair = tl.load(place + row * stride + at, wanted, 0.0), v
        if INTERPRETED:
            tile, pair = tile.to(tl.float32), pair.to(tl.float32)
        both = tl.dot(tile, pair, tl.zeros((R, EACH * T), tl.float32))
        products = both
        if EACH == 2:
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
