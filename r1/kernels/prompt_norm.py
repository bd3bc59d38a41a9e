"""A prompt's norm before a sparse layer, which also rounds: one pass over x.

torch.compile makes two kernels of it: the first one adds up each token's squares, and the second
one reads x again, as the groups of a scale are no whole rows. Here a program has a token's row.

Shapes: N tokens, D hidden_size, G groups of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.chip import Chip, let_next_start, power_of_two, wait_for_previous
from r1.kernels.rounded import GROUP, empty, rounded
from r1.model.layers import RMSNorm


def norm_and_round(norm: RMSNorm, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """x (N, D) of G whole groups -> `norm(x)` (N, D), and what `as_fp8` makes of that: FP8 numbers
    (N, G, GROUP) and their scales, fp32 (N, G, 1). (r1/storage/activations.py)
    """
    normed, planes, scales = _operator(x, norm.weight, norm.eps)
    return normed, [planes.unflatten(-1, (-1, GROUP.value)), scales.unsqueeze(-1)]


@torch.library.custom_op("r1::norm_and_round", mutates_args=())
def _operator(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`launch`, which torch.compile takes as a whole."""
    return launch(Chip.of(x.device), x, gain, eps)


@_operator.register_fake
def _(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _results(x)


def launch(chip: Chip, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D), gain (D,) -> normed (N, D), e4m3 (N, D), scales (N, G)."""
    (tokens, length), made = x.shape, _results(x)
    block = power_of_two(length, GROUP.value)
    chip.run(
        norm_kernel, (tokens,), x, x.stride(0), gain, eps, *made, LENGTH=length, BLOCK=block,
        warps=max(1, min(8, block // 512)),
    )  # fmt: skip
    return made


def _results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    planes, scales = empty(x, *x.shape)
    return x.new_empty(x.shape), planes, scales


@triton.jit
def norm_kernel(
    x, x_stride, gain, eps, normed, planes, scales, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token. It is rounded to x's dtype before and after the gain, as layers.py does."""
    token, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    gains = tl.load(gain + d, mask=d < LENGTH, other=0.0).to(tl.float32)  # before the wait: weights
    wait_for_previous(PDL)
    let_next_start(PDL)
    v = tl.load(x + token * x_stride + d, mask=d < LENGTH, other=0.0).to(tl.float32)
    v = v * tl.rsqrt(tl.sum(v * v, axis=0) / LENGTH + eps)
    h = (v.to(x.dtype.element_ty).to(tl.float32) * gains).to(x.dtype.element_ty)
    tl.store(normed + token * LENGTH + d, h, mask=d < LENGTH)
    q, scale = rounded(tl.reshape(h.to(tl.float32), (BLOCK // GROUP, GROUP)), 1)
    number = tl.arange(0, BLOCK // GROUP)
    at = number[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(planes + token * LENGTH + at, q.to(tl.float8e4nv), mask=at < LENGTH)
    place = scales + token * (LENGTH // GROUP) + number
    tl.store(place, scale, mask=number < LENGTH // GROUP)
