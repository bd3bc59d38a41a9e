"""The first half of a dense feed-forward: h = silu(gate(x)) up(x), where x is normed first.

For one token a single kernel reads a few rows of `gate` and as many of `up`, so SwiGLU is computed
once for each inner value. In the kernel after it, `down`, every program would compute it for all of
them.
Several tokens multiply by both matrices with linear.py's kernels, and a small one computes SwiGLU.

Shapes: N tokens, D hidden_size, I intermediate_size.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.chip import Chip, ceil_div, let_next_start, wait_for_previous
from r1.kernels.fixed import columns_fixed, fix, storage_sizes, times_fixed
from r1.kernels.linear import gain_columns, linear, linear_torch, normed_columns, prepare
from r1.kernels.linear_launch import LinearLaunch
from r1.kernels.tiles import load, matrix_of, operand, times
from r1.model.layers import MLP, swiglu
from r1.storage.joined import products


def gated(
    chip: Chip, x: Tensor, mlp: MLP, norm: Tensor, eps: float, launch: LinearLaunch | None = None,
    round_x: bool = False,
) -> Tensor:  # fmt: skip
    """x (N, D), RMS-normed with the gain `norm` (D,) -> SwiGLU's inner values (N, I). `round_x`: as
    of `linear`.
    """
    gate, up = mlp.gate_proj.matrix, mlp.up_proj.matrix
    tokens, (inner, inputs) = x.shape[0], gate.shape
    matrices = (operand(gate, chip.ptx), operand(up, chip.ptx))
    stored = storage_sizes(chip, x, inputs, *matrices)
    sizes = (tokens, inputs, 2 * inner, x.itemsize, *stored)
    use = launch or chip.launch(LinearLaunch, *sizes)
    if use.rows == 1 and not round_x:
        h, block = x.new_empty(tokens, inner), max(1, use.outputs // 2)
        fixed = stored[1:2] == (1,)
        given = fix(chip, x, norm, eps) if fixed else x
        chip.run(
            gated_kernel, (ceil_div(inner, block), tokens), given, *matrices, norm, eps, h, inner,
            INPUTS=inputs, FIXED=fixed, BLOCK_OUT=block, BLOCK_IN=use.inputs, warps=use.warps,
            stages=use.stages,
        )  # fmt: skip
        return h
    normed = partial(linear, chip, x, norm=norm, eps=eps, launch=launch, round_x=round_x)
    gates, ups = products(normed, gate, up)  # (N, I) each
    return prepare(chip, gates, up=ups)


def gated_torch(x: Tensor, mlp: MLP, norm: Tensor, eps: float, round_x: bool = False) -> Tensor:
    """The twin."""
    normed = partial(linear_torch, x, norm=norm, eps=eps, round_x=round_x)
    return swiglu(*products(normed, mlp.gate_proj.matrix, mlp.up_proj.matrix))


GATED = {"torch": gated_torch, "triton": gated}


@triton.jit
def gated_kernel(
    x, gate, up, norm, eps, h, outputs, INPUTS: tl.constexpr, FIXED: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token, BLOCK_OUT inner values: as linear.py's `vector_kernel`, with rows of two matrices.

    Weights depend on no kernel, so the first tiles are loaded before the wait.
    """
    let_next_start(PDL)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_IN)
    gates, ups = matrix_of(gate, 0), matrix_of(up, 0)
    w_row, real = out.to(tl.int64)[:, None], (out < outputs)[:, None]
    g = load(gates, w_row, real, d[None, :], 0, INPUTS, gate)  # (BLOCK_OUT, BLOCK_IN)
    u = load(ups, w_row, real, d[None, :], 0, INPUTS, up)  # (BLOCK_OUT, BLOCK_IN)
    gain = gain_columns(norm, d, INPUTS)
    wait_for_previous(PDL)
    gate_sums = tl.zeros((BLOCK_OUT, BLOCK_IN // min(gate.TOGETHER, BLOCK_IN)), tl.float32)
    up_sums = tl.zeros((BLOCK_OUT, BLOCK_IN // min(up.TOGETHER, BLOCK_IN)), tl.float32)
    squares = tl.zeros((BLOCK_IN,), tl.float32)
    whole = columns_fixed(x, row, 0, INPUTS, BLOCK_IN) if FIXED else None
    for start in range(0, INPUTS, BLOCK_IN):
        if FIXED:
            gate_sums += times_fixed(g, whole, gate)
            up_sums += times_fixed(u, whole, up)
            whole = columns_fixed(x, row, start + BLOCK_IN, INPUTS, BLOCK_IN)
        else:
            v, squares = normed_columns(x + row * INPUTS, norm, gain, squares, start + d, INPUTS)
            gain = gain_columns(norm, start + BLOCK_IN + d, INPUTS)
            gate_sums += times(g, v[None, :], gate)
            up_sums += times(u, v[None, :], up)
        g = load(gates, w_row, real, d[None, :], start + BLOCK_IN, INPUTS, gate)
        u = load(ups, w_row, real, d[None, :], start + BLOCK_IN, INPUTS, up)
    factor = 1.0 if FIXED else tl.rsqrt(tl.sum(squares, axis=0) / INPUTS + eps)
    a, b = tl.sum(gate_sums, axis=1) * factor, tl.sum(up_sums, axis=1) * factor  # (BLOCK_OUT,)
    inner = a * tl.sigmoid(a) * b
    tl.store(h + row * outputs + out, inner.to(h.dtype.element_ty), mask=out < outputs)
