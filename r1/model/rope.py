"""Rotary positions on interleaved pairs, with YaRN's stretched wavelengths.

Rotation by position p multiplies pair i, read as the complex number x[2i] + j x[2i + 1], by
exp(j p w_i). A score sees only the difference of two positions. The checkpoint's weights are made
for *interleaved* pairs (rotation of halves would need permuted weights).

Shapes: B rows, S tokens of a row, H heads, R rope dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r1.model.config import AttentionShape
from r1.model.step import Step


def softmax_scale(shape: AttentionShape) -> float:
    """The factor of q k: `qk_head_dim^-0.5`, times YaRN's temperature squared."""
    return shape.qk_head_dim**-0.5 * (shape.yarn.softmax_factor if shape.yarn else 1.0)


def frequencies(shape: AttentionShape) -> Tensor:
    """The angle (radians) that one position adds to each pair: fp32 (R/2,), on the CPU.

    YaRN keeps pairs that turn more than `beta_fast` times within the *original* context. It divides
    those that turn less than `beta_slow` times by `factor`, and blends linearly between the two
    (arXiv 2309.00071, section 3.2). It holds at every length, because the model was trained with
    it.
    """
    dim, base, yarn = shape.qk_rope_head_dim, shape.rope_theta, shape.yarn
    even = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")
    plain = 1.0 / base ** (even / dim)  # (R/2,) falling from 1
    if yarn is None:
        return plain

    def pair_that_turns(times: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001  # Kimi-K2: beta_fast = beta_slow, a step
    pair = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    stretched = ((pair - low) / width).clamp(0, 1)  # 0 for fast pairs, 1 for slow ones
    return plain * (1 - stretched) + plain / yarn.factor * stretched


def angles(positions: Tensor, frequency: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Positions (B, S) and frequencies (R/2,) -> cos and signed sin, fp32 (B, S, 1, R).

    Both are multiplied by `factor`. They are computed and not looked up, so no table limits the
    length. sin is negative at even places: see `rotate`.
    """
    theta = positions[..., None, None].float() * frequency  # (B, S, 1, R/2)
    cos, sin = theta.cos() * factor, theta.sin() * factor
    return torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((-sin, sin), dim=-1).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of x (B, S, H, R): (a, b) -> (a cos - b sin, b cos + a sin).

    Computed in fp32, returned in x's dtype. The sign stands in `sin`, so a pair is multiplied,
    swapped and added, which takes few kernels in eager mode.
    """
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (b, a)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def rotate_each(q_pe: Tensor, k_pe: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Rotate the queries (B, S, H, R) and the key (B, S, R) that all heads share."""
    k_pe = rotate(k_pe[:, :, None], step.cos, step.sin)[:, :, 0]
    return rotate(q_pe, step.cos, step.sin), k_pe


def rotate_jointly(q_pe: Tensor, k_pe: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """The same in one call, the key as one more head: half as many kernels."""
    pe = rotate(torch.cat((q_pe, k_pe[:, :, None]), dim=2), step.cos, step.sin)  # (B, S, H + 1, R)
    return pe[:, :, :-1], pe[:, :, -1]
