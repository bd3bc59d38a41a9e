"""A projection with its neighbours: y = residual + x W^T, where x may be normed first.

One token is a matrix-vector product. Each program has a few rows of W, and all its threads stand
along the columns. The norm costs no pass of its own: its factor is one number, which multiplies the
sums at the end. The loop that streams W also adds up the squares for it.
Several tokens are `tl.dot` on tiles whose rows are padded to 16. A small kernel before it applies
the norm. Few rows of W may be cut into parts (linear_parts.py). Of packed weights, a few tokens
are dot products again (linear_few.py), and more of them may be products as narrow as the weights
(linear_narrow.py).

Shapes: N tokens; out and in are W's rows and columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from r1.kernels.chip import (
    LEAST_TILE,
    Chip,
    ceil_div,
    let_next_start,
    power_of_two,
    wait_for_previous,
)
from r1.kernels.fixed import GROUP, Fixed, columns_fixed, fix, storage_sizes, times_fixed
from r1.kernels.linear_few import few_kernel
from r1.kernels.linear_launch import LinearLaunch
from r1.kernels.linear_narrow import narrow_kernel
from r1.kernels.linear_parts import can_cut, parts_kernel
from r1.kernels.narrow import Form, narrow, pairs
from r1.kernels.rounded import round_input, rounded_kernel, rounds
from r1.kernels.tiles import Operand, add_product, load, matrix_of, operand, times
from r1.storage.activations import given, rounded
from r1.storage.matrix import Matrix


def linear(
    chip: Chip, x: Tensor, weight: Matrix, *, norm: Tensor | None = None, eps: float = 0.0,
    residual: Tensor | None = None, dtype: torch.dtype | None = None, fixed: Fixed | None = None,
    launch: LinearLaunch | None = None, round_x: bool = False,
) -> Tensor:  # fmt: skip
    """x (N, in), W (out, in) -> (N, out) in `dtype`, or x's. Sums are in fp32.

    With `norm` (in,) x is RMS-normed first, with this gain. `residual` (N, out) is added. `fixed`
    is x again, if an earlier kernel has made it (see `linear_takes_fixed`); there is no norm then.
    `round_x`: x becomes FP8 for a matrix of FP8 (r1/storage/activations.py). Such a `fixed` stands
    in for the numbers of x, which are not read.
    """
    tokens, (outputs, inputs) = x.shape[0], weight.shape
    y = x.new_empty(tokens, outputs, dtype=dtype)
    matrix = operand(weight, chip.ptx)
    stored = storage_sizes(chip, x, inputs, matrix, round_x=round_x)
    use = launch or chip.launch(LinearLaunch, tokens, inputs, outputs, x.itemsize, *stored)
    if round_x and rounds(matrix) and not stored[3:]:  # and no product is faster
        x = rounded(x if norm is None else prepare(chip, x, norm=norm, eps=eps))
        norm = None
    use = use if can_cut(matrix, inputs, use.parts, use.inputs) else use.in_tiles
    programs, parts = ceil_div(outputs, use.outputs), ceil_div(tokens, use.rows)
    blocks = {"BLOCK_OUT": use.outputs, "BLOCK_IN": use.inputs}
    if stored[3:] or (use.narrow and stored[2:]):
        return _narrow(chip, use, x, matrix, norm, eps, residual, y, stored, fixed)
    whole = stored[1:2] == (1,) and use.rows < LEAST_TILE
    given = (fixed or fix(chip, x, norm, eps)) if whole else x
    if use.rows == 1:
        chip.run(
            vector_kernel, (programs, parts), given, x.stride(0), matrix, None if whole else norm,
            eps, residual, y, outputs, INPUTS=inputs, FIXED=whole, **blocks, warps=use.warps,
            stages=use.stages,
        )  # fmt: skip
        return y
    if norm is not None and not whole:
        given = x = prepare(chip, x, norm=norm, eps=eps)
    blocks["ROWS"] = use.rows
    if use.rows < LEAST_TILE:
        chip.run(
            few_kernel, (programs * parts,), given, x.stride(0), matrix, residual, y, tokens,
            outputs, INPUTS=inputs, FIXED=whole, **blocks, warps=use.warps, stages=use.stages,
        )  # fmt: skip
        return y
    kernel, more = (parts_kernel, {"PARTS": use.parts}) if use.parts > 1 else (tile_kernel, {})
    chip.run(
        kernel, (parts, programs), x, x.stride(0), matrix, residual, y, tokens, outputs,
        INPUTS=inputs, **blocks, **more, warps=use.warps, stages=use.stages,
    )  # fmt: skip
    return y


def _narrow(
    chip: Chip, use: LinearLaunch, x: Tensor, matrix: Operand, norm: Tensor | None, eps: float,
    residual: Tensor | None, y: Tensor, stored: tuple[int, ...], fixed: Fixed | None,
) -> Tensor:  # fmt: skip
    """`linear` with an x of narrow numbers: one each (rounded.py), or pairs (narrow.py)."""
    (tokens, inputs), outputs, w = x.shape, y.shape[1], narrow(matrix)
    grid = (ceil_div(tokens, use.rows), ceil_div(outputs, use.outputs))
    how = {"INPUTS": inputs, "ROWS": use.rows, "warps": use.warps, "stages": use.stages}
    if stored[3:]:
        chip.run(
            rounded_kernel, grid, fixed or round_input(chip, x, norm, eps), w, residual, y, tokens,
            outputs, BLOCK=use.outputs // 2, **how,
        )  # fmt: skip
    else:
        chip.run(
            narrow_kernel, grid, pairs(chip, x, matrix, stored[2], norm, eps), w, residual, y,
            tokens, outputs, BLOCK_OUT=use.outputs, STEP=stored[2], **how,
        )  # fmt: skip
    return y


def linear_takes_fixed(chip: Chip, x: Tensor, weight: Matrix, head: int) -> Form | None:
    """The form in which `linear` takes heads' outputs, of as many tokens as x (N, any) has and in
    its dtype, if another kernel can make it. None: as they are, or in pairs, or a head's `head`
    numbers are no whole groups, and programs make a head's.
    """
    outputs, inputs = weight.shape
    stored = storage_sizes(chip, x, inputs, operand(weight, chip.ptx))
    if head % GROUP.value or stored[1:2] != (1,):
        return None
    use = chip.launch(LinearLaunch, len(x), inputs, outputs, x.itemsize, *stored)
    return Form(inputs) if use.rows < LEAST_TILE and not use.narrow else None


def prepare(
    chip: Chip, x: Tensor, *, up: Tensor | None = None, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """The input of a product with several tokens, (N, in): SwiGLU of the gate x and `up` (N, in),
    or x, RMS-normed with the gain `norm` (in,).
    """
    (tokens, inputs), up_stride = x.shape, 0 if up is None else up.stride(0)
    h, block = x.new_empty(tokens, inputs), min(2048, power_of_two(inputs))
    chip.run(
        prepare_kernel, (tokens * ceil_div(inputs, block),), x, x.stride(0), up, up_stride, norm,
        eps, h, INPUTS=inputs, BLOCK=block, warps=8,
    )  # fmt: skip
    return h


def linear_torch(
    x: Tensor, weight: Matrix, *, norm: Tensor | None = None, eps: float = 0.0,
    residual: Tensor | None = None, dtype: torch.dtype | None = None, fixed: None = None,
    round_x: bool = False,
) -> Tensor:  # fmt: skip
    """The twin. It rounds to x's dtype before it converts to `dtype`."""
    if norm is not None:
        x = norm * F.rms_norm(x, norm.shape, eps=eps)
    y = weight.matmul(given(weight, x) if round_x else x)
    return (y if residual is None else residual + y).to(dtype or x.dtype)


LINEAR = {"torch": linear_torch, "triton": linear}


@triton.jit
def vector_kernel(
    x, x_stride, weight, norm, eps, residual, y, outputs, INPUTS: tl.constexpr,
    FIXED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token, BLOCK_OUT rows of W. With FIXED x is a `Fixed`, and normed.

    Weights depend on no kernel, so the first tile is loaded before the wait.
    """
    let_next_start(PDL)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_IN)
    matrix, w_row = matrix_of(weight, 0), out.to(tl.int64)[:, None]
    real = (out < outputs)[:, None]
    w = load(matrix, w_row, real, d[None, :], 0, INPUTS, weight)  # (BLOCK_OUT, BLOCK_IN)
    gain = gain_columns(norm, d, INPUTS)
    wait_for_previous(PDL)
    sums = tl.zeros((BLOCK_OUT, BLOCK_IN // min(weight.TOGETHER, BLOCK_IN)), tl.float32)
    squares = tl.zeros((BLOCK_IN,), tl.float32)
    whole = columns_fixed(x, row, 0, INPUTS, BLOCK_IN) if FIXED else None
    for start in range(0, INPUTS, BLOCK_IN):
        if FIXED:
            sums += times_fixed(w, whole, weight)
            whole = columns_fixed(x, row, start + BLOCK_IN, INPUTS, BLOCK_IN)
        else:
            v, squares = normed_columns(x + row * x_stride, norm, gain, squares, start + d, INPUTS)
            sums += times(w, v[None, :], weight)
            if norm is not None:
                gain = gain_columns(norm, start + BLOCK_IN + d, INPUTS)
        w = load(matrix, w_row, real, d[None, :], start + BLOCK_IN, INPUTS, weight)
    total = tl.sum(sums, axis=1)  # (BLOCK_OUT,)
    if norm is not None:
        total *= tl.rsqrt(tl.sum(squares, axis=0) / INPUTS + eps)
    place = row * outputs + out
    if residual is not None:
        total += tl.load(residual + place, mask=out < outputs, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=out < outputs)


@triton.jit
def gain_columns(norm, at, limit):
    """Columns `at` of a norm's gain, or of another vector of weights; 0 where there is none.

    They are weights: loaded before the wait, they come from memory while the previous kernel runs.
    """
    gain = 0.0
    if norm is not None:
        gain = tl.load(norm + at, mask=at < limit, other=0.0)
    return gain


@triton.jit
def normed_columns(x, norm, gain, squares, at, limit):
    """Columns `at` of a vector, fp32: 0 from column `limit` on. With a `norm` they are multiplied
    by these columns of its gain, and their squares are added to `squares`: the norm's factor comes
    at the end.
    """
    v = tl.load(x + at, mask=at < limit, other=0.0).to(tl.float32)
    if norm is not None:
        squares += v * v
        v *= gain.to(tl.float32)
    return v, squares


@triton.jit
def prepare_kernel(
    x, x_stride, up, up_stride, norm, eps, h, INPUTS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr
):  # fmt: skip
    """BLOCK columns of one token's SwiGLU or norm, once for all programs of `tile_kernel`.

    In their loop it would stand between load and tl.dot, and x couldn't be loaded ahead of time.
    """
    let_next_start(PDL)
    blocks: tl.constexpr = (INPUTS + BLOCK - 1) // BLOCK
    row, columns = (tl.program_id(0) // blocks).to(tl.int64), tl.arange(0, BLOCK)
    at = tl.program_id(0) % blocks * BLOCK + columns
    gain = gain_columns(norm, at, INPUTS)
    x += row * x_stride
    wait_for_previous(PDL)
    v = tl.load(x + at, mask=at < INPUTS, other=0.0).to(tl.float32)
    if up is not None:
        place = up + row * up_stride + at
        v *= tl.sigmoid(v) * tl.load(place, mask=at < INPUTS, other=0.0).to(tl.float32)
    if norm is not None:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, INPUTS, BLOCK):
            inside = start + columns < INPUTS
            u = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
            squares += u * u
        factor = tl.rsqrt(tl.sum(squares, axis=0) / INPUTS + eps)
        v *= factor * gain.to(tl.float32)
    tl.store(h + row * INPUTS + at, v.to(h.dtype.element_ty), mask=at < INPUTS)


@triton.jit
def tile_kernel(
    x, x_stride, weight, residual, y, tokens, outputs, INPUTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT rows of W for ROWS tokens.

    The tile is y transposed, so W's rows are the product's long side. Programs of the same rows run
    side by side, so memory is read once.
    """
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, BLOCK_IN)
    matrix, w_row = matrix_of(weight, 0), out.to(tl.int64)[:, None]
    real = (out < outputs)[:, None]
    wait_for_previous(PDL)
    let_next_start(PDL)
    sums = tl.zeros((BLOCK_OUT, ROWS), tl.float32)
    for start in range(0, INPUTS, BLOCK_IN):
        at = start + columns
        mask = (at < INPUTS)[:, None] & (row < tokens)[None, :]
        # (BLOCK_IN, ROWS)
        v = tl.load(x + row[None, :] * x_stride + at[:, None], mask=mask, other=0.0)
        sums = add_product(sums, matrix, w_row, real, columns[None, :], start, INPUTS, weight, v)
    mask = (out < outputs)[:, None] & (row < tokens)[None, :]
    place = row[None, :] * outputs + out[:, None]
    if residual is not None:
        sums += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=mask)
