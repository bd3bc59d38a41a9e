"""Tests that compiling and capturing come before an answer, and are told apart from its time.

Holds r1/run/start_up.py to account, and r1/run/engine.py.

On the CPU: recorded.py stands in for CUDA graphs, and `compiler` for Inductor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import CountingBackend
from decoding import PROMPTS
from models import sharp_logits, with_switches
from recorded import recorded

from r1 import Backend
from r1.run.engine import Engine
from r1.run.start_up import StartUp


def started(
    engine: Engine, counted: Callable[[], int], prompts: list[list[int]], **how: Any
) -> int:
    """How many things of those `counted` a call makes; all of them before its first token.

    Its start-up takes time if there are any, and none otherwise.
    """
    before, seen = counted(), []
    (done, *_) = engine.generate(prompts, 6, on_tokens=lambda _: seen.append(counted()), **how)
    assert set(seen) == {counted()}, "something was made after the first token"
    made = counted() - before
    assert (done.start_up > 0) == (made > 0)
    return made


@pytest.mark.parametrize("speculate", ["off", "mtp"])
def test_graphs_are_captured_before(speculate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a size of the cache; under speculation once for a temperature too."""
    made = recorded(monkeypatch)
    plain = sharp_logits(device="cpu", moe="gather", speculate=speculate)
    captured = with_switches(plain, cuda_graphs=True)
    engine = Engine(captured.model, captured.backend)
    again = int(speculate == "mtp")
    for prompts, temperature, captures in (
        (PROMPTS, 0.5, 1),
        (PROMPTS[::-1], 0.5, 0),
        (PROMPTS, 0.7, again),
        (PROMPTS, 0.5, again),
        (PROMPTS[:1], 0.5, 1),
        (PROMPTS, 0.5, 1),  # the larger cache's graph went with it
    ):
        how = {"temperature": temperature, "seed": 0}
        assert started(engine, lambda: len(made), prompts, **how) == captures


def test_captured_prompts_are_read_whole_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made = recorded(monkeypatch)
    plain = sharp_logits(device="cpu", moe="gather")
    captured = with_switches(plain, prefill_graphs=True)
    engine = Engine(captured.model, captured.backend)
    for length, captures in ((100, 1), (90, 0), (127, 1), (140, 1), (150, 0), (126, 0)):
        prompts = [[7] * length]
        assert started(engine, lambda: len(made), prompts, temperature=0.0) == captures


def test_blocks_are_compiled_before(compiler: CountingBackend) -> None:
    run = sharp_logits(device="cpu", moe="gather", prefill_moe="gather", compile=True)
    engine = Engine(run.model, run.backend)
    counts = [
        started(engine, lambda: compiler.graphs, prompts, temperature=0.0)
        for prompts in (PROMPTS, PROMPTS[::-1], [row * 9 for row in PROMPTS])
    ]
    assert counts[0] > 0 and counts[1:] == [0, 0]


def test_plain_steps_on_a_cpu_are_not_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    run = sharp_logits(device="cpu")
    engine = Engine(run.model, run.backend)
    decode, calls = engine.runner.decode, 0

    def counting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return decode(*arguments)

    monkeypatch.setattr(engine.runner, "decode", counting)
    (done,) = engine.generate(PROMPTS[:1], 6, 0.0)
    assert calls == 5 and done.start_up == 0


@pytest.mark.parametrize("speculate", ["off", "mtp"])
def test_an_answer_is_the_same_after_a_start_up(
    speculate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random numbers of a seed are the answer's, and the cache was emptied."""
    recorded(monkeypatch)
    plain = sharp_logits(device="cpu", moe="gather", speculate=speculate)
    captured = with_switches(plain, cuda_graphs=True)
    prompts = PROMPTS[:2]  # a captured cache has as many rows, so numbers are drawn for as many
    texts = [
        [c.tokens for c in Engine(r.model, r.backend).generate(prompts, 20, 0.9, seed=3)]
        for r in (captured, plain)
    ]
    assert texts[0] == texts[1]


def test_a_start_up_that_was_interrupted_is_done_again(
    compiler: CountingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sharp_logits(device="cpu", moe="gather", prefill_moe="gather", compile=True)
    engine = Engine(run.model, run.backend)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "steps", interrupted)
        engine.generate(PROMPTS, 6, 0.0)
    assert started(engine, lambda: compiler.graphs, PROMPTS, temperature=0.0) > 0


def test_what_is_done_is_said() -> None:
    for switches, work in (
        ({"device": "cpu"}, []),
        ({"device": "cuda"}, ["loading kernels"]),
        ({"device": "cpu", "compile": True}, ["compiling"]),
        ({"device": "cuda", "compile": True, "cuda_graphs": True}, ["compiling", "capturing"]),
        ({"device": "cuda", "tune": True, "prefill_graphs": True}, ["tuning", "capturing"]),
    ):
        given: dict[str, Any] = switches
        assert StartUp(Backend(**given)).work == work
