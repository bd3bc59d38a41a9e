"""Columns of vectors as a tile of FP8 weights needs them (r1/kernels/vectors.py), on a GPU or in
Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need the triton package: pip install triton")

import test_narrow
import triton
import triton.language as tl
from test_narrow import DEVICE, stored

from r1.kernels.tiles import Operand, operand
from r1.kernels.vectors import columns_of
from r1.storage.spec import Spec

pytestmark = test_narrow.ABLE
SPECS = {"fp8": Spec("fp8", 128, 128), "int8": Spec("int8", 0, 0), "int4": Spec("int4", 1, 32)}
"""Kinds of weights whose threads have 16, 16 and 32 columns side by side."""


@triton.jit
def copy_kernel(  # type: ignore[no-untyped-def]
    x, stride, real, first, limit, w, y, COUNT: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """What columns_of gives, into y (COUNT, COLUMNS)."""
    v = columns_of(x, stride, real, first, limit, w, COUNT, COLUMNS)
    row, at = tl.arange(0, COUNT)[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(y + row * COLUMNS + at, v)


def weights(kind: str) -> Operand:
    if kind == "dense":
        return operand(torch.randn(8, 256, device=DEVICE).bfloat16())
    return operand(stored(SPECS[kind], 8, 256))


def columns(x: Tensor, real: int, first: int, limit: int, kind: str, size: int) -> Tensor:
    y = torch.full((len(x), size), float("nan"), dtype=x.dtype, device=DEVICE)
    copy_kernel[(1,)](
        x, x.stride(0), real, first, limit, weights(kind), y, COUNT=len(x), COLUMNS=size
    )
    return y


@pytest.mark.parametrize("kind", ["dense", "fp8", "int8", "int4"])
@pytest.mark.parametrize(("first", "limit"), [(0, 256), (64, 256), (128, 200), (192, 250)])
def test_columns_of_vectors(kind: str, first: int, limit: int) -> None:
    """In their order, zeros beyond the last column and the last vector, rows that lie apart."""
    torch.manual_seed(0)
    x = torch.randn(4, 300, device=DEVICE).bfloat16()[:, :256]
    right = torch.zeros(4, 128, dtype=x.dtype, device=DEVICE)
    have = min(limit, first + 128) - first
    right[:3, :have] = x[:3, first : first + have]
    assert torch.equal(columns(x, 3, first, limit, kind, 128), right)
