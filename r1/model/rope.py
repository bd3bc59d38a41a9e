"""Rotary positions with YaRN's stretched wavelengths, on interleaved pairs.

Rotation by position p multiplies pair i, read as the complex number x[2i] + j x[2i+1], by exp(j p
w_i). Because the scores see only the difference of two positions, neither the layout of the pairs
nor the start of the count matters to the model, but the checkpoint's weights are made for
*interleaved* pairs (halves would need permuted weights).

Shapes: B batch, S sequence, H heads, R rope dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r1.model.config import Config


def softmax_scale(config: Config) -> float:
    """What multiplies q.k: `qk_head_dim^-0.5`, times YaRN's temperature squared."""
    return config.attention.qk_head_dim**-0.5 * (
        config.attention.yarn.softmax_factor if config.attention.yarn else 1.0
    )


def frequencies(config: Config) -> Tensor:
    """The angle (radians) that one position adds to each pair: fp32 (R/2,), on the CPU.

    YaRN leaves pairs that turn more than `beta_fast` times within the *original* context as they
    are, divides those that turn less than `beta_slow` times by `factor`, and blends linearly
    between (arXiv 2309.00071, section 3.2). Once configured it holds at every length: the model was
    trained with it."""
    dim, base, yarn = (
        config.attention.qk_rope_head_dim,
        config.attention.rope_theta,
        config.attention.yarn,
    )
    plain = 1.0 / base ** (
        torch.arange(0, dim, 2, dtype=torch.float32) / dim
    )  # (R/2,) falling from 1
    if yarn is None:
        return plain

    def pair_that_turns(times: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001  # Kimi-K2: beta_fast = beta_slow, a step
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(
        0, 1
    )  # 0 fast ... 1 slow
    return plain * (1 - stretched) + plain / yarn.factor * stretched


def angles(positions: Tensor, frequency: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Integer positions (B, S) and frequencies (R/2,) -> what `rotate` takes: cos and signed sin,
    fp32 (B, S, 1, R).

    Both are multiplied by `factor`. Computed and not looked up: no table limits the length, and R
    cosines are nothing beside a layer."""
    theta = positions[..., None, None].float() * frequency  # (B, S, 1, R/2)
    cos, sin = theta.cos() * factor, theta.sin() * factor
    return torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((-sin, sin), dim=-1).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x (B, S, H, R): (a, b) becomes (a cos - b sin, b cos + a
    sin). In fp32, out in x's dtype.

    The sign stands in `sin`, so a pair is multiplied, swapped, and added: few kernels in eager
    mode."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (b, a)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
