"""A quantized matrix as plain tensors, one number each: what every format is turned into first.

Shapes: out and in are a matrix's rows and columns; (down, across) is the grid of blocks that share
a scale (spec.py). A leading E, the experts, may stand before all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.errors import InputError
from r1.storage.spec import SCALES, Spec

TINY = 1e-12
"""The least scale: below it a block is as good as zero."""
SCRATCH = 64 * 2**20
"""Bytes of fp32 that quantizing and dequantizing use at a time."""
TOP = {"int8": 127.0, "int4": 7.5}
"""What the largest magnitude of a block becomes. int4 has 16 numbers, -8 to 7: with 7.5 no number
is off by more than half a step, the clipped largest included."""


@dataclass(frozen=True)
class Codes:
    """A matrix, (..., out, in), as numbers and their scales."""

    q: Tensor
    """(..., out, in): e4m3, int8, or uint8 from 0 to 15 (int4)."""
    scale: Tensor
    """(..., down, across), of any float dtype."""
    zero: Tensor | None = None
    """(..., down, across), whole numbers; None: 0, or 8 for int4."""
    group: Tensor | None = None
    """int32 (..., in): the block, counted across, of each column; None: they lie in order."""


def dequantize(codes: Codes, spec: Spec) -> Tensor:
    """The matrix, fp32 (..., out, in): exact up to the product's one rounding."""
    q, zero = codes.q.float(), codes.zero
    if spec.kind == "int4" and zero is None:
        q = q - 8
    scale = codes.scale.float()
    if codes.group is not None:  # blocks of one row
        index = codes.group.long()[..., None, :].expand(*q.shape)
        q = q if zero is None else q - zero.float().gather(-1, index)
        return q * scale.gather(-1, index)
    rows, columns = spec.block(q.shape)
    if q.shape[-2] % rows or q.shape[-1] % columns:
        q = q if zero is None else q - _spread(zero.float(), (rows, columns), q.shape)
        return q * _spread(scale, (rows, columns), q.shape)
    # Whole blocks: a view meets its scales without a scale for each number.
    blocks = q.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # (.., down, r, across, c)
    if zero is not None:
        blocks = blocks - zero.float()[..., :, None, :, None]
    return (blocks * scale[..., :, None, :, None]).flatten(-2).flatten(-3, -2)


def _spread(values: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """(..., down, across) -> (..., out, in): each block's value at each of its places."""
    for dim, size in ((-2, block[0]), (-1, block[1])):
        place = torch.arange(shape[dim], dtype=torch.float64, device=values.device)
        # Not place // size: torch 2.13's compiler for CPUs splits such a loop into whole blocks and
        # leaves the rest unwritten (pytorch issue 195582).
        values = values.index_select(dim, ((place + 0.5) * (1 / size)).floor().long())
    return values


def round_to_nearest(weight: Tensor, spec: Spec) -> Codes:
    """Quantize whole numbers: a matrix (out, in) of any float dtype -> its codes.

    Symmetric: the largest magnitude of a block becomes 127, or 7.5 (see TOP). With zero points the
    block's range, made to hold 0, becomes 0 to 15 (or -128 to 127).
    """
    parts = [_round_band(weight[band].float(), spec) for band in bands(weight.shape, spec)]
    return Codes(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _round_band(w: Tensor, spec: Spec) -> tuple[Tensor, ...]:
    """Some whole blocks' q, scale and, where the spec has them, zero points."""
    block = spec.block(w.shape)
    int4 = spec.kind == "int4"
    low, high = (0, 15) if int4 else (-128, 127)
    if not spec.zeros:
        scale = quotient(_of_blocks(w.abs(), block, "amax"), TOP[spec.kind]).clamp(min=TINY)
        scale = scale.to(SCALES[spec.scale])
        q = (w / _spread(scale.float(), block, w.shape)).round() + (8 if int4 else 0)
        return _numbers(q.clamp(low, high) if int4 else q.clamp(-127, 127), int4), scale
    top, bottom = _of_blocks(w, block, "amax").clamp(min=0), _of_blocks(w, block, "amin")
    bottom = bottom.clamp(max=0)
    scale = quotient(top - bottom, high - low).clamp(min=TINY).to(SCALES[spec.scale])
    zero = (low - bottom / scale.float()).round().clamp(low, high)
    q = (w / _spread(scale.float(), block, w.shape)).round() + _spread(zero, block, w.shape)
    return _numbers(q.clamp(low, high), int4), scale, zero.to(zero_dtype(spec.kind))


def quotient(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once on every device.

    Where the number is Python's, torch multiplies by its rounded reciprocal on a GPU. The scales
    are then one bit off those of a CPU, and numbers halfway between two go the other way.
    """
    return x / x.new_full((), number)


def _numbers(q: Tensor, int4: bool) -> Tensor:
    return q.to(torch.uint8 if int4 else torch.int8)


def zero_dtype(kind: str) -> torch.dtype:
    """The dtype of zero points: those of GPTQ reach 16, and 128 for int8."""
    return torch.uint8 if kind == "int4" else torch.int16


def _of_blocks(w: Tensor, block: tuple[int, int], how: str) -> Tensor:
    """The largest or the smallest number of each block, (down, across)."""
    rows, columns = block
    down, across = -w.shape[0] % rows, -w.shape[1] % columns
    if down or across:  # copies of the last row and column change no block's range
        w = F.pad(w[None], (0, across, 0, down), mode="replicate")[0]
    blocks = w.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # (down, rows, across, columns)
    numbers: Tensor = getattr(blocks, how)(dim=(1, 3))
    return numbers


def bands(shape: torch.Size, spec: Spec) -> Iterator[slice]:
    """Rows of a matrix, whole blocks at a time, whose fp32 fits the scratch."""
    height, _ = spec.block(shape)
    step = max(1, SCRATCH // (4 * shape[-1] * height)) * height
    cuts = [*range(0, shape[-2], step), shape[-2]]
    return (slice(a, b) for a, b in pairwise(cuts))


def part(codes: Codes, spec: Spec, rows: slice, columns: slice) -> Codes:
    """The codes of a part of a matrix (out, in). Raises InputError where it would split a block."""
    down = _blocks(rows, spec.rows)
    across = slice(None) if spec.indexed else _blocks(columns, spec.columns)
    zero, group = codes.zero, codes.group
    return Codes(
        codes.q[..., rows, columns],
        codes.scale[..., down, across],
        None if zero is None else zero[..., down, across],
        None if group is None else group[..., columns],
    )


def _blocks(cut: slice, size: int) -> slice:
    """The blocks of `size` numbers (0: all of them) under a cut, which starts at a whole block."""
    if not size:
        return slice(None)
    if cut.start % size:
        raise InputError(
            f"a cut at {cut.start} splits a block of {size} numbers that share a scale: spread the "
            "model over fewer devices, or use quant=none"
        )
    return slice(cut.start // size, -(-cut.stop // size))
