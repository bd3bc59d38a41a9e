"""Tests that any two switches together pass parity, or are refused with a reason.

Holds to account: r1/switches, r1/run and r1/kernels.

Each alone can work and both together fail. On a CPU without `compile`, whose pairs take minutes to
compile: bench.py --ablate runs those.
"""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding import PROMPTS, read
from models import TINY, TINY_GROUPED, sharp_logits
from torch import Tensor

from r1.bench import parity
from r1.bench.arms import textbook
from r1.bench.worker import rounding, steps
from r1.errors import InputError
from r1.switches.backend import Backend
from r1.switches.resolve import resolve

GPU = torch.cuda.is_available()
SWITCHES: list[dict[str, Any]] = [
    {"dtype": "bf16"},
    {"amp": "bf16", "dtype": "fp32"},
    {"cuda_graphs": True},
    {"prefill_graphs": True},
    {"memory": "expandable"},
    {"memory": "empty-cache"},
    {"attention": "naive", "prefill_attention": "naive"},
    {"attention": "expand"},
    {"attention": "absorbed"},
    {"prefill_attention": "absorbed"},
    {"moe": "loop"},
    {"moe": "gather"},
    {"moe": "grouped"},
    {"prefill_moe": "loop"},
    {"prefill_moe": "gather"},
    {"prefill_moe": "grouped"},
    {"speculate": "mtp"},
    {"prefill_moe": "triton"},
    {"attention": "triton"},
    {"moe": "triton"},
    {"kernels": "triton"},
    *([{"compile": True}] if GPU else []),
]
GROUPED: list[dict[str, Any]] = [
    *(s for s in SWITCHES if not s.keys() & {"attention", "prefill_attention", "speculate"}),
    {"attention": "naive", "prefill_attention": "naive"},
    {"attention": "sdpa"},
    {"attention": "grouped"},
    {"prefill_attention": "grouped"},
    {"attention": "triton"},
]
"""For a model with grouped-query attention."""
GROUPED = [s for s in GROUPED if not any("moe" in name for name in s)]  # and without experts
CONFIGS = {"latent": TINY, "grouped": TINY_GROUPED}
PAIRS = [
    (kind, {**a, **b})
    for kind, switches in (("latent", SWITCHES), ("grouped", GROUPED))
    for a, b in itertools.combinations(switches, 2)
    if not (a.keys() & b.keys())
]


def refusal(kind: str, switches: dict[str, Any]) -> str | None:
    """Why this machine can't run these switches together; None where it can."""
    try:
        resolve(Backend(**{"dtype": "fp32", **switches}), CONFIGS[kind], batch=len(PROMPTS))
    except InputError as refused:
        return str(refused)
    return None


RUN = [(kind, pair) for kind, pair in PAIRS if not refusal(kind, pair)]
"""On a CPU about a third of all pairs: the others ask for a GPU."""


@functools.cache
def reference(kind: str) -> tuple[Tensor, Tensor, dict[str, parity.Rounding]]:
    """Text and logits of the plainest fp32 run, and what rounding to bf16 does to it."""
    config = CONFIGS[kind]
    text, logits = read(sharp_logits(config=config, **textbook(config)))
    rounded = sharp_logits(config=config, **textbook(config), amp="bf16")
    subject: Any = SimpleNamespace(device=rounded.device, engine=rounded)
    made = {}
    for switch, noise in rounding.NOISE.items():
        kl = []
        for seed in range(parity.RUNS):
            with steps.noise(subject, noise * torch.finfo(torch.bfloat16).eps / 2, seed):
                kl.append(parity.divergence(logits, read(rounded, text)[1]).cpu())
        made[f"{switch}=bf16"] = parity.Rounding(torch.stack(kl), tie=0.0)
    return text, logits, made


@pytest.mark.parametrize(
    ("kind", "pair"),
    RUN,
    ids=[f"{kind} {' & '.join(f'{k}={v}' for k, v in pair.items())}" for kind, pair in RUN],
)
def test_two_switches_agree(kind: str, pair: dict[str, Any]) -> None:
    text, logits, made = reference(kind)
    run = sharp_logits(config=CONFIGS[kind], **pair)
    _, ours = read(run, text)
    found = parity.compare(list(ours), logits, parity.bound(run.backend, made))
    assert found.passes, found


def test_other_pairs_are_refused_with_a_reason() -> None:
    """In one line, which says what to do instead. A pair is refused for a reason of its own, or for
    one of a switch in it.
    """
    for kind, pair in PAIRS:
        why = refusal(kind, pair)
        if why is not None:
            assert "\n" not in why and ("use " in why or "leave " in why), (pair, why)
            assert any(name in why for name in (*pair, "bf16", "compile")), (pair, why)
    assert len(RUN) >= 60, "most pairs without a GPU's switches run on any machine"
