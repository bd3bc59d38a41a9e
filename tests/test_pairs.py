"""Any two switches together pass parity, or refuse with a reason (traps.md 31: each alone can work
and both together fail).

On a CPU without `compile`, whose pairs take minutes to compile: bench.py --ablate runs those.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from decoding import read, runner
from torch import Tensor

from r1.bench import parity
from r1.bench.arms import TEXTBOOK
from r1.errors import InputError

GPU = torch.cuda.is_available()
SWITCHES: list[dict[str, Any]] = [
    {"dtype": "bf16"}, {"amp": "bf16", "dtype": "fp32"}, {"cuda_graphs": True},
    {"prefill_graphs": True}, {"memory": "expandable"}, {"memory": "empty-cache"},
    {"attention": "naive", "prefill_attention": "naive"}, {"attention": "expand"},
    {"attention": "absorbed"}, {"prefill_attention": "absorbed"}, {"moe": "loop"},
    {"moe": "gather"}, {"moe": "grouped"}, {"prefill_moe": "loop"}, {"prefill_moe": "gather"},
    {"prefill_moe": "grouped"}, {"speculate": "mtp"}, {"prefill_moe": "triton"},
    {"attention": "triton"}, {"moe": "triton"}, {"kernels": "triton"},
    *([{"compile": True}] if GPU else []),
]  # fmt: skip
PAIRS = [(a, b) for a, b in itertools.combinations(SWITCHES, 2) if not (a.keys() & b.keys())]


@pytest.fixture(scope="module")
def reference() -> tuple[Tensor, Tensor, dict[str, parity.Bound]]:
    """Text, logits, and the KL that rounding alone makes, of the plainest fp32 run."""
    text, logits = read(runner(**TEXTBOOK))
    _, rounded = read(runner(**TEXTBOOK, amp="bf16"), text)
    made = parity.compare(list(rounded), logits, parity.Bound(1.0, 1.0))
    return text, logits, {"bf16": parity.Bound(made.median_kl, made.mean_kl)}


@pytest.mark.parametrize(
    "pair", PAIRS, ids=[" & ".join(f"{k}={v}" for k, v in {**a, **b}.items()) for a, b in PAIRS]
)
def test_two_switches_agree_or_are_refused(
    pair: tuple[dict[str, Any], dict[str, Any]],
    reference: tuple[Tensor, Tensor, dict[str, parity.Bound]],
) -> None:
    text, logits, rounding = reference
    try:
        run = runner(**pair[0], **pair[1])
    except InputError as refused:
        assert "\n" not in str(refused) and any(
            word in str(refused) for word in (": use ", "use ", "leave ")
        )
        return
    _, ours = read(run, text)
    found = parity.compare(list(ours), logits, parity.bound(run.backend, rounding))
    assert found.passes, found
