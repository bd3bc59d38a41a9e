"""Read the reference's text with an arm's model, and compare the logits."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from torch import Tensor

from r1.bench import parity
from r1.bench.parity import Bound, Parity
from r1.bench.process import Answer
from r1.bench.worker import steps
from r1.bench.worker.dequantized import NO_BOUND, own_reference
from r1.bench.worker.subject import Subject

REFERENCE = "reference.safetensors"
"""The reference's text and logits: "tokens" int64 (M, B), "logits" fp32 (M, rows, W)."""
ROUNDING = "rounding.json"
"""By dtype: the KL that rounding to it makes in the reference's own code."""


def check(subject: Subject) -> Answer:
    """The command "parity": is the arm's distance from the reference within its bound?

    The reference of a quantized arm is its own weights (dequantized.py). "quantizing" is then its
    distance from the original's, else None.
    """
    reference = load_file(subject.folder / REFERENCE)
    rounding = {
        amp: Bound(**made)
        for amp, made in json.loads((subject.folder / ROUNDING).read_text()).items()
    }
    backend = subject.engine.backend
    allowed, cost = parity.bound(backend, rounding), None
    right = reference
    if backend.quant != "none":
        cost = vars(read_text(subject, reference, NO_BOUND))
        right = own_reference(subject, reference)
    result = read_text(subject, right, allowed)
    same = _same_text(subject, reference)
    return vars(result) | {"passes": result.passes, "same_text": same, "quantizing": cost}


def read_text(subject: Subject, reference: dict[str, Tensor], allowed: Bound) -> Parity:
    """Feed the reference's tokens to the model, and compare its logits with the reference's.

    A step reads as many tokens as a step of this arm does: with speculation, a verification.
    """
    text, logits = reference["tokens"].to(subject.device), reference["logits"]
    rows = logits.shape[1]
    ours: list[Tensor] = [steps.prefill(subject)[:rows].clone()]
    width = subject.engine.backend.step_tokens
    missing = -(len(text) - 1) % width
    text = torch.nn.functional.pad(text[:-1], (0, 0, 0, missing))  # (a multiple of S, B)
    for start in range(0, len(text), width):
        step = steps.decode(subject, text[start : start + width].T)  # (B, S, W)
        ours += step[:rows].clone().unbind(dim=1)
    return parity.compare(ours[: len(logits)], logits, allowed)


def _same_text(subject: Subject, reference: dict[str, Tensor]) -> float | None:
    """The share of the reference's greedy text that the arm wrote before its first other token.

    None if it wrote none, or if drafts were accepted at random.
    """
    at_random = subject.workload.assumed is not None and subject.engine.backend.speculate != "off"
    if not subject.text or at_random:
        return None
    rows, count = reference["logits"].shape[1], len(reference["tokens"])
    ours = torch.tensor(subject.text[:rows])[:, :count]  # (rows, P)
    same = (ours == reference["tokens"].T[:rows]).long()
    return float(same.cumprod(dim=1).double().mean())
