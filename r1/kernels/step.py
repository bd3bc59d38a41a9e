"""The inputs that all layers of a decode step share, in one kernel: positions and rotations.

r1/model/transformer.py and r1/model/rope.py make them with a dozen small operators. That is nothing
beside an eager step, but 1% of a captured one. For the same reason the
kernel also adds the new tokens to the rows' lengths.

Shapes: B rows, S new tokens of a row, R rope dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.chip import Chip, power_of_two, wait_for_previous
from r1.model.rope import angles


def begin_step(
    chip: Chip, lengths: Tensor, new: int, frequency: Tensor, factor: float,
    interleave: bool = True, grow: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """int64 lengths (B,), fp32 frequency (R/2,) -> positions of `new` tokens after each row, int64
    (B, S), and cos and sin, fp32 (B, S, 1, R), as r1/model/rope.py's `angles` makes them. With
    `grow` the lengths grow by `new`.
    """
    rows, rope = len(lengths), 2 * len(frequency)
    positions = lengths.new_empty(rows, new)
    cos, sin = frequency.new_empty(rows, new, 1, rope), frequency.new_empty(rows, new, 1, rope)
    chip.run(
        step_kernel, (rows,), lengths, frequency, factor, positions, cos, sin, NEW=new, ROPE=rope,
        PAD=power_of_two(rope), INTERLEAVE=interleave, GROW=grow, warps=1,
    )  # fmt: skip
    return positions, cos, sin


def begin_step_torch(
    lengths: Tensor, new: int, frequency: Tensor, factor: float, interleave: bool = True,
    grow: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The twin."""
    positions = lengths[:, None] + torch.arange(new, device=lengths.device)
    if grow:
        lengths += new
    return positions, *angles(positions, frequency, factor, interleave)


@triton.jit
def step_kernel(
    lengths, frequency, factor, positions, cos, sin, NEW: tl.constexpr, ROPE: tl.constexpr,
    PAD: tl.constexpr, INTERLEAVE: tl.constexpr, GROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The NEW tokens of one row: a few, for which the loop is unrolled.

    It never lets the next kernel start early. The attention reads positions before its own wait, so
    they must be older than any kernel that may still be running then (chip.py).
    """
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row)
    r = tl.arange(0, PAD)
    half: tl.constexpr = ROPE // 2
    pair = r // 2 if INTERLEAVE else r % half
    turns = tl.load(frequency + pair, mask=r < ROPE, other=0.0)
    sign = tl.where(r % 2 == 0 if INTERLEAVE else r < half, -factor, factor)
    for n in tl.static_range(NEW):
        token = row * NEW + n
        theta = (length + n).to(tl.float32) * turns
        tl.store(positions + token, length + n)
        tl.store(cos + token * ROPE + r, tl.cos(theta) * factor, mask=r < ROPE)
        tl.store(sin + token * ROPE + r, tl.sin(theta) * sign, mask=r < ROPE)
    if GROW:
        tl.store(lengths + row, length + NEW)
