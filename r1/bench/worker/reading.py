"""The command "parity": read the reference's text with an arm's model, and compare the logits.

Of an arm with drafts, its own text is read too: is each token the one that the model would choose?

Shapes: N steps of the text, M of them compared, B rows, W vocab_size.
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor

from r1.bench import parity
from r1.bench.parity import Bound, Parity
from r1.bench.process import Answer
from r1.bench.worker.dequantized import NO_BOUND, own_reference
from r1.bench.worker.rounding import Roundings, as_roundings
from r1.bench.worker.subject import Subject
from r1.bench.worker.text import read, write

REFERENCE = "reference.safetensors"
"""The reference's text "tokens", int64 (N, B), and of the steps "steps", int64 (M,), its "logits",
fp32 (M, rows, W)."""
ROUNDING = "rounding.safetensors"
"""What rounding does to the reference's own code (rounding.as_tensors)."""


def check(subject: Subject) -> Answer:
    """The command: is the arm's distance from the reference within its bounds, and its text right?

    The reference of a quantized arm is its own weights (dequantized.py). "quantizing" is then its
    distance from the original's, else None. An arm that is measured alone has no other reference
    than its own weights, and answers how many experts its steps hit. "wrong_tokens" counts the
    tokens of an arm with drafts that it should not have written. It is None without drafts.
    """
    reference = load_file(subject.folder / REFERENCE)
    backend, right, cost, hit = subject.engine.backend, reference, None, None
    alone = subject.workload.alone
    if backend.quantized or alone:
        if not alone:
            cost = vars(compare_text(subject, reference, NO_BOUND))
        own = own_reference(subject, reference)
        right, rounding, hit = own.reference, own.rounding, own.experts_hit
    else:
        rounding = load_rounding(subject)
    allowed = parity.bound(backend, rounding)
    found = compare_text(subject, right, allowed)
    wrong = None
    if subject.engine.drafter:
        wrong = wrong_tokens(subject, write(subject), allowed.tie)
    return vars(found) | {
        "passes": found.passes and not wrong,
        "wrong_tokens": wrong,
        "same_text": _same_text(subject, reference),
        "quantizing": cost,
        "experts_hit": hit,
    }


def load_rounding(subject: Subject) -> Roundings:
    """The file ROUNDING."""
    return as_roundings(load_file(subject.folder / ROUNDING))


def compare_text(subject: Subject, reference: dict[str, Tensor], allowed: Bound) -> Parity:
    """Feed the reference's tokens to the model, and compare its logits with the reference's."""
    text, logits = reference["tokens"].to(subject.device), reference["logits"]
    compared = set(reference["steps"].tolist())
    ours = [
        step[: logits.shape[1]].clone()
        for number, step in enumerate(read(subject, text))
        if number in compared
    ]
    return parity.compare(ours, logits, allowed)


def wrong_tokens(subject: Subject, text: Tensor, tie: float) -> int:
    """How many tokens of the arm's own greedy text, int64 (N, B), it should not have written.

    Its model reads the text without drafting, and gives another token a logit that is larger by
    more than `tie`. Drafts cannot explain that: they never change which token is chosen.
    """
    wrong = 0
    for tokens, logits in zip(text, read(subject, text), strict=True):
        chosen = logits.gather(1, tokens[:, None])[:, 0]  # (B,)
        wrong += int((~(logits.amax(dim=-1) - chosen <= tie)).sum())  # NaN is wrong too
    return wrong


def _same_text(subject: Subject, reference: dict[str, Tensor]) -> float | None:
    """The share of the reference's greedy text that the arm wrote before its first other token.

    None if it wrote none, or if drafts were accepted at random.
    """
    at_random = subject.workload.assumed is not None and subject.engine.backend.speculate != "off"
    if not subject.text or at_random:
        return None
    rows = reference["logits"].shape[1]
    ours = torch.tensor(subject.text[:rows])  # (rows, N)
    same = (ours == reference["tokens"].T[:rows]).long()
    return float(same.cumprod(dim=1).double().mean())
