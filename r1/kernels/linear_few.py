"""A projection of a few tokens, 4 bits: a dot product for each token.

A program has rows of W, and up to ROWS tokens, each a fixed-point vector (fixed.py). It loads each
weight once for all of them.

Shapes: N tokens; out and in are W's rows and columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.chip import let_next_start, wait_for_previous
from r1.kernels.fixed import GROUP, columns_fixed, times_fixed
from r1.kernels.tiles import load, matrix_of


@triton.jit
def nothing(ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, GROUPS: tl.constexpr):
    """The sums of ROWS tokens, before the first column. (Triton can't unpack: no (*a, b).)"""
    sums = (tl.zeros((BLOCK_OUT, GROUPS), tl.float32),)
    for _ in tl.static_range(1, ROWS):
        more = tl.zeros((BLOCK_OUT, GROUPS), tl.float32)
        sums = sums + (more,)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit
def add_vectors(
    sums, w, x, vectors, start, weight, LENGTH: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The sums of ROWS tokens, and the products of a loaded tile, whose columns begin at `start`,
    with their vectors of `Fixed` x added.
    """
    more = ()
    for row in tl.static_range(ROWS):
        v = columns_fixed(x, vectors[row], start, LENGTH, COLUMNS)
        value = sums[row] + times_fixed(w, v, weight)
        more = more + (value,)  # type: ignore[assignment]  # noqa: RUF005
    return more


@triton.jit
def few_kernel(
    x, weight, residual, y, tokens, outputs, INPUTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_OUT rows of W for ROWS tokens (the last one again, where there are fewer). x is a
    `Fixed`, and normed.

    Weights depend on no kernel, so the first tile is loaded before the wait.
    """
    let_next_start(PDL)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = tl.program_id(1) * ROWS
    d = tl.arange(0, BLOCK_IN)[None, :]
    matrix, w_row = matrix_of(weight, 0), out.to(tl.int64)[:, None]
    real = (out < outputs)[:, None]
    w = load(matrix, w_row, real, d, 0, INPUTS, weight)  # (BLOCK_OUT, BLOCK_IN)
    wait_for_previous(PDL)
    vectors = ()
    for row in tl.static_range(ROWS):
        token = tl.minimum(first + row, tokens - 1)
        vectors = vectors + (token,)  # type: ignore[assignment]  # noqa: RUF005
    sums = nothing(ROWS, BLOCK_OUT, BLOCK_IN // GROUP)
    for start in range(0, INPUTS, BLOCK_IN):
        sums = add_vectors(sums, w, x, vectors, start, weight, INPUTS, BLOCK_IN, ROWS)
        w = load(matrix, w_row, real, d, start + BLOCK_IN, INPUTS, weight)
    for row in tl.static_range(ROWS):
        total = tl.sum(sums[row], axis=1)  # (BLOCK_OUT,)
        place = (first + row).to(tl.int64) * outputs + out
        inside = out < tl.where(first + row < tokens, outputs, 0)
        if residual is not None:
            total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)
