"""How the numbers of a quantized matrix are to be read: a few facts, as a value that can be hashed.

Shapes: out and in are a matrix's rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes that scales are stored in."""


@dataclass(frozen=True)
class Spec:
    """A weight is `(q - zero) * scale`; a block of `rows` x `columns` numbers shares both."""

    kind: str
    """The numbers q: "fp8" (e4m3), "int8" (-128 to 127) or "int4" (0 to 15)."""
    rows: int
    """Rows of a block; 0: all rows of the matrix."""
    columns: int
    """Columns of a block; 0: all columns."""
    scale: str = "fp32"
    """The scales' dtype, a key of SCALES."""
    zeros: bool = False
    """Whether each block has a zero point of its own. Else it is 0, and 8 for int4."""
    indexed: bool = False
    """Whether a table says which block each column belongs to (GPTQ's g_idx). Else they lie in
    order."""

    def block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a block in a matrix (..., out, in)."""
        return self.rows or shape[-2], self.columns or shape[-1]

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many blocks a matrix (..., out, in) has, down and across. Edge blocks are cropped."""
        rows, columns = self.block(shape)
        return -(-shape[-2] // rows), -(-shape[-1] // columns)

    def describe(self) -> str:
        """In words, for messages and tables: "int4, a scale for 1 x 128"."""
        sides = " x ".join(str(side or "all") for side in (self.rows, self.columns))
        return f"{self.kind}, a scale for {sides}"
