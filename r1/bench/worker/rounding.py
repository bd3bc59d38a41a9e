"""How far rounding takes the reference from itself: runs of its own code in another dtype.

An arm in bf16 is right if its distance from fp32 is one that rounding makes. How large that is
depends on the model and on the text. So the reference reads its text again, RUNS times, with
products rounded as the arms round them (autocast), and with noise between its layers, another one
in each run. So the runs show what may happen to an arm, which rounds at other places: also which
choices between experts rounding can change, and what this does to the logits.

Runs are cheap: a run reads many tokens in a call, and only the rows that are compared. Several runs
are rows of one batch, where each row has noise of its own.

Shapes: N steps of the text, M of them compared, B rows, R runs, T runs in a batch, W vocab_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.bench import parity
from r1.bench.parity import Rounding
from r1.bench.worker import steps
from r1.bench.worker.subject import Subject
from r1.bench.worker.text import read
from r1.device import DTYPES

NOISE = {"amp": 1.0, "dtype": 1.5, "quant_activations": 8.0}
"""The noise between two layers, in roundings. Arms that store hidden states in a `dtype` round them
several times in a layer. Under amp they stay in fp32, and products round elsewhere than here. An
fp32 arm with inputs of FP8 adds up in another order: then that many roundings of fp32 are what
decides between two e4m3 numbers. (With other dtypes such inputs are rounded here as in the arm.)"""
CALL_BYTES, CALL_TOKENS = 256 * 10**6, 128
"""The most bytes of logits, and the most tokens of a row, in one call."""
BATCH_TOKENS = 2**13
"""The most tokens in the cache of a batch of several runs."""
RUNS_DRAWN = 4
"""Runs where experts are drawn, so that no rounding changes a choice. The rows keep their places,
which decide on the draws; under --routing uniform the tokens do too, and are read one by one."""

Roundings = dict[str, Rounding]
"""What rounding does, by the switch that makes an arm round."""


def as_tensors(roundings: Roundings) -> dict[str, Tensor]:
    """Roundings as they stand in a file: as "amp=bf16 kl" and "amp=bf16 tie"."""
    return {
        name: tensor
        for switch, made in roundings.items()
        for name, tensor in (
            (f"{switch} kl", made.kl),
            (f"{switch} tie", torch.tensor(made.tie, dtype=torch.float64)),
        )
    }


def as_roundings(tensors: dict[str, Tensor]) -> Roundings:
    """What `as_tensors` made them of."""
    switches = {name.partition(" ")[0] for name in tensors}
    return {
        switch: Rounding(tensors[f"{switch} kl"], float(tensors[f"{switch} tie"]))
        for switch in switches
    }


def measure_rounding(subject: Subject, switch: str, reference: dict[str, Tensor]) -> Rounding:
    """Read the reference's text again and again, rounded as arms with this switch round.

    `switch` is one of parity.rounds_by. Afterwards the subject has other rows.
    """
    name, _, dtype = switch.partition("=")
    dtype = dtype if dtype in DTYPES else "fp32"
    error = NOISE[name] * torch.finfo(DTYPES[dtype]).eps / 2  # of one rounding: half a step
    rows = reference["logits"].shape[1]
    routing = subject.workload.routing
    runs = parity.RUNS if routing == "model" else RUNS_DRAWN
    together = 1 if routing != "model" else _runs_together(runs, rows * subject.workload.tokens)
    width = 1 if routing == "uniform" else None
    subject.repeat_rows(rows, together)
    kl, tie = [], 0.0
    with steps.rounded_to(subject, dtype if dtype != "fp32" else "off"):
        subject.fill()
        for batch in range(-(-runs // together)):
            with steps.noise(subject, error, seed=batch):
                found, lost = _compare(subject, reference, together, width)
            kl.append(found)
            tie = max(tie, lost)
    return Rounding(torch.cat(kl)[:runs], tie)


def _runs_together(runs: int, tokens: int) -> int:
    """How many runs are read in one batch, of runs that hold so many tokens each."""
    return max(1, min(runs, BATCH_TOKENS // tokens))


def _compare(
    subject: Subject, reference: dict[str, Tensor], together: int, width: int | None
) -> tuple[Tensor, float]:
    """A batch of runs: their KL, fp64 (T, M, B), and the largest lead of a best token that one of
    them overturned. A call reads `width` tokens of each row, or as many as may be.
    """
    rows, vocab_size = reference["logits"].shape[1:]
    text = reference["tokens"][:, :rows].to(subject.device).repeat(1, together)  # (N, T B)
    width = width or min(CALL_TOKENS, max(1, CALL_BYTES // (4 * vocab_size * text.shape[1])))
    right = dict(zip(reference["steps"].tolist(), reference["logits"], strict=True))
    kl, lost = [], 0.0
    for number, logits in enumerate(read(subject, text, width, filled=True)):
        if number in right:
            best = right[number].to(logits.device)  # (B, W)
            logits = logits.unflatten(0, (together, rows))  # (T, B, W)
            kl.append(parity.divergence(best, logits).cpu())
            chosen = best.expand_as(logits).gather(-1, logits.argmax(dim=-1, keepdim=True))
            lost = max(lost, float((best.amax(dim=-1) - chosen[..., 0]).amax()))
    return torch.stack(kl, dim=1), lost
