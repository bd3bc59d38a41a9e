"""W8A8: the inputs of products with FP8 matrices become FP8, too (V3 paper, section 3.3).

Each number of x becomes one e4m3 number, and each GROUP columns of a token share an fp32 scale, by
which the largest of them is 448. So a chip that multiplies FP8 takes both factors as they are: half
the products of kernels/narrow.py, which keeps what bf16 has of x. The price is that 4 bits are left
of each number. `rounded` gives the numbers that these stand for: what any product makes of them is
what such a chip computes.

| phase | x is rounded |
|---|---|
| prefill | always |
| decode | in steps of at least 64 tokens, all rows together |

Fewer tokens wait for the weights' bytes, and not for products. That is of the layers' projections
and experts; the output head's x is never rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.storage.joined import whole_of
from r1.storage.matrix import Matrix
from r1.storage.spec import Spec

GROUP = 128
"""Columns of x that have one scale: as wide as a block of R1's weights."""
NEVER = 2**62
FROM_TOKENS = {"prefill": 1, "decode": 64}
"""The table above: the least tokens of a call, by its phase."""
LARGEST, LEAST = 448.0, 1e-30
"""Of e4m3; and what the largest number of a group counts for if it is less: a scale has an inverse.
"""
UNIT = 1.0 / LARGEST
"""The scale of a group whose largest number is 1. Scales are multiplied by it: compilers divide by
a constant in ways of their own, and a product has the same bits everywhere."""


def fits(spec: Spec | None) -> bool:
    """Whether the inputs of a matrix that is stored so are rounded: one of its scales is shared by
    a whole number of groups.
    """
    return spec is not None and spec.kind == "fp8" and spec.columns % GROUP == 0


def takes(*matrices: Matrix) -> bool:
    """The same of matrices."""
    return all(fits(stored_as(each)) for each in matrices)


def stored_as(matrix: Matrix) -> Spec | None:
    """How a matrix is stored, or the joined one that it is a part of. None: as plain numbers."""
    return whole_of(matrix).spec


def given(matrix: Matrix, x: Tensor) -> Tensor:
    """x (..., in) as a product with the matrix takes it: rounded, or as it is."""
    return rounded(x) if takes(matrix) else x


def multiply(matrix: Matrix, x: Tensor) -> Tensor:
    """W (out, in) and x (..., in) -> x W^T (..., out), of the rounded x."""
    return matrix.matmul(given(matrix, x))


def rounded(x: Tensor) -> Tensor:
    """x (..., n) -> the e4m3 numbers times their scales, (..., n), in x's dtype.

    The last group may be shorter. A group with NaN or infinity is NaN.
    """
    # Not padded: of bf16, the C++ compiler of torch 2.13 leaves the padding unwritten.
    rest = x.shape[-1] % GROUP
    whole, last = x.split([x.shape[-1] - rest, rest], dim=-1)
    groups = [whole.unflatten(-1, (-1, GROUP)), *([last.unsqueeze(-2)] if rest else [])]
    numbers = [(to_e4m3(v) * scale).flatten(-2) for v, scale in map(_scaled, groups)]
    return torch.cat(numbers, dim=-1).to(x.dtype)


def as_fp8(x: Tensor) -> list[Tensor]:
    """x (..., n), of G whole groups -> FP8 numbers (..., G, GROUP) and their scales, fp32 (..., G,
    1): as kernels/rounded.py's `round_input` rounds.

    torch.compile makes one pass of it, because both have groups as a dimension, and the conversion
    is one operation. (For sm_89, Triton 3.6 converts by way of fp16, which it cuts numbers to: some
    of those half-way between two e4m3 ones get the other neighbour.)
    """
    v, scale = _scaled(x.unflatten(-1, (-1, GROUP)))
    return [v.to(torch.float8_e4m3fn), scale]


def _scaled(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Groups (..., G, any) -> numbers up to LARGEST, fp32 (..., G, any), which are not rounded yet,
    and their scales, fp32 (..., G, 1).

    The scale of a group with NaN or infinity is none, either: so are its products then.
    """
    groups = groups.float()
    largest = groups.abs().amax(dim=-1, keepdim=True)  # (..., G, 1)
    return groups * (largest.clamp(min=LEAST) * UNIT).reciprocal(), largest * UNIT


EVEN = 1.5 * 2.0**14
"""Added to a small number, it leaves multiples of 2^-9: fp32 has no more bits there."""


def to_e4m3(v: Tensor) -> Tensor:
    """The nearest e4m3 numbers to fp32 ones of -448 to 448, in fp32: 4 bits down to 2^-6, and
    multiples of 2^-9 below; between two, the even one. As kernels/narrow.py and torch's own
    conversion round, and by operations that any chip's compiler has.
    """
    bits = v.view(torch.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).view(torch.float32)
    small = (v + EVEN) - EVEN
    return torch.where(v.abs() < 0.015625, small, normal)
