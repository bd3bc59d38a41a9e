"""A prompt's product with a packed matrix: directly, or with the matrix made dense in one pass.

What a weight of b bits costs N tokens on an H100, in picoseconds. Memory moves 3 TB/s, and torch's
product does some 550 TFLOP/s of the 780 that the chip has in bf16, 2 N operations a weight.

| way | bytes moved | ps |
|---|---|---|
| dense, then torch's product | b/8 read, 2 written, 2 read | (b/8 + 2) / 3 + max(2/3, 0.004 N) |
| directly | b/8 read | max(b/8 / 3, 0.011 N) |

0.011 ps is what linear.py's kernels should take, which unpack a tile of W again for every few
tokens: those of experts, alike, took 0.008 to 0.018 ps (README.md here). So both ways should take
the same time for about 140 tokens of int4, and 150 of FP8 and int8.
Where x may be one e4m3 number (`quant_activations`), the chip multiplies FP8 as it is, of any
number of tokens: then a weight takes max(1/3, 0.001 N) ps at the 1,979 TFLOP/s that it has in FP8.
(The storages make a matrix dense by several torch operations, each a pass over memory: of int4 some
30 bytes a weight.)

Shapes: out and in are a matrix's rows and columns; N tokens, of all rows of a batch.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from r1.kernels.chip import Chip, ceil_div, let_next_start, power_of_two, wait_for_previous
from r1.kernels.fixed import Fixed
from r1.kernels.in_graph import input_of, lead_of, made_of, parts_of
from r1.kernels.linear import linear
from r1.kernels.rounded import takes_one_number
from r1.kernels.tiles import load_tile, matrix_of, operand, unpacks
from r1.storage.activations import as_fp8, given, rounded, takes
from r1.storage.matrix import Matrix

FEW_TOKENS = 64
"""Up to so many tokens W is multiplied directly. That is half of what the table above says: a tile
has at most 64 tokens, so 65 tokens would take as long as 128. It is not timed yet."""
ROWS, COLUMNS = 16, 256
"""Of W, for a program that makes them dense: a thread of 128 reads 16 bytes of int4."""


def multiply(
    chip: Chip, matrix: Matrix, x: Tensor, round_x: bool = False, residual: Tensor | None = None
) -> Tensor:
    """W (out, in) and x (..., in) -> x W^T (..., out), in x's dtype. Of a matrix whose rows lie on
    several devices, each multiplies its own. `round_x`: x becomes FP8 for a matrix of FP8.
    `residual` (..., out) is added, where all rows lie here.

    torch.compile takes the product as a whole (in_graph.py).
    """
    return matrix.through(partial(_multiply, chip, x, round_x, residual))


def _multiply(
    chip: Chip, x: Tensor, round_x: bool, residual: Tensor | None, matrix: Matrix
) -> Tensor:
    # A dense matrix needs no unpacking. And some packed ones have no format in tiles.py: those with
    # g_idx or an odd number of 4-bit columns. A decode step's blocks refuse them, but an output
    # head may have them. Both are left to the storage.
    if not unpacks(matrix):
        return _added(matrix.matmul(given(matrix, x) if round_x else x), residual)
    fp8 = round_x and takes_one_number(chip.ptx, x, matrix)
    if round_x and takes(matrix) and not fp8:
        x = rounded(x)
    if torch.compiler.is_compiling():
        # Rounded in the graph, x costs no pass of its own: what makes it rounds it.
        return _product(as_fp8(x) if fp8 else [x], *parts_of(matrix), x.dtype, residual)
    flat = None if residual is None else residual.flatten(0, -2)
    return _unpacked(chip, x.flatten(0, -2), matrix, None, fp8, flat).unflatten(0, x.shape[:-1])


def _added(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else residual + y


@torch.library.custom_op("r1::packed_product", mutates_args=())
def _product(
    x: list[Tensor], parts: list[Tensor], how: str, dtype: torch.dtype, residual: Tensor | None
) -> Tensor:
    """`x`: see input_of; `parts` and `how`: see parts_of."""
    like, fixed = input_of(x, dtype)
    chip, matrix = Chip.of(like.device), made_of(parts, how, like.shape[1])
    flat = None if residual is None else residual.flatten(0, -2)
    y = _unpacked(chip, like, matrix, fixed, fixed is not None, flat)
    return y.unflatten(0, lead_of(x))


@_product.register_fake
def _(
    x: list[Tensor], parts: list[Tensor], how: str, dtype: torch.dtype, residual: Tensor | None
) -> Tensor:
    return x[0].new_empty(*lead_of(x), parts[0].shape[-2], dtype=dtype)


def _unpacked(
    chip: Chip, x: Tensor, matrix: Matrix, fixed: Fixed | None, fp8: bool, residual: Tensor | None
) -> Tensor:
    """x (N, in) by a packed matrix with a format, and the residual (N, out) if there is one. `fp8`:
    kernels round x, or `fixed` is x.
    """
    if len(x) > FEW_TOKENS and not fp8:
        return _added(F.linear(x, dense(chip, matrix, x.dtype)), residual)
    residual = None if residual is None else residual.contiguous()
    return linear(chip, x.contiguous(), matrix, residual=residual, fixed=fixed, round_x=fp8)


def dense(chip: Chip, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """A packed matrix (out, in) in `dtype`: the same bits as its own `dense` gives."""
    outputs, inputs = matrix.shape
    packed = operand(matrix, chip.ptx)
    made = torch.empty(outputs, inputs, dtype=dtype, device=packed.weight.device)
    columns = min(COLUMNS, power_of_two(inputs, 16))
    chip.run(
        dense_kernel, (ceil_div(inputs, columns), ceil_div(outputs, ROWS)), packed, made, outputs,
        INPUTS=inputs, BLOCK_OUT=ROWS, BLOCK_IN=columns, warps=4,
    )  # fmt: skip
    return made


@triton.jit
def dense_kernel(
    w, made, outputs, INPUTS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_IN columns of BLOCK_OUT rows. Programs side by side write to memory side by side."""
    first = tl.program_id(0) * BLOCK_IN
    column = tl.arange(0, BLOCK_IN)[None, :]
    row = (tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)[:, None]
    real = row < outputs
    tile = load_tile(matrix_of(w, 0), row, real, column, first, INPUTS, w)  # (BLOCK_OUT, BLOCK_IN)
    wait_for_previous(PDL)
    let_next_start(PDL)
    place = made + row * INPUTS + first + column
    tl.store(place, tile.to(made.dtype.element_ty), mask=real & (first + column < INPUTS))
