"""A projection of a few tokens: a dot product for each token.

A program has rows of W, and up to ROWS tokens. It loads and unpacks each weight once for all of
them. With FIXED each token is a fixed-point vector (fixed.py); otherwise products are in fp32.

Shapes: N tokens; out and in are W's rows and columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.chip import let_next_start, wait_for_previous
from r1.kernels.fixed import columns_fixed, times_fixed
from r1.kernels.packed import times_unpacked, unpacked
from r1.kernels.tiles import load, matrix_of
from r1.kernels.vectors import columns_of


@triton.jit
def nothing(w, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    """The sums of ROWS tokens, before the first column: one for the columns of a scale of operand
    w. (Triton can't unpack: no (*a, b).)
    """
    wide: tl.constexpr = BLOCK_IN // min(w.TOGETHER, BLOCK_IN)
    sums = (tl.zeros((BLOCK_OUT, wide), tl.float32),)
    for _ in tl.static_range(1, ROWS):
        more = tl.zeros((BLOCK_OUT, wide), tl.float32)
        sums = sums + (more,)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit
def vector_of(
    x, stride, token, start, w, LENGTH: tl.constexpr, COLUMNS: tl.constexpr, FIXED: tl.constexpr
):
    """A token's columns from `start` on, zeros beyond the last: fixed-point, or fp32 (1, COLUMNS).

    Rows of a plain x are `stride` apart.
    """
    if FIXED:
        v = columns_fixed(x, token, start, LENGTH, COLUMNS)
    else:
        v = columns_of(x + token * stride, 0, 1, start, LENGTH, w, 1, COLUMNS).to(tl.float32)
    return v


@triton.jit
def add_vectors(
    sums, loaded, x, stride, vectors, start, weight, LENGTH: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """The sums of ROWS tokens, and the products of a loaded tile, whose columns begin at `start`,
    with their `vectors` of x added.
    """
    tile, more = loaded if FIXED else unpacked(loaded, weight), ()
    for row in tl.static_range(ROWS):
        v = vector_of(x, stride, vectors[row], start, weight, LENGTH, COLUMNS, FIXED)
        product = times_fixed(tile, v, weight) if FIXED else times_unpacked(tile, v, weight)
        value = sums[row] + product
        more = more + (value,)  # type: ignore[assignment]  # noqa: RUF005
    return more


@triton.jit
def few_kernel(
    x, x_stride, weight, residual, y, tokens, outputs, INPUTS: tl.constexpr, ROWS: tl.constexpr,
    FIXED: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT rows of W for ROWS tokens (the last one again, where there are fewer). With FIXED x
    is a `Fixed`. A norm was applied to it.

    Programs of the same rows of W run side by side, so memory is read once. Weights depend on no
    kernel, so the first tile is loaded before the wait.
    """
    let_next_start(PDL)
    parts = tl.cdiv(tokens, ROWS)
    out = tl.program_id(0) // parts * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = tl.program_id(0) % parts * ROWS
    d = tl.arange(0, BLOCK_IN)[None, :]
    matrix, w_row = matrix_of(weight, 0), out.to(tl.int64)[:, None]
    real = (out < outputs)[:, None]
    w = load(matrix, w_row, real, d, 0, INPUTS, weight)  # (BLOCK_OUT, BLOCK_IN)
    wait_for_previous(PDL)
    vectors = ()
    for row in tl.static_range(ROWS):
        token = tl.minimum(first + row, tokens - 1).to(tl.int64)
        vectors = vectors + (token,)  # type: ignore[assignment]  # noqa: RUF005
    sums = nothing(weight, ROWS, BLOCK_OUT, BLOCK_IN)
    for start in range(0, INPUTS, BLOCK_IN):
        sums = add_vectors(
            sums, w, x, x_stride, vectors, start, weight, INPUTS, BLOCK_IN, ROWS, FIXED
        )
        w = load(matrix, w_row, real, d, start + BLOCK_IN, INPUTS, weight)
    for row in tl.static_range(ROWS):
        total = tl.sum(sums[row], axis=1)  # (BLOCK_OUT,)
        place = (first + row).to(tl.int64) * outputs + out
        inside = out < tl.where(first + row < tokens, outputs, 0)
        if residual is not None:
            total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)
