"""Random weights instead of a checkpoint's: the same numbers for a seed, wherever parts lie."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from r1.files.names import Slot, slots
from r1.model.transformer import Transformer
from r1.placement.placement import Part, Placement
from r1.storage.codes import part
from r1.storage.kinds import KINDS
from r1.storage.spec import Spec

DEVIATION = 0.02
SPREAD = {"int4": 4.183, "int8": 73.6, "fp8": 107.2}
"""The root of the mean square of the numbers that `_draw_packed` draws, where their scale is 1."""
DRAW_ELEMENTS = 2**24
"""Random numbers drawn at a time: bounds the fp32 scratch."""


def randomize(
    model: Transformer, seed: int, whole: Transformer | None = None,
    placement: Placement | None = None, *, packed: bool = False,
) -> None:  # fmt: skip
    """Set every tensor from `seed`: the same bf16 numbers in every dtype, joined or not.

    Quantized matrices are made of the same numbers, one by one, so the model is never held as it
    was before. Where this process holds a part of a model, `whole` is all of it, without memory:
    each of its tensors is drawn, and `placement`'s part of it is kept.

    `packed` draws quantized matrices as they are stored, and only the part that is kept: they are
    other numbers, but 300 GB of them take seconds.
    """
    device = model.norm.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    mine, place = slots(model), placement or Placement()
    with torch.no_grad():
        for key, all_of_it in (slots(whole) if whole is not None else mine).items():
            slot, spec = mine.get(key), all_of_it.spec
            if packed and spec is not None and not spec.zeros and not spec.indexed:
                if slot is not None:
                    mine_of_it = place.part(key, all_of_it.shape)
                    _draw_packed(slot, spec, device, f"{seed} {key} {mine_of_it}")
            elif key.endswith("bias"):
                if slot is not None:
                    slot.weight.zero_()
            elif len(all_of_it.shape) == 1:
                if slot is not None:
                    slot.weight.fill_(1.0)
            elif whole is None and slot is not None and slot.spec is None:
                _draw(slot.weight, generator)
            else:
                drawn = torch.empty(all_of_it.shape, dtype=torch.bfloat16, device=device)
                _draw(drawn, generator)
                if slot is not None:
                    _keep(slot, drawn, place.part(key, all_of_it.shape))


def _draw_packed(slot: Slot, spec: Spec, device: torch.device, name: str) -> None:
    """Random bits for a matrix's numbers, of its `name`, and one scale. Its numbers are about as
    large as others'.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    numbers, scale = (slot.views[ending] for ending in KINDS[spec.kind].NAMES[:2])
    bits = torch.empty(numbers.shape, dtype=torch.uint8, device=device)
    bits.random_(generator=generator)
    # Whole numbers have one negative value more than positive ones. A mean that isn't 0 would be
    # one direction of all outputs: then routers choose the same few experts.
    if spec.kind == "fp8":
        bits -= ((bits & 0x7F) == 0x7F).to(torch.uint8)  # which would be NaN
    elif spec.kind == "int4":
        for half, middle in ((0x0F, 0x08), (0xF0, 0x80)):
            bits += ((bits & half) == 0).to(torch.uint8) * middle  # 1 to 15, and 8 twice as often
    else:
        bits += (bits == 0x80).to(torch.uint8) * 0x80  # -127 to 127
    numbers.copy_(bits.view(numbers.dtype))
    scale.fill_(DEVIATION / SPREAD[spec.kind])


def _keep(slot: Slot, drawn: Tensor, mine: Part) -> None:
    """Put a part of a matrix (out, in) into its slot."""
    if slot.spec is None:
        slot.weight.copy_(drawn[mine])
        return
    kind = KINDS[slot.spec.kind]
    if slot.shape == drawn.shape:
        slot.fill(kind.quantize(drawn, slot.spec))
        return
    rows, columns = mine
    slot.fill(kind.encode(part(kind.codes(drawn, slot.spec), slot.spec, rows, columns)))


def _draw(place: Tensor, generator: torch.Generator) -> None:
    for some in place.view(-1).split(DRAW_ELEMENTS):
        drawn = torch.empty(some.shape, dtype=torch.float32, device=generator.device)
        some.copy_(drawn.normal_(0.0, DEVIATION, generator=generator).bfloat16())
