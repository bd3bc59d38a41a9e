"""The quantized storages by name, and what `quant` makes of a matrix."""

from __future__ import annotations

from r1.storage.fp8 import Fp8
from r1.storage.int4 import Int4
from r1.storage.int8 import Int8
from r1.storage.quantized import Quantized
from r1.storage.spec import Spec

KINDS: dict[str, type[Quantized]] = {"fp8": Fp8, "int8": Int8, "int4": Int4}
"""By a Spec's kind. A new storage is one class and one entry here and in USUAL."""
USUAL = {
    "fp8": Spec("fp8", 128, 128),
    "int8": Spec("int8", 1, 0),
    "int4": Spec("int4", 1, 128, scale="bf16"),
    "int4-g64": Spec("int4", 1, 64, scale="bf16"),
    "int4-g32": Spec("int4", 1, 32, scale="bf16"),
}
"""What each value of `quant` makes of a matrix that was not quantized: R1's own blocks; a scale for
each row; groups of 128 columns, the most frequent ones, whose bf16 scale adds an eighth of a bit to
each number; smaller groups, which are closer to the weights and add a quarter and half a bit."""


def kind_of(quant: str) -> str | None:
    """The kind of storage that this value of `quant` asks for; None for auto and none."""
    return USUAL[quant].kind if quant in USUAL else None
