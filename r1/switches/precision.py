"""Which matrices `quant` leaves in high precision, and why: one table.

The others are the projections of attention, of dense and shared feed-forwards and of routed
experts, nearly all bytes of a model. What a checkpoint has quantized although it is in this table
is dequantized while loading.
"""

from __future__ import annotations

from r1.errors import InputError, setting
from r1.model.config import Config, FileFormat
from r1.storage.activations import GROUP, fits
from r1.storage.kinds import USUAL
from r1.storage.spec import Spec
from r1.switches.backend import Backend
from r1.switches.machine import Machine

KEPT = {
    "embed_tokens": "a token reads one row of it, so fewer bytes save no time",
    "lm_head": "its error goes straight into the logits, and nothing after it evens it out; so it "
    "has a switch of its own, quant_head",
    "gate": "the router: a small error chooses another expert, and it is a thousandth of a layer",
    "kv_b_proj": "absorbed attention multiplies by its halves, W_UK and W_UV, head by head in each "
    "step, which dequantizing first would cost more than it saves",
    "eh_proj": "joins two vectors of unlike sizes in an MTP layer; R1's files keep it in bf16",
}
"""By the last part of the name. Norms are vectors of a few thousand numbers: they are no matrices
here, and are never quantized."""


def spec_of(name: str, files: FileFormat, quant: str, head: str = "none") -> Spec | None:
    """How a matrix, or a stack of experts, lies in memory under `quant`. `head` is quant_head.

    `name` is the checkpoint's, without an expert's number and without `.weight`. None: it is not
    quantized. What the files have in this kind (and in groups of this size, if `quant` names one)
    is kept as it is. With "auto", or the files' own kind, so is what they leave alone.
    """
    if name == "lm_head" and head != "none":
        return USUAL[head]
    if quant == "none" or name.rpartition(".")[2] in KEPT:
        return None
    stored = files.spec(name)
    if quant in ("auto", files.kind):
        return stored
    return stored if stored is not None and _alike(stored, USUAL[quant]) else USUAL[quant]


def specs_of(files: FileFormat, quant: str) -> tuple[Spec, ...]:
    """The formats in which a model lies in memory under `quant`."""
    if quant == "none":
        return ()
    stored = tuple(spec for spec, _ in files.stored)
    if quant in ("auto", files.kind):
        return stored
    wanted = USUAL[quant]
    return (*(spec for spec in stored if _alike(spec, wanted)), wanted)


def _alike(stored: Spec, wanted: Spec) -> bool:
    """Whether numbers stored so need not be rounded again to be stored as wanted."""
    return (stored.kind, stored.rows, stored.columns) == (wanted.kind, wanted.rows, wanted.columns)


def check_activations(backend: Backend, config: Config, machine: Machine) -> None:
    """Raise InputError for `quant_activations` where nothing is rounded, or no chip is faster."""
    if backend.quant_activations == "none":
        return
    asked = setting("quant_activations", backend.quant_activations)
    if not any(map(fits, specs_of(config.files, backend.quant))):
        raise InputError(
            f"{asked} rounds the inputs of FP8 matrices that have a scale for {GROUP} columns or a "
            f"multiple, and here is none: add {setting('quant', 'fp8')}, or leave it out"
        )
    if backend.experts == "cpu":
        cpu = setting("experts", "cpu")
        raise InputError(f"{asked}: the CPU of {cpu} multiplies unrounded inputs: leave one out")
    if backend.device == "cpu":
        return
    if why := machine.why_not("fp8"):
        raise InputError(f"{asked}: {why}")
    if machine.hip:
        raise InputError(f"{asked}: the kernels multiply FP8 on NVIDIA's GPUs only: leave it out")
