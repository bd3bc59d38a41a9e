"""What a step's time is made of, where all weights lie on GPUs: bytes, unpacking, layers.

    plain bytes / (copy x PLAIN_SHARE) + packed bytes / copy + packed numbers x UNPACK_PS
        + layers x what a layer takes beside its bytes

The last part is a measured row's own (measured.py): its kernels wait for one another, and so the
memory idles between them. The others are known of any model, and the constants are those of single
kernels, which are no part of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from r1 import roofline
from r1.model.config import Config
from r1.model.layers import Linear
from r1.model.moe import Experts
from r1.model.transformer import Transformer
from r1.storage.kinds import kind_of
from r1.switches.backend import Backend

PLAIN_SHARE = 0.95
"""The share of a copy's rate at which a kernel reads a large matrix of bf16: h100/kernels-*.json in
tools/measure/results have 0.93 to 1.0."""
UNPACK_PS = {"fp8": (0.011, 0.038), "int8": (0.011, 0.038), "int4": (0.045, 0.09)}
"""Picoseconds that a packed number takes beside its bytes: for one token, and for several. The
experts' kernels alone on an H100 (bench_kernels.py): one token of R1's shape took 142 us in FP8 and
87 in 4 bits, where the bytes take 138 and 69; 8 tokens of Moonlight's 120 and 85, the bytes 108 and
56. int8 was not timed alone: one byte a number is assumed to be as good as another."""


@dataclass(frozen=True)
class Packed:
    """Packed weights: their bytes, and how many numbers they are."""

    nbytes: float = 0.0
    elements: float = 0.0

    def __add__(self, other: Packed) -> Packed:
        return Packed(self.nbytes + other.nbytes, self.elements + other.elements)

    def __mul__(self, times: float) -> Packed:
        return Packed(self.nbytes * times, self.elements * times)


@dataclass(frozen=True)
class Read:
    """What a step reads, and at which rate."""

    nbytes: float
    packed: Packed
    """Of these."""
    copy: float
    """Bytes a second of a copy."""
    quant: str
    """The switch."""
    rows: int

    @property
    def ms(self) -> float:
        """Milliseconds for the bytes and the unpacking."""
        unpack = UNPACK_PS.get(kind_of(self.quant) or "", (0.0, 0.0))[self.rows > 1]
        plain = (self.nbytes - self.packed.nbytes) / (self.copy * PLAIN_SHARE)
        return 1e3 * (plain + self.packed.nbytes / self.copy + self.packed.elements * unpack / 1e12)


def packed(config: Config, backend: Backend, experts_hit: float) -> Packed:
    """The packed weights that one step reads, on the device with the largest share."""
    always, expert = _packed(roofline.model_of(config, backend, False))
    return always + expert * (experts_hit / backend.ep)


@cache
def _packed(model: Transformer) -> tuple[Packed, Packed]:
    """Of a kept model: what every token reads, and one expert of each layer."""
    always = expert = Packed()
    for module in model.modules():
        if isinstance(module, Linear) and module.matrix.unpacked_bytes:
            always += Packed(module.matrix.nbytes, module.matrix.shape.numel())
        elif isinstance(module, Experts) and module.gate_proj.unpacked_bytes:
            for stack in (module.gate_proj, module.up_proj, module.down_proj):
                expert += Packed(stack.nbytes, stack.shape.numel()) * (1 / module.count)
    return always, expert
