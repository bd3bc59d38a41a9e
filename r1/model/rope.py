"""Rotary positions (RoPE), with YaRN and Llama 3's rule for contexts longer than the original.

At position p, pair i of a vector x is rotated by the angle p * frequency[i]. A score then depends
only on the difference of two positions. R1's weights are made for interleaved pairs, (x[2i],
x[2i + 1]). Grouped-query models pair the halves, x[i] with x[i + R/2]: see gqa.py.

Shapes: B rows, S tokens of a row, H heads, R rope dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r1.model.config import AttentionShape, GroupedShape, Llama3, Yarn
from r1.model.step import Step


def softmax_scale(shape: AttentionShape) -> float:
    """The factor of the scores: `qk_head_dim^-0.5`, times YaRN's factor (config.py)."""
    return shape.qk_head_dim**-0.5 * (shape.yarn.softmax_factor if shape.yarn else 1.0)


def frequencies(shape: AttentionShape | GroupedShape) -> Tensor:
    """The angle (radians) that one position adds to each pair: fp32 (R/2,), on the CPU.

    For long contexts the frequencies of slow pairs are divided by a factor, those of fast pairs
    are kept, and between the two is a linear blend. Short prompts use it too.
    """
    dim, base = shape.qk_rope_head_dim, shape.rope_theta  # dim is R
    even = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")
    plain = 1.0 / base ** (even / dim)  # (R/2,) falling from 1
    if shape.yarn is not None:
        stretched, factor = stretched_by_yarn(shape.yarn, dim, base), shape.yarn.factor
    elif isinstance(shape, GroupedShape) and shape.llama3 is not None:
        stretched, factor = stretched_by_llama3(shape.llama3, plain), shape.llama3.factor
    else:
        return plain
    return plain * (1 - stretched) + plain / factor * stretched


def stretched_by_llama3(llama3: Llama3, plain: Tensor) -> Tensor:
    """How far each pair is stretched, 0 to 1: fp32 (R/2,), from the plain frequencies (R/2,).

    0 for pairs that turn at least `high_freq_factor` times within the original context, 1 for those
    that turn at most `low_freq_factor` times (the Llama 3.1 release's apply_scaling).
    """
    turns = llama3.original_max_position_embeddings * plain / (2 * math.pi)  # (R/2,)
    width = llama3.high_freq_factor - llama3.low_freq_factor
    return ((llama3.high_freq_factor - turns) / width).clamp(0, 1)


def stretched_by_yarn(yarn: Yarn, dim: int, base: float) -> Tensor:
    """How far each pair is stretched, 0 to 1: fp32 (R/2,). `dim` is R (arXiv 2309.00071, 3.2).

    0 for pairs that turn more than `beta_fast` times within the *original* context, 1 for those
    that turn less than `beta_slow` times.
    """

    def pair_that_turns(times: float) -> float:  # solves base^(-2 pair / dim) = 1 / per_radian
        per_radian = yarn.original_max_position_embeddings / (times * 2 * math.pi)  # positions
        return dim * math.log(per_radian) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)  # dim - 1: as DeepSeek's code
    width = high - low if high != low else 0.001  # low = high: a step, no division by 0
    pair = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    return ((pair - low) / width).clamp(0, 1)


def angles(
    positions: Tensor, frequency: Tensor, factor: float, interleave: bool = True
) -> tuple[Tensor, Tensor]:
    """Positions (B, S) and frequencies (R/2,) -> cos and signed sin, fp32 (B, S, 1, R).

    Both are multiplied by `factor`. -sin stands at the first place of each pair, because of
    `rotate`: at even places or, without `interleave`, in the first half.
    """
    theta = positions[..., None, None].float() * frequency  # (B, S, 1, R/2)
    cos, sin = theta.cos() * factor, theta.sin() * factor
    dim = -1 if interleave else -2
    return (torch.stack((cos, cos), dim).flatten(-2), torch.stack((-sin, sin), dim).flatten(-2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of x (B, S, H, R): (a, b) -> (a cos - b sin, b cos + a sin).

    Computed in fp32, returned in x's dtype. `sin` has the minus of -b sin already (see `angles`).
    """
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (b, a)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def rotate_each(q_pe: Tensor, k_pe: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Rotate the queries (B, S, H, R) and the key (B, S, R) that all heads share."""
    k_pe = rotate(k_pe[:, :, None], step.cos, step.sin)[:, :, 0]
    return rotate(q_pe, step.cos, step.sin), k_pe


def rotate_jointly(q_pe: Tensor, k_pe: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """The same in one call, with the key as one more head: half as many GPU kernels."""
    pe = rotate(torch.cat((q_pe, k_pe[:, :, None]), dim=2), step.cos, step.sin)  # (B, S, H + 1, R)
    return pe[:, :, :-1], pe[:, :, -1]
