"""What only a GPU can show: no step waits for the host, graphs repeat what eager does, any two switches agree.

Skipped without one. On a machine that has one: `python -m pytest tests/test_gpu.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from r1.backend import Backend, resolve
from r1.bench import parity
from r1.build import from_shape
from r1.config import shape
from r1.errors import InputError
from r1.generate import Engine, Sampler
from r1.runner import Runner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONFIG = shape("tiny")
PROMPTS = [[5, 9, 200, 7], [11, 3], [40, 41, 42, 43, 44, 45, 46]]
STEPS = 6
SWITCHES: list[dict[str, Any]] = [
    {"dtype": "bf16"}, {"amp": "bf16", "dtype": "fp32"}, {"compile": True}, {"cuda_graphs": True}, {"memory": "expandable"},
    {"memory": "empty-cache"}, {"attention": "naive", "prefill_attention": "naive"}, {"attention": "expand"},
    {"prefill_attention": "absorbed"}, {"moe": "loop"}, {"moe": "gather"}, {"moe": "grouped"}, {"prefill_moe": "gather"},
    {"prefill_moe": "grouped"}, {"attention": "triton"}, {"moe": "triton"}, {"kernels": "triton"},
]  # fmt: skip


def runner(**switches: Any) -> Runner:
    backend = resolve(Backend(**{"dtype": "fp32", **switches}), CONFIG, batch=len(PROMPTS))
    model = from_shape(CONFIG, backend)
    for parameter in model.parameters():
        parameter.mul_(4) if parameter.dim() > 1 else None  # calm random weights hide everything in flat logits
    return Runner(model, backend)


def read(run: Runner, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prefill the ragged prompts and decode `text` (P, B), or what is likeliest; returns the text and logits (P + 1, B, W)."""
    cache = run.cache(len(PROMPTS), 64)
    logits, chosen = [run.prefill(PROMPTS, cache).clone()], []
    for step in range(STEPS):
        chosen.append(logits[-1].argmax(dim=-1) if text is None else text[step])
        logits.append(run.decode(chosen[-1][:, None], cache)[:, -1].clone())
    return torch.stack(chosen), torch.stack(logits)


@pytest.fixture(scope="module")
def reference() -> tuple[Tensor, Tensor, dict[str, float]]:
    """Text, logits, and the KL that rounding alone makes, of the plainest fp32 run."""
    plain = {"attention": "naive", "prefill_attention": "naive", "moe": "loop", "prefill_moe": "loop"}
    text, logits = read(runner(**plain))
    _, rounded = read(runner(**plain, amp="bf16"), text)
    return text, logits, {"bf16": parity.compare(list(rounded), logits, 1.0).mean_kl}


@contextmanager
def no_waiting() -> Iterator[None]:
    """A host sync is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_sync_is_seen() -> None:
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("how", [{}, {"compile": True}, {"cuda_graphs": True}, {"compile": True, "cuda_graphs": True}])
@pytest.mark.parametrize("moe", ["gather", "grouped", "triton"])
@pytest.mark.parametrize("attention", ["naive", "expand", "absorbed", "triton"])
def test_decode_never_waits(attention: str, moe: str, how: dict[str, bool]) -> None:
    """Ragged rows, growing positions, sampling included."""
    prefill = "naive" if attention == "naive" else "expand"
    run = runner(dtype="bf16", attention=attention, prefill_attention=prefill, moe=moe, prefill_moe="grouped", **how)
    cache, sampler = run.cache(len(PROMPTS), 64), Sampler(0.6, 0.95, 0)
    tokens = sampler(run.prefill(PROMPTS, cache))
    for step in range(4):
        if step < 2:  # compiled and captured in the first, and nothing anew in those after
            tokens = sampler(run.decode(tokens[:, None], cache)[:, -1])
            continue
        with no_waiting(), torch._dynamo.config.patch(error_on_recompile=True):
            tokens = sampler(run.decode(tokens[:, None], cache)[:, -1])
    assert cache.lengths[:3].tolist() == [len(prompt) + 4 for prompt in PROMPTS]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_graph_repeats_what_eager_does(kernels: str) -> None:
    eager, captured = runner(dtype="bf16", kernels=kernels), runner(dtype="bf16", kernels=kernels, cuda_graphs=True)
    text, logits = read(eager)
    _, again = read(captured, text)
    assert parity.compare(list(again), logits, 1e-4).passes


def test_a_graph_refuses_another_shape() -> None:
    run = runner(dtype="bf16", cuda_graphs=True)
    cache = run.cache(4, 64)
    run.prefill([[1, 2]] * 4, cache)
    run.decode(torch.ones(4, 1, dtype=torch.int64, device="cuda"), cache)
    (graph,) = cache.graphs.values()
    with pytest.raises(ValueError, match="captured for tokens"):
        graph.replay(torch.ones(3, 1, dtype=torch.int64, device="cuda"))


def test_a_graph_serves_smaller_batches() -> None:
    """Three rows run in the graph of four; the fourth's work is nobody's."""
    run, eager = runner(dtype="fp32", moe="gather", cuda_graphs=True), runner(dtype="fp32", moe="gather")
    new = [Engine(r.model, r.backend).generate(PROMPTS, 12, 0.0) for r in (run, eager)]
    assert [c.tokens for c in new[0]] == [c.tokens for c in new[1]]


PAIRS = [(a, b) for a, b in itertools.combinations(SWITCHES, 2) if not (a.keys() & b.keys())]


@pytest.mark.parametrize("pair", PAIRS, ids=[" & ".join(f"{k}={v}" for k, v in {**a, **b}.items()) for a, b in PAIRS])
def test_two_switches_agree_or_are_refused(
    pair: tuple[dict[str, Any], dict[str, Any]], reference: tuple[Tensor, Tensor, dict[str, float]]
) -> None:
    text, logits, rounding = reference
    try:
        run = runner(**pair[0], **pair[1])
    except InputError as refused:
        assert "\n" not in str(refused) and any(word in str(refused) for word in (": use ", "use ", "leave "))
        return
    _, ours = read(run, text)
    found = parity.compare(list(ours), logits, parity.bound(run.backend, rounding))
    assert found.passes, found
