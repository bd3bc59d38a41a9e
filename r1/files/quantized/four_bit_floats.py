"""NVFP4 and MXFP4: floats of 4 bits (e2m1), dequantized while loading.

Bytes (out, in / 2): the even column is in the low half. A code is a sign bit and one of eight
magnitudes. Shapes: out and in are a matrix's rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.files.quantized.declared import Declared
from r1.files.quantized.published import COLUMNS, ROWS, Axis, Published, Tensors, Values
from r1.storage.packing import unpack_nibbles
from r1.storage.spec import Spec

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class FourBitFloats(Published):
    """What both formats share. `columns` numbers of a row share a scale."""

    scale = "weight_scale"

    def __init__(self, title: str, main: str, columns: int) -> None:
        self.title, self.main, self.columns = title, main, columns

    def spec(self, t: Tensors, d: Declared) -> Spec | None:
        return None

    def shape(self, t: Tensors, d: Declared) -> tuple[int, int]:
        rows, half = t[self.main].shape
        return rows, 2 * half

    def expected(
        self, t: Tensors, spec: Spec | None, shape: tuple[int, int]
    ) -> dict[str, tuple[int, ...]]:
        rows, columns = shape
        scales = (rows, -(-columns // self.columns))
        return {self.main: (rows, -(-columns // 2)), self.scale: scales}

    def layout(self, spec: Spec | None) -> dict[str, tuple[Axis, ...]]:
        scales = ((ROWS, 1), (COLUMNS, self.columns))
        return {self.main: ((ROWS, 1), (COLUMNS, 2)), self.scale: scales}

    def scales(self, v: Values) -> Tensor:
        """fp32 (out, in / columns)."""
        raise NotImplementedError(f"{type(self).__name__} must define scales(v)")

    def dense(self, v: Values, spec: Spec | None, shape: tuple[int, int], d: Declared) -> Tensor:
        codes = unpack_nibbles(v[self.main], shape[1])
        table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
        wide = self.scales(v).repeat_interleave(self.columns, dim=1)[:, : shape[1]]
        return table[codes.long()] * wide


class Nvfp4(FourBitFloats):
    """An e4m3 scale for 16 columns, and one fp32 factor for the matrix.

    ModelOpt's `weight_scale_2` multiplies; compressed-tensors' `weight_global_scale` is the
    reciprocal, and divides.
    """

    def __init__(self, title: str, main: str, factor: str, divides: bool) -> None:
        super().__init__(title, main, 16)
        self.factor, self.divides, self.more = factor, divides, (factor, "weight_shape")

    def expected(
        self, t: Tensors, spec: Spec | None, shape: tuple[int, int]
    ) -> dict[str, tuple[int, ...]]:
        one = t[self.factor].shape if self.factor in t and t[self.factor].shape == (1,) else ()
        return super().expected(t, spec, shape) | {self.factor: one}

    def scales(self, v: Values) -> Tensor:
        scale, factor = v[self.scale].float(), v[self.factor].float()
        return scale / factor if self.divides else scale * factor


class Mxfp4(FourBitFloats):
    """One byte e for 32 columns: the scale is 2^(e - 127)."""

    def __init__(self, title: str, main: str) -> None:
        super().__init__(title, main, 32)
        self.more = ("weight_shape",)

    def scales(self, v: Values) -> Tensor:
        e = v[self.scale].to(torch.int32)
        # e is the exponent's field of an fp32 number; 2^-127 is a subnormal one.
        return torch.where(e > 0, e << 23, 1 << 22).view(torch.float32)
