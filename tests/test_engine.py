"""The ends of a stream, what becomes of a kept cache, and the sizes that the runner rounds to.

Holds r1/run/engine.py, r1/run/runner.py, r1/run/graphs.py and r1/text/stream_decoder.py to account.
test_generate.py has what is generated.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from models import ROOMY, V3, model, unit_gain
from models import runner as runner_of
from refusals import CPU, refused

import r1
from r1 import Engine
from r1.run import graphs, runner
from r1.run.runner import Runner, round_capacity, round_rows
from r1.run.sampler import Sampler
from r1.switches.backend import Backend
from r1.switches.resolve import resolve
from r1.text.control_tokens import END_THINK, THINK
from r1.text.stream_decoder import StreamDecoder

ASKED = [{"role": "user", "content": "hi"}]
HALF = 3 + 0xE4
"""The token of a byte that begins a character of three bytes (see make_tokenizer.py)."""
A, B, STOP = 3 + ord("a"), 3 + ord("b"), 3 + ord("z")


@pytest.fixture
def engine(made: Path) -> Engine:
    """Here an ordinary token ends an answer, as generation_config.json may say."""
    loaded = r1.load(made, CPU, quiet=True)
    loaded.stop_ids = frozenset({STOP})
    return loaded


def script(engine: Engine, tokens: list[int]) -> list[dict[str, Any]]:
    """Let the engine write these tokens. Returns what each call of `steps` is given."""
    calls: list[dict[str, Any]] = []

    def steps(rows: Any, limit: int, sampler: Sampler, cache: Any) -> Iterator[list[list[int]]]:
        calls.append({"rows": rows, "limit": limit, "sampler": sampler, "cache": cache})
        return iter([[[token]] for token in tokens][:limit])

    engine.steps = steps  # type: ignore[method-assign, assignment]
    return calls


# ---------------------------- streams
@pytest.mark.parametrize("think", [True, False])
def test_a_stream_ends_with_all_its_text_and_no_more(think: bool, engine: Engine) -> None:
    """Characters that are never completed become U+FFFD, before `</think>` and at the end. The stop
    token is no text, though it is an ordinary one.
    """
    assert engine.tokenizer is not None
    end = engine.tokenizer.control[END_THINK]
    tokens = ([A, HALF, end] if think else []) + [B, HALF, STOP]
    script(engine, tokens)
    seen: list[tuple[str, str]] = []
    done = engine.chat(ASKED, think=think, on_text=lambda *piece: seen.append(piece))
    reasoning, answer = ("".join(part) for part in zip(*seen, strict=True))
    assert (reasoning, answer) == (done.reasoning, done.answer)
    assert (reasoning, answer) == ("a\ufffd" if think else "", "b\ufffd")
    assert (done.tokens, done.finish) == (tokens, "stop")
    assert done.text == engine.tokenizer.decode(tokens[:-1])
    assert engine.chat(ASKED, think=think).answer == done.answer, "nobody listens"


def test_a_text_that_is_cut_off_keeps_its_last_token(engine: Engine) -> None:
    script(engine, [A, B, A, STOP])
    (done,) = engine.generate([[1]], max_new_tokens=2)
    assert (done.text, done.finish, done.tokens) == ("ab", "length", [A, B])


def test_what_a_chat_asks_the_model(engine: Engine) -> None:
    """The template's prompt, and the sampler that was asked for."""
    assert engine.tokenizer is not None
    calls = script(engine, [A])
    for think in (True, False):
        engine.chat(ASKED, 5, 0.25, 0.5, 7, think)
        prompt = engine.tokenizer.chat_prompt(ASKED, think=think)
        assert calls[-1]["rows"] == [prompt] and calls[-1]["limit"] == 5
        assert calls[-1]["sampler"] == Sampler(0.25, 0.5, 7)
    assert engine.tokenizer.control[THINK] in prompt and calls[0]["rows"] != calls[1]["rows"]


def test_a_space_before_the_first_text_is_dropped_once() -> None:
    """Not by a token without text, such as a hidden control token."""
    pieces = {0: b"", 1: b" a", 2: b"\xe4"}
    stream = StreamDecoder(pieces.__getitem__, drop_space=True)
    assert "".join(map(stream.push, [0, 1, 1, 2])) == "a a"
    assert stream.flush() == "\ufffd" and stream.flush() == "", "the decoder begins anew"
    assert stream.push(1) == " a"


def test_plain_text_begins_with_bos(engine: Engine) -> None:
    assert engine.tokenizer is not None
    engine.tokenizer.bos_id = 2
    assert engine.encode("ab") == [2, A, B]
    engine.tokenizer.bos_id = None
    assert engine.encode("ab") == [A, B]


def test_logits_are_an_ordinary_tensor(engine: Engine) -> None:
    """One that autograd may see, and that the next call does not change."""
    logits = engine.logits(torch.tensor([[1, 2]]))
    assert not logits.is_inference() and logits.clone().requires_grad_().sum().requires_grad


@pytest.mark.parametrize("wanted", [True, 0, 2.0, "3"])
def test_new_tokens_are_a_whole_number(wanted: Any, engine: Engine) -> None:
    with refused("max_new_tokens="):
        engine.generate([[1]], wanted)
    with refused("prompt 1 holds True"):
        engine.generate([[1], [2, True]])


# ---------------------------- caches
def test_a_cache_has_room_for_the_longest_row_and_no_more() -> None:
    run = runner_of(unit_gain(ROOMY))
    engine = Engine(run.model, run.backend)
    calls = script(engine, [])
    for prompts, wanted, tokens in (
        ([[1] * 20, [1] * 100], 60, 160), ([[1] * 30], 10**6, ROOMY.max_position_embeddings),
    ):  # fmt: skip
        engine.generate(prompts, wanted)
        assert calls[-1]["cache"].capacity == round_capacity(tokens)
        assert calls[-1]["limit"] == tokens - max(map(len, prompts))


def test_a_kept_cache_goes_before_another_is_made(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both at once may not fit. Its memory goes back to the GPU, so that the other one finds it."""
    script(engine, [])
    kept = engine.cache(1, 5)
    kept.graphs["a graph",] = object()
    engine._kept, reference = kept, weakref.ref(kept)
    del kept
    order = []
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: order.append(("emptied", reference() is None))
    )
    make = engine.cache

    def making(rows: int, tokens: int) -> Any:
        order.append(("made", reference() is None))
        return make(rows, tokens)

    monkeypatch.setattr(engine, "cache", making)
    engine.generate([[1], [2]], 5)
    assert order == [("emptied", True), ("made", True)]


def test_rows_are_rounded_to_powers_of_two() -> None:
    for rows in range(1, 70):
        assert round_rows(rows).bit_count() == 1 and rows <= round_rows(rows) < 2 * rows


def test_capacities_are_four_sizes_an_octave() -> None:
    """Multiples of 128, so that few are compiled; at most a quarter more than is asked for."""
    for octave in range(9, 14):
        found = {round_capacity(tokens) for tokens in range(2**octave, 2 ** (octave + 1))}
        assert len(found - {2**octave}) == 4
    for tokens in [*range(1, 3000), 12345]:
        more = round_capacity(tokens) - tokens
        assert 0 <= more < max(128, tokens / 4) and (more + tokens) % 128 == 0


@pytest.mark.parametrize("speculate", ["off", "mtp"])
def test_the_cache_is_asked_for_to_the_byte(
    speculate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafter has a layer of its own, and drafts need slots: 127 tokens and 2 drafts need 256."""
    switches = {"speculate": speculate, "draft_tokens": 2 if speculate == "mtp" else 1}
    backend = resolve(Backend(device="cpu", **switches), ROOMY)  # type: ignore[arg-type]
    engine = Engine(model(ROOMY, mtp=speculate == "mtp"), backend)
    cache = engine.cache(3, 127)
    assert (cache.rows, cache.capacity) == (3, 256 if speculate == "mtp" else 128)
    assert len(cache.layers) == ROOMY.num_hidden_layers + (speculate == "mtp")
    monkeypatch.setattr(runner, "available_bytes", lambda _: cache.nbytes)
    assert engine.cache(3, 127).nbytes == cache.nbytes
    monkeypatch.setattr(runner, "available_bytes", lambda _: cache.nbytes - 1)
    with refused(f"the cache of 3 x {cache.capacity} tokens needs"):
        engine.cache(3, 127)


# ---------------------------- prompts and graphs
def test_many_rows_are_read_a_token_at_a_time() -> None:
    """A call has one token of each row at least, however many rows there are."""
    run = runner_of(unit_gain(V3))
    prompts = [[1, 2], [3, 4], [5]]
    wanted = run.prefill(prompts, run.cache(3, 8))
    with mock.patch.object(runner, "MOST_TOKENS", 2):
        found = run.prefill(prompts, run.cache(3, 8))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("memory", ["default", "empty-cache"])
def test_what_a_prompt_took_is_given_back(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner_of(unit_gain(V3))
    changed = vars(run.backend) | {"memory": memory}
    run.backend = SimpleNamespace(**changed)  # type: ignore[assignment]
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    Runner.prefill(run, [[1, 2]], run.cache(1, 8))
    assert len(emptied) == (memory == "empty-cache")


def test_a_recording_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs three times on a stream of its own and once under the capture, and is undone each
    time. The stand-ins for CUDA's streams note the order.
    """
    order: list[str] = []
    side = SimpleNamespace(wait_stream=lambda _: order.append("side waits"))
    main = SimpleNamespace(wait_stream=lambda _: order.append("main waits"))

    def capturing(graph: str, pool: str) -> nullcontext[None]:
        order.append(f"capture {graph} in {pool}")
        return nullcontext()

    for name, made in {
        "Stream": lambda: side, "current_stream": lambda: main, "stream": nullcontext,
        "CUDAGraph": lambda: "graph",
        "graph": capturing,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, made)
    graph: Any = graphs.record(lambda: order.append("call"), lambda: order.append("undo"), "pool")
    warm_ups = ["call", "undo"] * 3
    ending = ["main waits", "capture graph in pool", "call", "undo"]
    assert graph == "graph" and order == ["side waits", *warm_ups, *ending]


def test_a_recording_takes_tensors_of_its_own_shape_and_dtype() -> None:
    replayed: list[int] = []
    fake: Any = SimpleNamespace(replay=lambda: replayed.append(1))
    static, out = torch.zeros(2, 1), torch.ones(2)
    captured = graphs.Captured(fake, (static,), (out,))
    assert captured.replay(torch.full((2, 1), 5.0))[0] is out
    assert static.tolist() == [[5], [5]] and replayed == [1]
    for wrong in (torch.zeros(2), torch.zeros(1, 1), torch.zeros(2, 1, dtype=torch.float64)):
        with pytest.raises(ValueError, match="captured for a tensor"):
            captured.replay(wrong)
