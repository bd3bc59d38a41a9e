"""The second reference of a quantized arm: its own numbers, dequantized, in plain fp32 code.

A quantized arm is compared twice. Against this reference: is the arithmetic right? Against the fp32
reference, which has the original numbers: what did quantizing cost? Only the first can fail.

With `quant_activations` the arm's own numbers are the rounded inputs, too: the plain code rounds
them where the arm does (r1/storage/activations.py). Rounding to 4 bits makes much of little: an
input that another order of sums moves over the middle of two numbers is off by up to a 16th. So the
bound, which runs of this very code with noise set, is wider then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r1 import build
from r1.bench.arms import TEXTBOOK
from r1.bench.parity import Bound, rounds_by
from r1.bench.upcast import upcast
from r1.bench.worker import steps
from r1.bench.worker.rounding import Roundings, measure_rounding
from r1.bench.worker.steps import counted_experts
from r1.bench.worker.subject import Subject
from r1.bench.worker.text import read
from r1.model.gqa import GQA
from r1.model.layers import Embedding, Linear
from r1.model.mla import MLA
from r1.model.moe import EXPERT_MATRICES, Experts, MoE
from r1.model.transformer import Transformer
from r1.run.engine import Engine
from r1.storage.activations import FROM_TOKENS
from r1.switches.backend import Backend

NO_BOUND = Bound()
"""What quantizing costs is told, and judged by nobody."""
SLOTS: dict[type, tuple[str, ...]] = {
    Linear: ("matrix",),
    Embedding: ("matrix",),
    Experts: EXPERT_MATRICES,
    MLA: ("attend", "rotate"),
    GQA: ("attend", "rotate"),
    MoE: ("dispatch",),
}
"""The attributes of a model that its switches decide."""


@dataclass(frozen=True)
class Own:
    """What an arm's own numbers give in fp32."""

    reference: dict[str, Tensor]
    """The reference, with their logits of its text, fp32 (M, B, W)."""
    rounding: Roundings
    """What rounding does to these: other numbers have their near ties elsewhere."""
    experts_hit: float
    """How many different experts a MoE layer uses in a step, on average."""


def own_reference(subject: Subject, reference: dict[str, Tensor]) -> Own:
    """Read the reference's text with an arm's own numbers, in fp32 and rounded."""
    tokens, rows = reference["tokens"].to(subject.device), reference["logits"].shape[1]
    compared = set(reference["steps"].tolist())
    switch, kept = rounds_by(subject.engine.backend), []
    with _plain(subject) as plain:
        with counted_experts(plain) as hits:
            for number, logits in enumerate(read(plain, tokens)):
                if number in compared:
                    kept.append(logits[:rows].cpu())
                if number == 0:  # the prompts' are not a step's
                    hits.clear()
        own = {**reference, "logits": torch.stack(kept)}
        made = {} if switch is None else {switch: measure_rounding(plain, switch, own)}
    every = [n for each in subject.engine.mesh.gather(hits) for n in each]  # of all stages
    return Own(own, made, sum(every) / len(every) if every else 0.0)


@contextmanager
def _plain(subject: Subject) -> Iterator[Subject]:
    """The same model, as the reference's code calls it: eager, textbook strategies, all in fp32.

    Afterwards the model has the very objects that it had before, so nothing is compiled anew.
    """
    model = subject.engine.model
    before = list(_slots(model))
    settings = {**vars(Backend()), **TEXTBOOK, "join": subject.engine.backend.join}
    asked = subject.engine.backend
    settings |= {name: getattr(asked, name) for name in ("device", "dtype", "quant_activations")}
    backend = Backend(**settings)
    try:
        upcast(model)
        build.finish(model, backend)
        plain = Subject(backend, subject.workload, subject.folder)
        plain.engine = Engine(model, backend)
        steps.cache_in_fp32(plain)
        if asked.quant_activations != "none":  # by the number of tokens that the arm's steps have
            tokens = subject.cache.rows * asked.step_tokens
            steps.round_steps(plain, tokens >= FROM_TOKENS["decode"])
        plain.prepare()
        yield plain
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _slots(model: Transformer) -> Iterator[tuple[Any, str, Any]]:
    for module in model.modules():
        for kind, names in SLOTS.items():
            if isinstance(module, kind):
                yield from ((module, name, getattr(module, name)) for name in names)
