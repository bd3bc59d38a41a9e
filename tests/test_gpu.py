"""Tests what only a GPU can show: no step waits for the host, and graphs repeat what eager does.

Holds to account: r1/run and r1/kernels.

Skipped as a whole where there is no GPU. On a machine that has one:
`python -m pytest tests/test_gpu.py tests/test_pairs.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from decoding import PROMPTS, read
from models import TINY, TINY_GROUPED, TINY_QWEN2
from models import sharp_logits as runner

from r1 import Config
from r1.bench import parity
from r1.run.engine import Engine
from r1.run.sampler import Sampler

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


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


@pytest.mark.parametrize(
    "how", [{}, {"compile": True}, {"cuda_graphs": True}, {"compile": True, "cuda_graphs": True}]
)
@pytest.mark.parametrize("moe", ["gather", "grouped", "triton"])
@pytest.mark.parametrize("attention", ["naive", "expand", "absorbed", "triton"])
def test_decode_never_waits(attention: str, moe: str, how: dict[str, Any]) -> None:
    """Ragged rows, growing positions, sampling included."""
    prefill = "naive" if attention == "naive" else "expand"
    run = runner(
        dtype="bf16",
        attention=attention,
        prefill_attention=prefill,
        moe=moe,
        prefill_moe="grouped",
        **how,
    )
    cache, sampler = run.cache(len(PROMPTS), 64), Sampler(0.6, 0.95, 0)
    tokens, _ = sampler(run.prefill(PROMPTS, cache))
    for step in range(4):
        if step < 2:  # compiled and captured in the first, and nothing anew in those after
            tokens, _ = sampler(run.decode(tokens[:, None], cache)[:, -1])
            continue
        with no_waiting(), torch._dynamo.config.patch(error_on_recompile=True):
            tokens, _ = sampler(run.decode(tokens[:, None], cache)[:, -1])
    assert cache.lengths[:3].tolist() == [len(prompt) + 4 for prompt in PROMPTS]


@pytest.mark.parametrize(
    "how", [{}, {"compile": True}, {"cuda_graphs": True}, {"compile": True, "cuda_graphs": True}]
)
@pytest.mark.parametrize("attention", ["naive", "sdpa", "grouped", "triton"])
def test_grouped_queries_never_wait(attention: str, how: dict[str, Any]) -> None:
    run = runner(config=TINY_GROUPED, dtype="bf16", attention=attention, **how)
    cache = run.cache(len(PROMPTS), 64)
    token = run.prefill(PROMPTS, cache).argmax(dim=-1)[:, None]
    for step in range(4):
        if step < 2:
            token = run.decode(token, cache)[:, -1].argmax(dim=-1)[:, None]
            continue
        with no_waiting(), torch._dynamo.config.patch(error_on_recompile=True):
            token = run.decode(token, cache)[:, -1].argmax(dim=-1)[:, None]


@pytest.mark.parametrize("config", [TINY, TINY_GROUPED, TINY_QWEN2], ids=lambda c: c.model_type)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_graph_repeats_what_eager_does(kernels: str, config: Config) -> None:
    eager, captured = (
        runner(config=config, dtype="bf16", kernels=kernels),
        runner(config=config, dtype="bf16", kernels=kernels, cuda_graphs=True),
    )
    text, logits = read(eager)
    _, again = read(captured, text)
    assert parity.compare(list(again), logits, parity.Bound(1e-4, 1e-4)).passes


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"compile": True},
        {"prefill_moe": "triton"},
        {"prefill_attention": "absorbed"},
        {"attention": "naive"},
        {"speculate": "mtp"},
        {"cuda_graphs": True, "kernels": "triton"},
        {"dtype": "fp32", "prefill_moe": "gather"},
    ],
    ids=str,
)
def test_captured_prompts_are_read_as_others_are(how: dict[str, Any]) -> None:
    """One cache, prompts of several lengths: two graphs, which share their memory, in turn."""
    eager, captured = (
        runner(**{"dtype": "bf16", **how}, prefill_graphs=on) for on in (False, True)
    )
    caches = [run.cache(3, 300) for run in (eager, captured)]
    long = [[(7 * i + row) % 300 for i in range(200 - row)] for row in range(3)]
    for prompts in (PROMPTS, long, [prompt[:50] for prompt in long], long, PROMPTS):
        wanted, found = (
            run.prefill(prompts, cache)
            for run, cache in zip((eager, captured), caches, strict=True)
        )
        assert parity.compare([found], wanted[None], parity.Bound(1e-4, 1e-4)).passes
        token = wanted.argmax(dim=-1)[:, None]
        wanted, found = (
            run.decode(token, cache).clone()
            for run, cache in zip((eager, captured), caches, strict=True)
        )
        assert parity.compare(
            [*found.unbind(1)], wanted.transpose(0, 1), parity.Bound(1e-4, 1e-4)
        ).passes
    graphs = [made.graph for key, made in caches[1].graphs.items() if key[0] == "prefill"]
    assert len(graphs) == 2 and graphs[0].pool() == graphs[1].pool()


def test_a_kept_cache_is_captured_once() -> None:
    run, alone = (runner(dtype="fp32", moe="gather", cuda_graphs=on) for on in (True, False))
    engine, plain = (Engine(r.model, r.backend) for r in (run, alone))
    wanted = [
        [c.tokens for c in plain.generate(prompts, 12, 0.0)] for prompts in (PROMPTS, PROMPTS[::-1])
    ]
    assert [c.tokens for c in engine.generate(PROMPTS, 12, 0.0)] == wanted[0]
    assert engine._kept is not None
    graphs = dict(engine._kept.graphs)
    assert [c.tokens for c in engine.generate(PROMPTS[::-1], 12, 0.0)] == wanted[1]
    assert engine._kept.graphs == graphs


def test_a_graph_refuses_another_shape() -> None:
    run = runner(dtype="bf16", cuda_graphs=True)
    cache = run.cache(4, 64)
    run.prefill([[1, 2]] * 4, cache)
    run.decode(torch.ones(4, 1, dtype=torch.int64, device="cuda"), cache)
    (graph,) = cache.graphs.values()
    with pytest.raises(ValueError, match="captured for"):
        graph.replay(torch.ones(3, 1, dtype=torch.int64, device="cuda"))


def test_a_graph_serves_smaller_batches() -> None:
    """Three rows run in the graph of four; the fourth's work is nobody's."""
    run, eager = (
        runner(dtype="fp32", moe="gather", cuda_graphs=True),
        runner(dtype="fp32", moe="gather"),
    )
    new = [Engine(r.model, r.backend).generate(PROMPTS, 12, 0.0) for r in (run, eager)]
    assert [c.tokens for c in new[0]] == [c.tokens for c in new[1]]


@pytest.mark.parametrize("drafts", [1, 2])
@pytest.mark.parametrize("how", [{}, {"cuda_graphs": True}, {"compile": True, "cuda_graphs": True}])
def test_speculation_writes_the_same_text(how: dict[str, Any], drafts: int) -> None:
    """Greedy in fp32; and sampling runs through the same captured turn."""
    plain = runner(moe="gather")
    run = runner(moe="gather", speculate="mtp", draft_tokens=drafts, **how)
    wanted, written = (Engine(r.model, r.backend).generate(PROMPTS, 24, 0.0) for r in (plain, run))
    assert [c.tokens for c in written] == [c.tokens for c in wanted]
    sampled = Engine(run.model, run.backend).generate(PROMPTS, 24, 0.6, 0.95, seed=1)
    assert [len(c.tokens) for c in sampled] == [24] * 3 and all(c.drafted for c in sampled)
