"""The experts of several tokens, 4 bits: products of bytes, by the matrix units.

A tile of weights needs no fp32 numbers on the way: a word holds eight numbers of 4 bits, and three
bit operations make it two words of four bytes. The tokens are fixed-point vectors (fixed.py), two
bytes for each number: `tl.dot` gets them as two columns, side by side. Its sums are whole numbers,
exact. A thread has both columns of a token, and joins them.

A step of the loop takes the STEP columns that share a scale, in the weights and in the vectors.

Shapes: N tokens, D hidden_size, I moe_intermediate_size, K experts per token, J slots of a token
(K + shared).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from r1.kernels.chip import INTERPRETED, let_next_start, wait_for_previous
from r1.kernels.experts_tiles import tile_of, work_of
from r1.kernels.tiles import Operand, expert_of

HALVES = tl.constexpr("and.b32 $0, $2, 0x0F0F0F0F; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;")


def step_of(dim: int, inner: int, *operands: Operand | None) -> int:
    """The largest STEP for experts of these sizes and matrices of 4 bits; 0: there is none."""
    wide = [w.WIDE.value for w in operands if w is not None]
    return next((n for n in (128, 64) if all(size % n == 0 for size in (dim, inner, *wide))), 0)


def bytes_of(w: Operand) -> Operand:
    """The same matrices of 4 bits, read as bytes."""
    size = w.weight.itemsize
    return w._replace(
        weight=w.weight.view(torch.int8), ROW=tl.constexpr(w.ROW.value * size),
        EXPERT=tl.constexpr(w.EXPERT.value * size), PER=tl.constexpr(2),
    )  # fmt: skip


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


@triton.jit
def load_vectors(x, token, real, first, LENGTH: tl.constexpr, STEP: tl.constexpr):
    """STEP columns of tokens' vectors, from `first` on: the bytes of the even columns and of the
    odd ones, int8 (STEP / 2, 2 ROWS). `token` and `real` (2 ROWS,) have each token twice.
    """
    at = first // 2 + tl.arange(0, STEP // 2)
    which = tl.arange(0, token.shape[0]) % 2  # the high bytes, the low bytes
    planes = x.planes.to(tl.pointer_type(tl.int8), bitcast=True)
    place = planes + (token * 2 * LENGTH + which * LENGTH)[None, :] + at[:, None]
    return tl.load(place, real[None, :], 0), tl.load(place + LENGTH // 2, real[None, :], 0)


@triton.jit
def load_scales(x, token, real, first, LENGTH: tl.constexpr, STEP: tl.constexpr):
    """Of the same columns: each token's scale and sum, fp32 (1, ROWS). Beyond the last, any."""
    step = tl.minimum(first, LENGTH - STEP) // STEP
    place = x.scales + token * (LENGTH // STEP * 2) + 2 * step
    scale, total = tl.load(place, real, 0.0), tl.load(place + 1, real, 0.0)
    return scale[None, :], total[None, :]


@triton.jit
def load_factors(matrix, row, wanted, first, limit, w):
    """The rows' scales and zero points of these columns, fp32 (rows, 1). Beyond the last, any."""
    _place, factors, zeros, _stride, scale_stride = matrix
    block = row // w.TALL * scale_stride + tl.minimum(first, limit - 1) // w.WIDE
    off = tl.load(zeros + block, wanted, 0).to(tl.float32) if w.ZEROS else 8.0
    return tl.load(factors + block, wanted, 0.0).to(tl.float32), off


@triton.jit
def add_bytes(sums, matrix, row, wanted, first, w, even, odd, factors, scales, STEP: tl.constexpr):
    """fp32 sums (rows, ROWS) + STEP columns of the matrix times the vectors."""
    place, stride = matrix[0], matrix[3]
    at = first // 2 + tl.arange(0, STEP // 2)[None, :]
    low, high = halves(tl.load(place + row * stride + at, wanted, 0))
    both = tl.zeros((sums.shape[0], 2 * sums.shape[1]), tl.int32)
    both = tl.dot(low, even, both, out_dtype=tl.int32)
    both = tl.dot(high, odd, both, out_dtype=tl.int32)
    highs, lows = tl.split(tl.reshape(both, (sums.shape[0], sums.shape[1], 2)))
    factor, off = factors
    scale, total = scales
    whole = (256 * highs + lows).to(tl.float32)
    return sums + (whole - off * total) * (factor * scale)


@triton.jit
def up_bytes_kernel(
    x, order, ends, work, gate, up, shared_gate, shared_up, h, tokens, count,
    DIM: tl.constexpr, INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT inner values of one expert, for up to ROWS of its tokens. BLOCK_IN is the step."""
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, True)
    w_row = (expert - count) * INNER  # where a shared expert begins
    wanted = (out < INNER)[:, None]
    gates = expert_of(gate, shared_gate, expert, count, w_row, 0, SHARED)
    ups = expert_of(up, shared_up, expert, count, w_row, 0, SHARED)
    for first in range(start, end, ROWS):  # once, or never
        token, _choice, row, _slot, real = tile_of(
            expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS
        )
        twice = tl.reshape(tl.join(token, token), (2 * ROWS,))
        real2 = tl.reshape(tl.join(real, real), (2 * ROWS,))
        gate_sum = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        up_sum = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        # Scales are loaded one step ahead: the pipeline, which loads the rest, leaves them out.
        a = load_factors(gates, out[:, None], wanted, 0, DIM, gate)
        b = load_factors(ups, out[:, None], wanted, 0, DIM, up)
        scales = load_scales(x, token, real, 0, DIM, BLOCK_IN)
        for column in range(0, DIM, BLOCK_IN):
            even, odd = load_vectors(x, twice, real2, column, DIM, BLOCK_IN)
            next_a = load_factors(gates, out[:, None], wanted, column + BLOCK_IN, DIM, gate)
            next_b = load_factors(ups, out[:, None], wanted, column + BLOCK_IN, DIM, up)
            next_scales = load_scales(x, token, real, column + BLOCK_IN, DIM, BLOCK_IN)
            gate_sum = add_bytes(
                gate_sum, gates, out[:, None], wanted, column, gate, even, odd, a, scales,
                BLOCK_IN,
            )  # fmt: skip
            up_sum = add_bytes(
                up_sum, ups, out[:, None], wanted, column, up, even, odd, b, scales, BLOCK_IN
            )
            a, b, scales = next_a, next_b, next_scales
        inner = gate_sum * tl.sigmoid(gate_sum) * up_sum
        place = h + row[None, :] * INNER + out[:, None]
        tl.store(place, inner.to(h.dtype.element_ty), mask=wanted & real[None, :])


@triton.jit
def down_bytes_kernel(
    h, order, ends, work, weights, down, shared_down, y, tokens, count, DIM: tl.constexpr,
    INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT outputs of one expert, weighted, for up to ROWS of its tokens: into their slots of
    y, (N, J, D).
    """
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, True)
    matrix = expert_of(down, shared_down, expert, count, 0, (expert - count) * INNER, SHARED)
    wanted = (out < DIM)[:, None]
    for first in range(start, end, ROWS):  # once, or never
        _token, choice, row, slot, real = tile_of(
            expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS
        )
        twice = tl.reshape(tl.join(row, row), (2 * ROWS,))
        real2 = tl.reshape(tl.join(real, real), (2 * ROWS,))
        sums = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
        factors = load_factors(matrix, out[:, None], wanted, 0, INNER, down)
        scales = load_scales(h, row, real, 0, INNER, BLOCK_IN)
        for column in range(0, INNER, BLOCK_IN):
            even, odd = load_vectors(h, twice, real2, column, INNER, BLOCK_IN)
            after = column + BLOCK_IN
            next_factors = load_factors(matrix, out[:, None], wanted, after, INNER, down)
            next_scales = load_scales(h, row, real, after, INNER, BLOCK_IN)
            sums = add_bytes(
                sums, matrix, out[:, None], wanted, column, down, even, odd, factors,
                scales, BLOCK_IN,
            )  # fmt: skip
            factors, scales = next_factors, next_scales
        weight = tl.where(expert < count, tl.load(weights + choice, mask=real, other=0.0), 1.0)
        weighted = (sums * weight[None, :]).to(y.dtype.element_ty)
        place = y + slot[None, :] * DIM + out[:, None]
        tl.store(place, weighted, mask=wanted & real[None, :])
