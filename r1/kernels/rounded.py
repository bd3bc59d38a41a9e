"""Products of FP8 weights with an x of FP8 (r1/storage/activations.py), by the matrix units.

x is one e4m3 number each, with an fp32 scale for each token and GROUP columns: half the products of
narrow.py. A step of a loop takes the GROUP columns that share a scale, in the weights and in x. The
matrix units add up these in fewer bits than fp32 has, and a step's sums are then added in fp32, as
DeepSeek does it (V3 paper, section 3.3.2).

A program has ROWS tokens and twice BLOCK rows of weights: of gate and of up, or of one matrix, side
by side. On an H100, a step of 128 and 2 x 128 rows has 8.4 MFLOP, which take its 132 processors
0.56 us at 1,979 TFLOP/s, and reads 48 KB: 11 TB/s, more than its second-level cache gives. So more
rows for a program are less time, as far as registers allow: the sums of 2 x 128 rows take half of
them, and a product that is not added yet a quarter.

Shapes: N tokens of `length` numbers; programs have BLOCK rows of W, and ROWS tokens. D hidden_size,
I moe_intermediate_size, K experts per token, J slots of a token (K + shared).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.chip import INTERPRETED, Chip, ceil_div, let_next_start, wait_for_previous
from r1.kernels.experts_tiles import tile_of, work_of
from r1.kernels.fixed import COLUMNS, Fixed, ready_columns
from r1.kernels.narrow import UNIT, inverse, to_e4m3
from r1.kernels.tiles import Operand, expert_of, matrix_of
from r1.storage import activations
from r1.storage.matrix import Matrix

GROUP = tl.constexpr(activations.GROUP)
WIDEST = 128
"""Rows of W that are one product."""


def rounds(w: Operand) -> bool:
    """Whether the inputs of products with these matrices are rounded: `takes` of activations.py."""
    return w.FORMAT.value == "fp8" and w.WIDE.value % GROUP.value == 0


def takes_one_number(ptx: bool, x: Tensor, *matrices: Matrix) -> bool:
    """Whether these kernels multiply x (..., in) with the matrices, where it is rounded. `ptx` is
    Chip.ptx. (It is what `storage_sizes` of fixed.py says, without what torch.compile can't trace.)
    """
    whole = all(matrix.shape[-1] % activations.GROUP == 0 for matrix in matrices)
    return ptx and x.itemsize == 2 and whole and activations.takes(*matrices)


def empty(like: Tensor, tokens: int, length: int) -> Fixed:
    """Memory for an x of FP8, on the device of `like`: planes (N, length), scales (N, length /
    GROUP).
    """
    return Fixed(
        like.new_empty(tokens, length, dtype=torch.float8_e4m3fn),
        like.new_empty(tokens, length // GROUP.value, dtype=torch.float32),
    )


def round_input(chip: Chip, x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Fixed:
    """x (N, length), RMS-normed first with the gain `norm` if there is one, as FP8."""
    tokens, length = x.shape
    made = empty(x, tokens, length)
    chip.run(
        round_kernel, (ceil_div(length, COLUMNS), tokens), x, x.stride(0), norm, eps, made,
        LENGTH=length, BLOCK=COLUMNS, warps=4,
    )  # fmt: skip
    return made


@triton.jit
def round_kernel(
    x, x_stride, norm, eps, made, LENGTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """BLOCK numbers of one token."""
    let_next_start(PDL)
    token, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK
    v = ready_columns(x + token * x_stride, norm, eps, first, LENGTH, BLOCK, PDL)
    groups = tl.reshape(v, (BLOCK // GROUP, GROUP))
    q, scale = rounded(groups, 1)
    number = tl.arange(0, BLOCK // GROUP)
    at = first + number[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(made.planes + token * LENGTH + at, q.to(tl.float8e4nv), mask=at < LENGTH)
    group = first // GROUP + number
    place = made.scales + token * (LENGTH // GROUP) + group
    tl.store(place, scale, mask=group < LENGTH // GROUP)


@triton.jit
def rounded(v, AXIS: tl.constexpr):
    """Groups of fp32 numbers, along AXIS, as e4m3 ones, and their scales."""
    # NaN becomes infinity, and so does the scale: products are no numbers then.
    largest = tl.max(tl.where(v == v, tl.abs(v), float("inf")), axis=AXIS)
    return to_e4m3(v * tl.expand_dims(inverse(largest), AXIS)), largest * UNIT


@triton.jit
def load_scale(x, token, real, first, LENGTH: tl.constexpr):
    """The tokens' scales of a step, (ROWS,). Beyond the last column, any."""
    group = tl.minimum(first, LENGTH - GROUP) // GROUP
    return tl.load(x.scales + token * (LENGTH // GROUP) + group, real, 0.0)


@triton.jit
def load_factor(matrix, rows, first, w, LENGTH: tl.constexpr):
    """The rows' scales of a step: a number where they have one, or (1, BLOCK). Beyond the last
    column, any.
    """
    row, wanted, first_row = rows
    block = tl.minimum(first, LENGTH - GROUP) // w.WIDE
    if w.TALL % row.shape[1] == 0:
        factor = tl.load(matrix[1] + first_row // w.TALL * matrix[4] + block).to(tl.float32)
    else:
        at = row // w.TALL * matrix[4] + block
        factor = tl.load(matrix[1] + at, wanted, 0.0).to(tl.float32)
    return factor


@triton.jit
def add_step(sums, matrix, rows, first, v, scale, factor):
    """fp32 sums (ROWS, BLOCK) + a step's x (ROWS, GROUP) times the rows of the matrix. Where these
    have one scale, a sum costs one operation, a multiplication and an addition.
    """
    row, wanted, _first_row = rows
    column = first + tl.arange(0, GROUP)[:, None]
    tile = tl.load(matrix[0] + (row * matrix[3] + column), wanted, 0.0)  # (GROUP, BLOCK)
    if INTERPRETED:
        tile, v = tile.to(tl.float32), v.to(tl.float32)
    products = tl.dot(v, tile, tl.zeros(sums.shape, tl.float32))
    weight = (scale * factor)[:, None] if len(factor.shape) == 0 else scale[:, None] * factor
    return sums + products * weight


@triton.jit
def two_products(x, token, real, one, rows, w, other, other_rows, other_w, LENGTH: tl.constexpr):
    """The tokens' x times rows of two matrices, or of one: fp32 (ROWS, BLOCK) twice. `rows` are
    their numbers, which of them there are, (1, BLOCK) both, and the first number.

    Scales are loaded one step ahead: the pipeline, which loads the rest, leaves them out.
    """
    one_sum = tl.zeros((token.shape[0], rows[0].shape[1]), tl.float32)
    other_sum = tl.zeros((token.shape[0], rows[0].shape[1]), tl.float32)
    scale = load_scale(x, token, real, 0, LENGTH)
    a = load_factor(one, rows, 0, w, LENGTH)
    b = load_factor(other, other_rows, 0, other_w, LENGTH)
    for first in range(0, LENGTH, GROUP):
        place = x.planes + (token * LENGTH)[:, None] + (first + tl.arange(0, GROUP))[None, :]
        v = tl.load(place, real[:, None], 0.0)  # (ROWS, GROUP)
        next_scale = load_scale(x, token, real, first + GROUP, LENGTH)
        next_a = load_factor(one, rows, first + GROUP, w, LENGTH)
        next_b = load_factor(other, other_rows, first + GROUP, other_w, LENGTH)
        one_sum = add_step(one_sum, one, rows, first, v, scale, a)
        other_sum = add_step(other_sum, other, other_rows, first, v, scale, b)
        scale, a, b = next_scale, next_a, next_b
    return one_sum, other_sum


@triton.jit
def rounded_kernel(
    x, weight, residual, y, tokens, outputs, INPUTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A projection: 2 BLOCK rows of W for ROWS tokens, and the residual if there is one."""
    first_out = tl.program_id(1) * 2 * BLOCK
    out = first_out + tl.arange(0, BLOCK)[None, :]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real, matrix = row < tokens, matrix_of(weight, 0)
    wanted, others = out < outputs, out + BLOCK < outputs
    wait_for_previous(PDL)
    let_next_start(PDL)
    rows, other_rows = (out, wanted, first_out), (out + BLOCK, others, first_out + BLOCK)
    sums, other_sums = two_products(
        x, row, real, matrix, rows, weight, matrix, other_rows, weight, INPUTS
    )
    place = row[:, None] * outputs + out
    store_sums(y, residual, sums, place, wanted & real[:, None])
    store_sums(y, residual, other_sums, place + BLOCK, others & real[:, None])


@triton.jit
def inside(out, LIMIT: tl.constexpr, EACH: tl.constexpr):
    """Which of the columns `out` are below LIMIT, where programs have EACH."""
    below = out < LIMIT
    if LIMIT % EACH == 0:
        below = tl.full(out.shape, True, tl.int1)
    return below


@triton.jit
def store_sums(y, residual, sums, place, mask):
    """fp32 sums, and the residual, to these places of y."""
    if residual is not None:
        sums += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=mask)


@triton.jit
def up_rounded_kernel(
    x, order, ends, work, gate, up, shared_gate, shared_up, h, tokens, count,
    DIM: tl.constexpr, INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GROUP inner values of one expert, for up to ROWS of its tokens: rounded, into h (`Fixed`)."""
    first_out = tl.program_id(0) * GROUP
    out = first_out + tl.arange(0, GROUP)[None, :]
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, True)
    w_row = (expert - count) * INNER  # where a shared expert begins
    gates = expert_of(gate, shared_gate, expert, count, w_row, 0, SHARED)
    ups = expert_of(up, shared_up, expert, count, w_row, 0, SHARED)
    for first in range(start, end, ROWS):  # once, or never
        token, _choice, row, _slot, real = tile_of(
            expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS
        )
        # INNER is whole groups, so all of these rows are there.
        rows = (out, tl.full((1, GROUP), True, tl.int1), first_out)
        gate_sum, up_sum = two_products(x, token, real, gates, rows, gate, ups, rows, up, DIM)
        q, scale = rounded(gate_sum * tl.sigmoid(gate_sum) * up_sum, 1)
        place = h.planes + row[:, None] * INNER + out
        tl.store(place, q.to(tl.float8e4nv), mask=real[:, None])
        tl.store(h.scales + row * (INNER // GROUP) + tl.program_id(0), scale, mask=real)


@triton.jit
def down_rounded_kernel(
    h, order, ends, work, weights, down, shared_down, y, tokens, count, DIM: tl.constexpr,
    INNER: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """2 BLOCK outputs of one expert, weighted, for up to ROWS of its tokens: into their slots of y,
    (N, J, D).
    """
    first_out = tl.program_id(0) * 2 * BLOCK
    out = first_out + tl.arange(0, BLOCK)[None, :]
    wait_for_previous(PDL)
    let_next_start(PDL)
    expert, start, end = work_of(work, ends, tokens, count, True)
    matrix = expert_of(down, shared_down, expert, count, 0, (expert - count) * INNER, SHARED)
    wanted, others = inside(out, DIM, 2 * BLOCK), inside(out + BLOCK, DIM, 2 * BLOCK)
    rows, other_rows = (out, wanted, first_out), (out + BLOCK, others, first_out + BLOCK)
    for first in range(start, end, ROWS):  # once, or never
        _token, choice, row, slot, real = tile_of(
            expert, first, end, order, tokens, count, CHOSEN, SHARED, ROWS
        )
        sums, other_sums = two_products(
            h, row, real, matrix, rows, down, matrix, other_rows, down, INNER
        )
        weight = tl.where(expert < count, tl.load(weights + choice, mask=real, other=0.0), 1.0)
        place = slot[:, None] * DIM + out
        store_sums(y, None, sums * weight[:, None], place, wanted & real[:, None])
        store_sums(y, None, other_sums * weight[:, None], place + BLOCK, others & real[:, None])
