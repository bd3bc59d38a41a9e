"""Put what was read of one weight into its place in the model, in the format of that place.

| the file has | the model stores | what happens |
|---|---|---|
| numbers | numbers | they are copied, in the place's dtype |
| a quantized matrix | the same format | it stays packed |
| a quantized matrix | numbers | it is dequantized, and rounded once to the place's dtype |
| either | another format | the fp32 numbers are quantized, rounding to nearest |

All of it happens on the device of the place, one matrix at a time.
"""

from __future__ import annotations

import torch

from r1.errors import InputError
from r1.files.names import Slot
from r1.files.quantized.published import Found
from r1.files.quantized.words import check_index
from r1.files.shards import Piece
from r1.placement.placement import Part
from r1.storage import fp8
from r1.storage.codes import dequantize, part
from r1.storage.kinds import KINDS


def fill_plain(slot: Slot, piece: Piece) -> None:
    """A tensor of numbers, or some rows of one."""
    if slot.spec is None:
        place = slot.weight
        if place.dim():
            place = place[piece.first : piece.first + piece.rows.shape[0]]
        place.copy_(piece.rows)
        return
    device = next(iter(slot.views.values())).device
    slot.fill(KINDS[slot.spec.kind].quantize(piece.rows.to(device), slot.spec))


def fill_found(slot: Slot, found: Found, piece: Piece, mine: Part, wanted: tuple[int, ...]) -> None:
    """A quantized matrix; `wanted` is its whole shape, `mine` the part that this slot holds.

    Raises InputError for scales that are no number, and a part that begins within a block.
    """
    shape, d, spec = found.shape(wanted), found.declared, found.spec
    device = next(iter(slot.views.values())).device
    values = {found.format.main: piece.rows, **piece.beside}
    found.check_values(values, shape)
    if spec is not None:
        check_index(found.tensors, values, spec, shape)
    values = {ending: value.to(device) for ending, value in values.items()}
    rows, columns = mine
    whole = (columns.stop - columns.start, rows.stop - rows.start) == (shape[1], shape[0])
    if spec is None:
        weight = found.format.dense(values, spec, shape, d)[rows, columns]
    elif spec == slot.spec and whole:
        slot.fill(found.format.packed(values, spec, shape, d))
        return
    else:
        codes = part(found.format.codes(values, spec, shape, d), spec, rows, columns)
        if spec == slot.spec:
            slot.fill(KINDS[spec.kind].encode(codes))
            return
        if spec.kind == "fp8" and slot.spec is None and codes.zero is None:
            # The fast way for whole checkpoints: no fp32 copy of the matrix.
            scale, block = codes.scale.float(), spec.block(codes.q.shape)
            fp8.dequantize(codes.q, scale, block, out=slot.weight)
            return
        weight = dequantize(codes, spec)
    if slot.spec is None:
        slot.weight.copy_(weight)
    else:
        slot.fill(KINDS[slot.spec.kind].quantize(weight, slot.spec))


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
