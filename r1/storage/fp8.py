"""FP8: e4m3 numbers that share a scale, R1's in blocks of 128 x 128 with an fp32 scale each.

(V3 paper, section 3.3.) `Fp8` is the storage: the numbers stay as they are, with a scale for each
block, row or matrix. `quantize` and `dequantize` convert whole matrices in blocks. A matrix
(out, in) has a grid of ceil(out / 128) x ceil(in / 128) scales. A checkpoint names them
`weight_scale_inv`; they *multiply* the stored numbers. Blocks at the lower and right edges are
cropped.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.errors import InputError
from r1.storage.codes import Codes, quotient
from r1.storage.quantized import Quantized
from r1.storage.spec import Spec

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
BAND_BYTES = 4 * 2**20
"""The fp32 scratch of a conversion at a time. So much stays in a CPU's cache, and is not allocated
again and again."""


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
    """e4m3 (out, in) and fp32 scales (grid) -> `out` (out, in), of any float dtype."""
    rows, columns = q.shape
    # 256 makes up for _widen's factor.
    wide = (scale * 256).repeat_interleave(block[1], dim=1)[:, :columns]  # (grid rows, in)
    for start, stop in _bands(rows, columns, block[0]):
        height = min(block[0], stop - start)
        # Splitting rows is a view: blocks meet their scales without a scale for each element.
        bands = _widen(q[start:stop]).unflatten(0, (-1, height))  # (blocks, height, in)
        first = start // block[0]
        bands *= wide[first : first + bands.shape[0], None]
        out[start:stop] = bands.flatten(0, 1)


def _widen(q: Tensor) -> Tensor:
    """e4m3 -> fp32 / 256, exactly, by integer operations.

    torch's own cast converts one number at a time on a CPU, at a ninth of the speed. e4m3 is
    SEEEEMMM and fp16 SEEEEEMMMMMMMMMM, with exponents biased by 7 and 15. So the same bits, all but
    the sign moved up by 7, are the same number times 2^(7 - 15), subnormal numbers too.
    """
    bits = q.view(torch.int8).to(torch.int16).mul_(128)
    bits.bitwise_and_(~0x4000)  # the sign stands in bits 15 and 14: keep the first
    # 0x7F is NaN in e4m3. It carries into the exponent's top bit, which makes NaN in fp16.
    bits |= (bits + 0x80) & 0x4000
    return bits.view(torch.float16).float()


def quantize(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A matrix (out, in) -> e4m3 (out, in) and fp32 scales (grid).

    The largest magnitude of each block becomes 448.
    """
    rows, columns = weight.shape
    q = torch.empty(rows, columns, dtype=E4M3, device=weight.device)
    scale = torch.empty(grid(weight.shape, block), dtype=torch.float32, device=weight.device)
    for start, stop in _bands(rows, columns, block[0]):
        height = min(block[0], stop - start)
        w = weight[start:stop].float().unflatten(0, (-1, height))  # (blocks, height, in)
        amax = F.pad(w.abs().amax(dim=1), (0, -columns % block[1]))  # (blocks, padded in)
        amax = amax.unflatten(1, (-1, block[1])).amax(dim=2)  # (blocks, grid columns)
        s = quotient(amax.clamp(min=1e-12), E4M3_MAX)
        first = start // block[0]
        scale[first : first + s.shape[0]] = s
        wide = s.repeat_interleave(block[1], dim=1)[:, None, :columns]  # (blocks, 1, in)
        q[start:stop] = (w / wide).flatten(0, 1).to(E4M3)
    return q, scale


def _bands(rows: int, columns: int, height: int) -> list[tuple[int, int]]:
    """Cut rows into runs of whole blocks that fit the scratch; the last may be part of a block."""
    step = max(1, BAND_BYTES // (4 * columns * height)) * height
    whole = rows // height * height
    cuts = [*range(0, whole, step), whole] + ([rows] if rows > whole else [])
    return [(a, b) for a, b in pairwise(cuts) if b > a]


class Fp8(Quantized):
    """q is e4m3 (..., out, in), as R1's files hold it. There are no zero points."""

    KIND = "fp8"
    NAMES = ("weight", "weight_scale_inv", "weight_zero_point", "weight_g_idx")

    @staticmethod
    def pack(q: Tensor) -> Tensor:
        return q

    @staticmethod
    def unpack(q: Tensor, columns: int) -> Tensor:
        """e4m3 -> fp32: a GPU's own cast is fast, a CPU's is not."""
        return q.float() if q.is_cuda or q.is_meta else _widen(q).mul_(256)

    @staticmethod
    def packed_shape(shape: tuple[int, ...]) -> tuple[tuple[int, ...], torch.dtype]:
        return shape, E4M3

    @classmethod
    def codes(cls, weight: Tensor, spec: Spec) -> Codes:
        return Codes(*quantize(weight, spec.block(weight.shape)))
