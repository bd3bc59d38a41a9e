"""R1's FP8 storage: e4m3 weights with one fp32 scale for each block of 128 x 128 (V3 paper, section
3.3).

A matrix (out, in) has a grid of ceil(out / 128) x ceil(in / 128) scales, named `weight_scale_inv`:
what *multiplies* the stored numbers. Blocks at the lower and right edges are cropped.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from r1.errors import InputError

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
BAND_BYTES = 4 * 2**20
"""How much fp32 scratch a conversion takes at a time: what stays in a CPU's cache, and needn't be
had anew from the system."""


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """The shape of the scales of a matrix (out, in)."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def part(scale: Tensor, block: tuple[int, int], rows: slice, columns: slice) -> Tensor:
    """The scales of a part of a matrix, which must start at whole blocks. Raises InputError."""
    if rows.start % block[0] or columns.start % block[1]:
        raise InputError(f"a cut at ({rows.start}, {columns.start}) splits a block of {block}")
    (height, width), (first, left) = block, (rows.start // block[0], columns.start // block[1])
    return scale[first : -(-rows.stop // height), left : -(-columns.stop // width)]


def dequantize(q: Tensor, scale: Tensor, block: tuple[int, int], out: Tensor) -> None:
    """e4m3 (out, in) and fp32 scales (grid) -> `out` (out, in) of any float dtype, by bands of
    whole blocks.
    """
    rows, columns = q.shape
    wide = (scale * 256).repeat_interleave(block[1], dim=1)[
        :, :columns
    ]  # (grid rows, in); 256 for _widen
    for start, stop in _bands(rows, columns, block[0]):
        # Splitting rows is a view, so a band's blocks meet their scales without a scale for each
        # element.
        bands = _widen(q[start:stop]).unflatten(
            0, (-1, min(block[0], stop - start))
        )  # (blocks, rows in a block, in)
        first = start // block[0]
        bands *= wide[first : first + bands.shape[0], None]
        out[start:stop] = bands.flatten(0, 1)


def _widen(q: Tensor) -> Tensor:
    """e4m3 -> fp32 / 256, exactly, by integers: torch's own cast takes numbers one by one on a CPU
    (a ninth of the speed).

    e4m3 is SEEEEMMM and fp16 SEEEEEMMMMMMMMMM, with exponents biased by 7 and 15. So the same bits,
    the sign apart and the others moved up by 7, are the same number times 2^(7 - 15), subnormal
    numbers too.
    """
    bits = (
        q.view(torch.int8).to(torch.int16).mul_(128).bitwise_and_(~0x4000)
    )  # the sign is copied upwards: leave bit 15
    bits |= (
        bits + 0x80
    ) & 0x4000  # 0x7F, which is NaN in e4m3, carries into the exponent's top bit: NaN in fp16
    return bits.view(torch.float16).float()


def quantize(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A matrix (out, in) -> e4m3 (out, in) and fp32 scales (grid), each block's largest magnitude
    at 448.
    """
    rows, columns = weight.shape
    q = torch.empty(rows, columns, dtype=E4M3, device=weight.device)
    scale = torch.empty(grid(weight.shape, block), dtype=torch.float32, device=weight.device)
    for start, stop in _bands(rows, columns, block[0]):
        w = weight[start:stop].float().unflatten(0, (-1, min(block[0], stop - start)))
        amax = torch.nn.functional.pad(
            w.abs().amax(dim=1), (0, -columns % block[1])
        )  # (blocks, padded in)
        s = (
            amax.unflatten(1, (-1, block[1])).amax(dim=2).clamp(min=1e-12) / E4M3_MAX
        )  # (blocks, grid columns)
        first = start // block[0]
        scale[first : first + s.shape[0]] = s
        q[start:stop] = (
            (w / s.repeat_interleave(block[1], dim=1)[:, None, :columns]).flatten(0, 1).to(E4M3)
        )
    return q, scale


def _bands(rows: int, columns: int, height: int) -> list[tuple[int, int]]:
    """Cut rows into runs of whole blocks that fit the scratch, and at the end what is left of a
    block.
    """
    step = max(1, BAND_BYTES // (4 * columns * height)) * height
    whole = rows // height * height
    cuts = [*range(0, whole, step), whole] + ([rows] if rows > whole else [])
    return [(a, b) for a, b in pairwise(cuts) if b > a]
