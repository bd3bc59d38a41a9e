"""The grouped matrix product: rows sorted by group, each times its group's matrix.

An operator of ours around torch's. torch infers its shape for bf16 only, and autocast passes it by.

Shapes: M rows, E experts (the groups); out and in are a matrix's rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("r1::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.mT, offs=ends)


@_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("r1::grouped_outer", mutates_args=())
def _grouped_outer(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Each group's y^T x: (M, out) and (M, in) -> (E, out, in)."""
    empty = ends.diff(prepend=ends.new_zeros(1)) == 0
    # A product over no tokens is 0, but on some GPUs torch's kernel leaves it unwritten (pytorch
    # issue 172439).
    return F.grouped_mm(y.mT, x, offs=ends).masked_fill(empty[:, None, None], 0)


@_grouped_outer.register_fake
def _(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], y.shape[1], x.shape[1])


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """y = x W^T in each group, so dx = dy W and dW = dy^T x: grouped products both."""
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return (
        _grouped_mm(grad, weight.mT, ends) if ctx.needs_input_grad[0] else None,
        _grouped_outer(grad, x, ends) if ctx.needs_input_grad[1] else None,
        None,
    )


_grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_remember)


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x (M, in), times their group's weight (E, out, in) -> (M, out).

    Group e owns rows ends[e - 1] to ends[e], int32 (E,). Each weight is read once, without a sync.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _grouped_mm(x, weight, ends)


def expert_by_expert(
    x: Tensor, ends: Tensor, outputs: int, product: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """The same by `product(rows of x, expert)`, of which only experts with rows are read.

    It reads `ends` on the host. So it is for operators of a CPU.
    """
    out, start = x.new_empty(x.shape[0], outputs), 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = product(x[start:end], expert)
        start = end
    return out
