"""Weights of 8 bits that are not packed: FP8 (e4m3) and INT8, with scales of any block.

R1's FP8 blocks, the same under the name `weight_scale` (llm-compressor's FP8_BLOCK), block-INT8,
compressed-tensors' float-quantized, int-quantized and naive-quantized, AutoFP8's and ModelOpt's
single scales. All multiply. Shapes: out and in are a matrix's rows and columns.
"""

from __future__ import annotations

from r1.errors import InputError
from r1.files.quantized.declared import Declared
from r1.files.quantized.published import (
    COLUMNS,
    ROWS,
    Axis,
    Published,
    Tensors,
    Values,
    scale_dtype,
)  # fmt: skip
from r1.storage.codes import Codes, zero_dtype
from r1.storage.spec import Spec

KIND = {"F8_E4M3": "fp8", "I8": "int8"}


class EightBits(Published):
    """`weight` (out, in), F8_E4M3 or I8, and scales under one of two names."""

    main, more = "weight", ("weight_zero_point",)

    def __init__(self, scale: str) -> None:
        self.scale = scale

    def told(self, t: Tensors) -> str:
        return "FP8" if t["weight"].dtype == "F8_E4M3" else "INT8"

    def shape(self, t: Tensors, d: Declared) -> tuple[int, int]:
        rows, columns = t["weight"].shape
        return rows, columns

    def spec(self, t: Tensors, d: Declared) -> Spec:
        kind, dtype = KIND[t["weight"].dtype], scale_dtype(t, self.scale)
        (rows, columns), scale = self.shape(t, d), t[self.scale].shape
        zeros = "weight_zero_point" in t
        if d.block is not None:
            return Spec(kind, *d.block, scale=dtype, zeros=zeros)
        if scale in ((), (1,), (1, 1)):
            return Spec(kind, 0, 0, scale=dtype, zeros=zeros)
        if scale in ((rows,), (rows, 1)):
            return Spec(kind, 1, 0, scale=dtype, zeros=zeros)
        if group := d.columns(t["weight"].key, columns, scale[-1]):
            return Spec(kind, 1, group, scale=dtype, zeros=zeros)
        entry, weight = t[self.scale], t["weight"]
        if not d.method:
            lacks = "config.json has no quantization_config to say in what blocks"
            raise InputError(f"{weight.path}: {weight.key} is {self.told(t)}, but {lacks}")
        raise InputError(
            f"{entry.path}: {entry.key} has shape {scale} for a matrix of {rows} x {columns}, and "
            f"{d.where} does not say in what blocks: compare both with the publisher's"
        )

    def expected(
        self, t: Tensors, spec: Spec | None, shape: tuple[int, int]
    ) -> dict[str, tuple[int, ...]]:
        assert spec is not None
        grid: tuple[int, ...] = spec.grid(shape)
        actual = t[self.scale].shape
        # One number, and one for each row, may come with fewer dimensions.
        if (grid == (1, 1) and actual in ((), (1,))) or (grid[1] == 1 and actual == grid[:1]):
            grid = actual
        names = [self.scale, *(["weight_zero_point"] if spec.zeros else [])]
        return {name: grid for name in names}

    def layout(self, spec: Spec | None) -> dict[str, tuple[Axis, ...]]:
        assert spec is not None
        scales = ((ROWS, spec.rows), (COLUMNS, spec.columns))
        numbers = ((ROWS, 1), (COLUMNS, 1))
        return {"weight": numbers, self.scale: scales, "weight_zero_point": scales}

    def codes(self, v: Values, spec: Spec, shape: tuple[int, int], d: Declared) -> Codes:
        grid = spec.grid(shape)
        zero = v["weight_zero_point"].view(grid).to(zero_dtype(spec.kind)) if spec.zeros else None
        return Codes(v["weight"], v[self.scale].reshape(grid), zero)


def is_eight_bits(t: Tensors) -> bool:
    """FP8 in any case: without scales it is an error. I8 alone is no quantized matrix."""
    if "weight" not in t:
        return False
    scaled = "weight_scale" in t or "weight_scale_inv" in t
    return t["weight"].dtype == "F8_E4M3" or (t["weight"].dtype == "I8" and scaled)
