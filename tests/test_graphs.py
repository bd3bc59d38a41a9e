"""Tests when a step or a prompt is captured, and which calls share a graph.

Holds to account: r1/run.

Always on the CPU: the records of recorded.py stand in for CUDA graphs. test_gpu.py has real ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import PROMPTS
from models import sharp_logits, with_switches
from recorded import recorded
from tolerances import atol

from r1.errors import InputError
from r1.model.cache import Cache
from r1.run.engine import Engine

LONG = [[(7 * i + row) % 300 for i in range(140 + row)] for row in range(3)]


def same(caches: tuple[Cache, Cache], lengths: list[int]) -> None:
    """Whether two caches hold the same tokens, the drafter's layer too (whose last entry waits for
    the token behind it).
    """
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        for row, length in enumerate(lengths):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(
                    a[row, : length - 1], b[row, : length - 1], atol=atol("algebra fp32"), rtol=0
                )


@pytest.mark.parametrize(
    "switches",
    [{}, {"attention": "naive"}, {"prefill_attention": "absorbed"}, {"speculate": "mtp"}],
)
def test_captured_prompts(switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of any lengths are read by a few graphs, as they would be without: logits, lengths,
    cache, and what is decoded.
    """
    made = recorded(monkeypatch)
    plain = sharp_logits(device="cpu", moe="gather", **switches)
    run = with_switches(plain, prefill_graphs=True)
    caches = run.cache(3, 200), plain.cache(3, 200)
    sizes = []
    for prompts in (PROMPTS, LONG, [prompt[:3] for prompt in LONG], PROMPTS[:2], LONG):
        found, wanted = (
            r.prefill(prompts, cache) for r, cache in zip((run, plain), caches, strict=True)
        )
        torch.testing.assert_close(found, wanted, atol=atol("algebra fp32"), rtol=0)
        assert caches[0].lengths[: len(prompts)].tolist() == list(map(len, prompts))
        same(caches, list(map(len, prompts)))
        sizes.append(len(made))
    assert sizes == [1, 2, 2, 3, 3]  # 128 and 256 tokens of three rows, 128 of two
    assert [record.shared for record in made] == [None, made[0], made[0]]  # one memory for all
    tokens = torch.tensor([[1], [2], [3]])
    found, wanted = (r.decode(tokens, cache) for r, cache in zip((run, plain), caches, strict=True))
    torch.testing.assert_close(found, wanted, atol=atol("algebra fp32"), rtol=0)
    assert len(made) == 3  # decode steps have a switch of their own
    both = with_switches(plain, prefill_graphs=True, cuda_graphs=True)
    cache = both.cache(3, 200)
    both.decode(both.prefill(PROMPTS, cache).argmax(dim=-1)[:, None], cache)
    assert [record.shared for record in made[3:]] == [None, None]  # of another kind, another memory


def test_captured_prompts_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is a graph of its own, and none is read that holds padding alone; so is a prompt
    behind others.
    """
    made = recorded(monkeypatch)
    plain = sharp_logits(device="cpu", moe="gather")
    run = with_switches(plain, 64, prefill_graphs=True)
    caches = run.cache(3, 400), plain.cache(3, 400)
    for prompts, depth, graphs in (
        (LONG, 0, 3),
        (PROMPTS, 140, 4),
        (PROMPTS, 140, 4),
        (LONG, 140, 6),
    ):
        found, wanted = (
            r.prefill(prompts, cache, depth) for r, cache in zip((run, plain), caches, strict=True)
        )
        torch.testing.assert_close(found, wanted, atol=atol("algebra fp32"), rtol=0)
        same(caches, [depth + len(prompt) for prompt in prompts])
        assert len(made) == graphs
    assert caches[0].lengths.tolist() == [140 + len(prompt) for prompt in LONG]


def test_prompts_at_the_end_of_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """They aren't padded beyond it; and what doesn't fit is refused, captured or not."""
    recorded(monkeypatch)
    plain = sharp_logits(device="cpu", moe="gather")
    for run in (plain, with_switches(plain, prefill_graphs=True)):
        cache = run.cache(1, 256)
        run.prefill([[1] * 250], cache)
        assert run.prefill([[7] * 6], cache, 250).isfinite().all()
        assert cache.lengths.tolist() == [256]
        for tokens, depth in ((257, 0), (7, 250)):
            with pytest.raises(InputError, match="257 tokens are more than the cache's 256"):
                run.prefill([[7] * tokens], cache, depth)


@pytest.mark.parametrize(
    "switches",
    [{"cuda_graphs": True}, {"prefill_graphs": True}, {"cuda_graphs": True, "speculate": "mtp"}],
)
def test_a_cache_is_kept_for_its_graphs(
    switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second call of the size captures nothing, and reads nothing that the first one left."""
    made = recorded(monkeypatch)
    plain = sharp_logits(device="cpu", moe="gather", speculate=switches.get("speculate", "off"))
    run, alone = (Engine(r.model, r.backend) for r in (with_switches(plain, **switches), plain))
    assert run.runner.model is alone.runner.model
    calls = (
        (PROMPTS, 9, 1),
        (PROMPTS[::-1], 12, 1),
        (PROMPTS[:1], 9, 2),
        (PROMPTS[1:2], 9, 2),
        (PROMPTS[1:2], 140, 3),
    )
    for prompts, new, captures in calls:
        for layer in run._kept.layers if run._kept else []:
            layer[0].fill_(float("nan"))  # what an overflow would leave
        assert [c.tokens for c in run.generate(prompts, new, 0.0)] == [
            c.tokens for c in alone.generate(prompts, new, 0.0)
        ]
        assert len(made) == captures
    assert run._kept and alone._kept is None


def test_a_kept_cache_has_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn's graph is of one temperature: those of others go."""
    made = recorded(monkeypatch)
    plain = sharp_logits(device="cpu", moe="gather", speculate="mtp")
    captured = with_switches(plain, cuda_graphs=True)
    engine = Engine(captured.model, captured.backend)
    for temperature, captures in ((0.5, 1), (0.7, 2), (0.7, 2), (0.5, 3)):
        engine.generate(PROMPTS, 9, temperature, seed=0)
        assert len(made) == captures and engine._kept and len(engine._kept.graphs) == 1


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_greedy_steps_feed_themselves(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step leaves its choice where the next one reads it: only the first is copied. (A
    captured cache has a power of two of rows. Fewer of them are copied.) Choices at random are made
    outside, of another graph.
    """
    made = recorded(monkeypatch)
    plain = sharp_logits(device="cpu", moe="gather")
    run = with_switches(plain, cuda_graphs=True)
    prompts = [*PROMPTS, PROMPTS[0][::-1]][:rows]
    texts = [
        [[c.tokens for c in engine.generate(prompts, 9, t, seed=0)] for t in (0.0, 0.8, 0.0)]
        for engine in (Engine(run.model, run.backend), Engine(plain.model, plain.backend))
    ]
    assert texts[0][::2] == texts[1][::2]
    if rows != 3:  # numbers are drawn for as many rows as the cache has
        assert texts[0][1] == texts[1][1]
    greedy, drawn = made
    calls = 18 if rows == 3 else 3  # two answers and, before the first, two steps
    assert greedy.fed == calls and drawn.fed == 8
