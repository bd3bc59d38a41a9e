"""Experts that are multiplied where they lie, in host memory: `experts=cpu`.

A decode step sends the few rows of its tokens to the experts that it misses, and adds up what comes
back. It moves kilobytes over the link in place of the experts' megabytes; the CPU reads those from
its memory. A prompt's many rows would take a CPU long, so its experts are copied as with
`experts=host`, and slots get what they hold from prompts.

int4 lies in the order of torch's CPU operator (storage/int4_cpu.py), which is not that of a device.
So such an expert lands beside the slots first, and the device puts its numbers into its own order.

Shapes: N tokens, E experts, D hidden_size, M choices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from r1.model.dispatch import Grouped, Loop
from r1.model.moe import Experts
from r1.placement.link import host_rows
from r1.placement.staging import Ring
from r1.placement.streamed import StreamedExperts
from r1.storage import int4_cpu
from r1.storage.dense import Dense
from r1.storage.int4 import Int4
from r1.storage.int4_cpu import CpuInt4
from r1.storage.rows import Rows, aligned

LANDING = 4
"""Experts that are on their way to the device at a time, where all have slots."""


def multiply(experts: Experts, x: Tensor, token: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of some choices, fp32 (N, D), by torch's threads of the CPU.

    x is (N, D); choice m is of token[m], for expert chosen[m], of weights[m] (M,). `experts` hold
    all of the layer, as plain numbers, int8 or CpuInt4: each of these is read as it is stored.
    """
    matrix = experts.gate_proj
    stored = matrix if matrix.joint is None else matrix.joint.whole
    run = Loop() if isinstance(stored, Dense) else Grouped()
    part = run(experts, x[token], chosen[:, None], weights[:, None])  # (M, D)
    y = torch.zeros(x.shape, dtype=torch.float32)
    return y.index_add_(0, token, part.float())


class Landing(Ring):
    """Rows on the device, in the order of the host's."""

    def __init__(self, whole: Experts, half: int, device: torch.device) -> None:
        """`half`: the most experts that are on their way at a time, of one layer."""
        self.order = Rows(whole)
        super().__init__(half, self.order.width, device)
        self.lose: list[Callable[[], None] | None] = [None] * len(self.rows)
        """By place: what is to be done if its expert is overwritten before it was moved."""

    def take_for(self, lose: Callable[[], None]) -> int:
        """The next place, for an expert; `lose` is called if it is overwritten before `move`."""
        place = self.take()
        if before := self.lose[place]:
            before()
        self.lose[place] = lose
        return place

    def move(self, place: int, slot: Tensor, to: Rows) -> None:
        """Put an expert's numbers into the order of a slot, uint8 (width,)."""
        self.lose[place] = None
        here, there = self.order.views(self.rows[place]), to.views(slot)
        for q, factors, packed, scale in zip(
            here[::2], here[1::2], there[::2], there[1::2], strict=True
        ):
            numbers, factor = int4_cpu.usual(q, factors, 2 * packed.shape[-1])
            packed.copy_(numbers)
            scale.copy_(factor)


def landing_places(slots: int, staged: int) -> int:
    """How many experts are on their way at a time, of a layer with so many slots."""
    return staged or min(slots, LANDING)


def order_bytes(experts: Experts) -> int:
    """Bytes that an int4 expert takes more in the host's order: whole groups of columns, and a 0
    beside each scale.
    """
    more = 0
    for matrix in experts.modules():
        if isinstance(matrix, Int4):
            scale, wide = matrix.scale[0].nbytes, matrix.scale.shape[-1] * matrix.spec.columns
            packed = matrix.shape[-2] * wide // 2
            more += aligned(packed) - aligned(matrix.q[0].nbytes)
            more += aligned(2 * scale) - aligned(scale)
    return more


def repack(layers: list[StreamedExperts], device: torch.device) -> None:
    """Bring loaded int4 experts into the order of the CPU's operator, one layer after the other."""
    landing = None
    for layer in layers:
        whole, source = layer.outside
        int4_cpu.repack(whole)
        if any(isinstance(module, CpuInt4) for module in whole.modules()):
            rows = host_rows(len(source.rows), Rows(whole).width, device)
            Rows(whole).move(rows)
            source.hold(rows)
            half = landing_places(layer.count, layer.staging[0].half if layer.staging else 0)
            landing = landing or Landing(whole, half, device)
            layer.landing = (landing,)
    layers[0].link.begin()  # copies start when the landing's zeros are written
