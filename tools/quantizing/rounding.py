"""The numbers that a weight is rounded to: grids, their scales, and rounding to nearest.

A group is some neighbouring columns of a row. Its numbers share a scale and a zero point, and a
weight is `(q - zero) * scale`, as in r1/storage/codes.py.

Shapes: out and in are a matrix's rows and columns, G the groups of a row. A leading E, the experts,
may stand before all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r1.storage.codes import SCRATCH, TINY, Codes, quotient, zero_dtype
from r1.storage.spec import SCALES, Spec

BITS = (2, 3, 4, 8)
"""How many bits a number may have. Those of 2 and 3 bits are stored in 4: see Grid."""
LEAST_FP16 = 2.0**-24
"""The least number above 0 in fp16."""
PART = 2**28
"""Numbers of a stack that are worked on at a time: some GB, with all copies."""
Error = Callable[[Tensor], Tensor]
"""Measures what rounding a group did: see `fit`."""


def parts(first: float, last: float, step: float = 0.02) -> tuple[float, ...]:
    """Numbers from `first` to `last`, both included."""
    return tuple(round(first + n * step, 4) for n in range(round((last - first) / step) + 1))


@dataclass(frozen=True)
class Grid:
    """Which numbers a weight may become.

    2, 3 and 4 bits are stored as r1's int4, 0 to 15, and 8 bits as int8. A grid of 2 or 3 bits uses
    only the middle of the 16 numbers (with zero points: the first ones).
    """

    bits: int
    group: int
    """The most columns of a group; 0: a whole row."""
    zeros: bool = False
    """Whether groups have zero points. Else a group's range is symmetric."""
    scale: str = "bf16"
    """The scales' dtype, a key of SCALES. Scales are rounded to it before any number is."""

    @property
    def kind(self) -> str:
        """The storage: a key of r1's KINDS."""
        return "int8" if self.bits == 8 else "int4"

    @property
    def middle(self) -> int:
        """What stands for 0 in a symmetric grid."""
        return 0 if self.bits == 8 else 8

    @property
    def ends(self) -> tuple[int, int]:
        """The least and the largest q."""
        half = 2 ** (self.bits - 1)
        if self.zeros:
            return (-128, 127) if self.bits == 8 else (0, 2 * half - 1)
        return (-127, 127) if self.bits == 8 else (8 - half, 7 + half)

    @property
    def top(self) -> float:
        """What a symmetric group's largest magnitude becomes.

        Half a step above the largest q where that saves the others some error: see codes.TOP.
        """
        return 127.0 if self.bits == 8 else 2 ** (self.bits - 1) - 0.5

    def spec(self, columns: int) -> Spec:
        """How a matrix of so many columns is stored."""
        return Spec(self.kind, 1, self.width(columns) % columns, self.scale, self.zeros)

    def width(self, columns: int) -> int:
        """The columns of a group: as many as `group` where that divides the matrix.

        Else the largest part that does and that is a multiple of 8, as packed words are. Programs
        that read the formats know no groups of unequal size. If there is none, it is a whole row.
        """
        if not self.group:
            return columns
        if columns % self.group == 0:
            return self.group
        least = min(self.group, columns)
        parts = (n for n in range(least // 8 * 8, 0, -8) if columns % n == 0)
        return next(parts, columns)


@dataclass(frozen=True)
class Fitted:
    """The scales and zero points of a matrix's groups, fp32 (..., out, G)."""

    grid: Grid
    scale: Tensor
    zero: Tensor

    def q(self, w: Tensor, groups: Tensor) -> Tensor:
        """Round to nearest: fp32 (..., out, n), whose columns are of these groups (..., n)."""
        scale, zero = self.of(groups)
        low, high = self.grid.ends
        return ((w / scale).round() + zero).clamp(low, high)

    def value(self, q: Tensor, groups: Tensor) -> Tensor:
        """What the numbers stand for, fp32: exactly what r1 makes of them."""
        scale, zero = self.of(groups)
        return (q - zero) * scale

    def of(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and the zero point of each of the columns, (..., out, n)."""
        index = groups[..., None, :].expand(*self.scale.shape[:-1], groups.shape[-1])
        return self.scale.gather(-1, index), self.zero.gather(-1, index)

    def codes(self, q: Tensor) -> Codes:
        """The numbers (..., out, in) as r1's storage takes them."""
        dtype = torch.uint8 if self.grid.kind == "int4" else torch.int8
        scale = self.scale.to(SCALES[self.grid.scale])
        zero = self.zero.to(zero_dtype(self.grid.kind)) if self.grid.zeros else None
        return Codes(q.to(dtype), scale, zero)


def groups_of(columns: int, grid: Grid, device: torch.device | None = None) -> Tensor:
    """The group of each column, int64 (in,)."""
    return torch.arange(columns, device=device) // grid.width(columns)


def nearest(w: Tensor, fitted: Fitted) -> Tensor:
    """Round each number of (..., out, in) by itself."""
    return fitted.q(w, groups_of(w.shape[-1], fitted.grid, w.device))


def by_parts(how: Callable[[Tensor, Tensor], Codes], w: Tensor, h: Tensor) -> Codes:
    """Quantize a matrix or a stack, some experts at a time: their fp32 copies are many.

    `how` takes (..., out, in) and its inputs' moments h: (..., in, in), or (in, in) for all.
    """
    if w.dim() == 2:
        return how(w, h)
    each = most_experts(w)
    hs = [h] * len(w.split(each)) if h.dim() == 2 else h.split(each)
    done = [how(*pair) for pair in zip(w.split(each), hs, strict=True)]
    zeros = [codes.zero for codes in done if codes.zero is not None]
    q, scale = torch.cat([c.q for c in done]), torch.cat([c.scale for c in done])
    return Codes(q, scale, torch.cat(zeros) if zeros else None)


def expert_of(codes: Codes, expert: int) -> Codes:
    """One matrix of a stack."""
    zero = None if codes.zero is None else codes.zero[expert]
    return Codes(codes.q[expert], codes.scale[expert], zero)


def most_experts(w: Tensor) -> int:
    """How many experts of a stack (E, out, in) are worked on at a time."""
    return max(1, PART // w[0].numel())


def rtn(w: Tensor, grid: Grid) -> Codes:
    """Round to nearest, with each group's whole range: what `--quant` does while it loads."""
    fitted = fit(w, grid)
    return fitted.codes(nearest(w.float(), fitted))


def by_column(importance: Tensor) -> Error:
    """Squared errors, weighed by column: (..., in)."""

    def error(d: Tensor) -> Tensor:
        weights = importance[..., None, :].unflatten(-1, d.shape[-2:])  # (..., 1, G, width)
        return (d.square() * weights).sum(-1)

    return error


def by_output(h: Tensor) -> Error:
    """The squared change of the outputs, as far as it comes from one group alone.

    `h` (..., in, in): the mean of x x^T over the inputs.
    """

    def error(d: Tensor) -> Tensor:
        blocks = _diagonal_blocks(h, d.shape[-1])  # (..., G, width, width)
        change = d.transpose(-2, -3)  # (..., G, out, width)
        return ((change @ blocks) * change).sum(-1).transpose(-1, -2)

    return error


def _diagonal_blocks(h: Tensor, width: int) -> Tensor:
    """(..., in, in) -> (..., G, width, width): each group's own part."""
    cut = h.unflatten(-1, (-1, width)).unflatten(-3, (-1, width))  # (..., G, width, G, width)
    return cut.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def fit(
    w: Tensor, grid: Grid, trials: Sequence[float] = (1.0,), error: Error | None = None
) -> Fitted:
    """Choose the scales of a matrix's groups, (..., out, in).

    `trials` are parts of a group's range, 1 for all of it. Each group takes the one with the least
    `error` after rounding to nearest: a few clipped numbers may be worth finer steps for all
    others. The error of differences (..., out, G, width) is (..., out, G).
    """
    rows = max(1, SCRATCH // (4 * w.shape[-1] * max(1, w[..., 0, 0].numel())))
    cut = [_fit(part.float(), grid, trials, error) for part in w.split(rows, dim=-2)]
    scale, zero = (torch.cat(each, dim=-2) for each in zip(*cut, strict=True))
    return Fitted(grid, scale, zero)


def _fit(
    w: Tensor, grid: Grid, trials: Sequence[float], error: Error | None
) -> tuple[Tensor, Tensor]:
    w, (low, high) = w.unflatten(-1, (-1, grid.width(w.shape[-1]))), grid.ends  # (.., G, width)
    scale, zero = _range(w, grid, trials[0])
    if error is None:
        return scale, zero
    least = torch.full_like(scale, torch.inf)
    for trial in trials:
        steps, offset = _range(w, grid, trial)
        q = ((w / steps[..., None]).round() + offset[..., None]).clamp(low, high)
        off = error((q - offset[..., None]) * steps[..., None] - w)  # (..., out, G)
        better = off < least
        least = torch.where(better, off, least)
        scale, zero = torch.where(better, steps, scale), torch.where(better, offset, zero)
    return scale, zero


def _range(w: Tensor, grid: Grid, part: float) -> tuple[Tensor, Tensor]:
    """Scales and zero points of groups (..., width) for a part of their range."""
    dtype, (low, high) = SCALES[grid.scale], grid.ends
    least = LEAST_FP16 if grid.scale == "fp16" else TINY  # a scale is never 0
    if not grid.zeros:
        scale = quotient(w.abs().amax(-1) * part, grid.top).clamp(min=least).to(dtype).float()
        return scale, torch.full_like(scale, grid.middle)
    top, bottom = w.amax(-1).clamp(min=0) * part, w.amin(-1).clamp(max=0) * part
    scale = quotient(top - bottom, high - low).clamp(min=least).to(dtype).float()
    return scale, (low - bottom / scale).round().clamp(low, high)
