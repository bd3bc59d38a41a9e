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
from torch.nn import functional as F

from r1.storage.joined import whole_of
from r1.storage.matrix import Matrix
from r1.storage.spec import Spec

GROUP = 128
"""Columns of x that have one scale: as wide as a block of R1's weights."""
NEVER = 2**62
FROM_TOKENS = {"prefill": 1, "decode": 64}
"""The table above: the least tokens of a call, by its phase."""
LARGEST, LEAST = 448.0, 1e-30
"""Of e4m3; and of the largest number of a group, which is 0 otherwise: its scale has an inverse."""
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
    columns = x.shape[-1]
    q, scale = _grouped(F.pad(x, (0, -columns % GROUP)))
    return (q * scale).flatten(-2)[..., :columns].to(x.dtype)


def as_fp8(x: Tensor) -> list[Tensor]:
    """x (..., n), of whole groups -> the same numbers as FP8 (..., n), and scales, fp32 (..., n /
    GROUP): the bits of kernels/rounded.py's `round_input`.
    """
    q, scale = _grouped(x)
    return [q.flatten(-2).to(torch.float8_e4m3fn), scale.squeeze(-1)]


def _grouped(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., n), of G whole groups -> e4m3 numbers (..., G, GROUP) and scales (..., G, 1), fp32.

    The scale of a group with NaN or infinity is infinity: its products are no numbers then.
    """
    groups = x.float().unflatten(-1, (-1, GROUP))  # (..., G, GROUP)
    largest = groups.abs().amax(dim=-1, keepdim=True)  # (..., G, 1)
    largest = largest.masked_fill(largest.isnan(), float("inf"))
    safe = largest.where(largest > LEAST, torch.full_like(largest, LARGEST))
    return to_e4m3(groups * (1.0 / (safe * UNIT))), largest * UNIT


def to_e4m3(v: Tensor) -> Tensor:
    """The nearest e4m3 numbers to fp32 ones of -448 to 448, in fp32: 4 bits down to 2^-6, and
    multiples of 2^-9 below. As kernels/narrow.py rounds, to the bit.
    """
    bits = v.view(torch.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).view(torch.float32)
    small = (v * 512.0 + 0.5).floor() / 512.0
    return torch.where(v.abs() < 0.015625, small, normal)
