"""Put what was read of one weight into its place in the model, in the format of that place.

| the file has | the model stores | what happens |
|---|---|---|
| numbers | numbers | they are copied, in the place's dtype |
| a quantized matrix | the same format | it stays packed |
| a quantized matrix | numbers | it is dequantized, and rounded once to the place's dtype |
| either | another format | the fp32 numbers are quantized, rounding to nearest |

All of it happens on the device of the place, one matrix at a time. Where the place holds a part of
the weight, so much of the files was read as this part needs (parts.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.errors import InputError
from r1.files.names import Slot
from r1.files.parts import Reading
from r1.files.quantized.published import Found
from r1.files.quantized.words import check_index
from r1.files.shards import Piece
from r1.placement.placement import Part
from r1.storage import fp8
from r1.storage.codes import part
from r1.storage.kinds import KINDS
from r1.storage.spec import Spec


def fill_plain(slot: Slot, piece: Piece, reading: Reading) -> None:
    """A tensor of numbers, or some rows of one."""
    if slot.spec is None:
        place = slot.weight
        if place.dim():
            place = place[piece.first : piece.first + piece.rows.shape[0]]
        place.copy_(piece.rows)
        return
    device = next(iter(slot.views.values())).device
    _quantize(slot, slot.spec, piece.rows.to(device), reading.inside)


def fill_found(slot: Slot, found: Found, piece: Piece, reading: Reading) -> None:
    """A quantized matrix, or a part of one.

    Raises InputError for scales that are no number, and a part that begins within a block.
    """
    shape, d, spec = found.shape(reading.shape), found.declared, found.spec
    device = next(iter(slot.views.values())).device
    values = {found.format.main: piece.rows, **piece.beside}
    found.check_values(values, shape)
    if spec is not None:
        check_index(found.tensors, values, spec, shape)
    values = {ending: value.to(device) for ending, value in values.items()}
    for table in ("g_idx", "weight_g_idx"):
        if table in values:
            values[table] = values[table][reading.read[1]]
    read = reading.sizes[0], reading.sizes[1]  # as a matrix of its own
    whole = slot.shape == read
    if spec is not None and spec == slot.spec:
        if whole:
            slot.fill(found.format.packed(values, spec, read, d))
        else:
            codes = part(found.format.codes(values, spec, read, d), spec, *reading.inside)
            slot.fill(KINDS[spec.kind].encode(codes))
        return
    if (
        spec is not None
        and spec.kind == "fp8"
        and slot.spec is None
        and "weight_zero_point" not in values
    ):
        # The fast way for whole checkpoints: no fp32 copy of the matrix.
        codes = found.format.codes(values, spec, read, d)
        out = slot.weight if whole else torch.empty(read, dtype=slot.weight.dtype, device=device)
        fp8.dequantize(codes.q, codes.scale.float(), spec.block(read), out=out)
        if not whole:
            slot.weight.copy_(out[reading.inside])
        return
    weight = found.format.dense(values, spec, read, d)
    if slot.spec is None:
        slot.weight.copy_(weight[reading.inside])
    else:
        _quantize(slot, slot.spec, weight, reading.inside)


def _quantize(slot: Slot, spec: Spec, weight: Tensor, inside: Part) -> None:
    """Quantize what was read, and keep the part of it that the slot holds."""
    kind = KINDS[spec.kind]
    if slot.shape == weight.shape:
        slot.fill(kind.quantize(weight, spec))
    else:
        slot.fill(kind.encode(part(kind.codes(weight, spec), spec, *inside)))


def check_finite(key: str, slot: Slot, path: object) -> None:
    """Look at what was loaded where it lies. Raises InputError.

    One NaN is enough to make every logit NaN, and token 0 the answer to everything.
    """
    for tensor in slot.views.values():
        if tensor.dtype == fp8.E4M3:
            finite = not bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
        elif tensor.is_floating_point():
            finite = bool(torch.stack(tensor.aminmax()).isfinite().all())
        else:
            finite = True
        if not finite:
            name = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"{path}: {key} holds NaN or infinite values when it is read as {name}: compare "
                "the file with its publisher's checksum"
                + (", or load it as bf16 or fp32" if name == "float16" else "")
            )
