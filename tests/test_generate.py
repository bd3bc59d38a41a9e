"""Tests the Engine as a user has it: load, logits, generate, sampling, chat, `python -m r1`.

Holds to account: r1/__init__.py, r1/__main__.py and r1/run.

The model is the embedded checkpoint.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from cases import ROOT
from command import TIMING, command
from models import TINY, V3, drafting_engine, runner, unit_gain
from tolerances import atol
from torch import Tensor, nn

import r1
from r1 import Backend, InputError
from r1.run import speculate
from r1.run.completion import Completion
from r1.run.engine import Engine
from r1.run.sampler import TEMPERATURE, TOP_P, Sampler

CHECKPOINT = ROOT / "weights" / "tiny-r1"
PROMPTS = [[0, 5, 7], [0, 9], [0, 11, 12, 13, 14, 15]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return r1.load(CHECKPOINT, Backend(device="cpu", dtype="fp32"), quiet=True)


def without_text(engine: Engine, *stops: int) -> Engine:
    """The same model with other stop tokens."""
    return Engine(engine.model, engine.backend, None, frozenset(stops))


def greedy(engine: Engine, prompts: list[list[int]], new: int, **options: Any) -> list[list[int]]:
    return [
        c.tokens for c in engine.generate(prompts, max_new_tokens=new, temperature=0.0, **options)
    ]


# ---------------------------- load and logits
def test_the_callers_autocast_changes_nothing(engine: Engine) -> None:
    """The switch `amp` decides, wherever the engine is called from."""
    tokens = torch.tensor([[0, 5, 7, 9]])
    alone, text = engine.logits(tokens), greedy(engine, PROMPTS, 8)
    with torch.autocast("cpu", torch.bfloat16):
        within, again = engine.logits(tokens), greedy(engine, PROMPTS, 8)
    assert torch.equal(alone, within) and text == again


def test_load(engine: Engine) -> None:
    assert isinstance(engine.config, r1.Config)
    # What its shards store as FP8 is test_quant_switch.py's.
    assert engine.config.change(stored=()) == TINY.change(fp8_block=(128, 128))
    backend = engine.backend
    assert isinstance(backend, Backend) and "auto" not in dataclasses.astuple(
        backend
    )  # what really runs
    assert (backend.attention, backend.prefill_attention, backend.moe, backend.dtype) == (
        "absorbed",
        "expand",
        "gather",
        "fp32",
    )
    assert next(engine.model.parameters()).dtype == torch.float32 and not engine.model.training
    assert not any(p.requires_grad for p in engine.model.parameters())
    assert r1.load(CHECKPOINT, quiet=True).config == engine.config


def test_logits(engine: Engine) -> None:
    tokens = torch.tensor([[0, 5, 7, 9], [0, 9, 300, 319]])
    logits = engine.logits(tokens)
    assert (
        logits.shape == (2, 4, 320)
        and logits.dtype == torch.float32
        and bool(torch.isfinite(logits).all())
    )
    changed = tokens.clone()
    changed[:, 2] = 1
    other = engine.logits(changed)
    assert float((logits - other)[:, :2].abs().max()) < atol("algebra fp32")  # causal
    assert float((logits - other)[:, 2:].abs().amax(dim=-1).min()) > 1e-3
    half = r1.load(CHECKPOINT, Backend(device="cpu", dtype="bf16"), quiet=True).logits(tokens)
    assert half.dtype == torch.float32 and half.shape == logits.shape
    assert torch.equal(engine.logits(tokens), logits)


# ---------------------------- generate
def test_greedy_is_what_logits_say(engine: Engine) -> None:
    """Token by token the argmax of a full forward; only new tokens are returned; the same again and
    again.
    """
    completions = engine.generate(PROMPTS, max_new_tokens=8, temperature=0.0, ignore_stop=True)
    assert [c.prompt_tokens for c in completions] == [3, 2, 6]
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert (
            isinstance(completion, Completion)
            and len(completion.tokens) == 8
            and completion.finish == "length"
        )
        logits = engine.logits(torch.tensor([prompt + completion.tokens]))[0, len(prompt) - 1 : -1]
        top = logits.topk(2).values
        sure = (top[:, 0] - top[:, 1]) > 1e-4
        assert int(sure.sum()) >= 6
        assert torch.equal(logits.argmax(-1)[sure], torch.tensor(completion.tokens)[sure])
        assert 0 < completion.ttft <= completion.seconds and completion.tpot > 0
    assert greedy(engine, PROMPTS, 8, ignore_stop=True) == [c.tokens for c in completions]


def test_a_seed_makes_it_again(engine: Engine) -> None:
    def sampled(seed: int | None) -> list[list[int]]:
        # Hot: at 0.6 the trained weights leave so little open that two draws in a hundred are the
        # same.
        found = engine.generate(
            PROMPTS, max_new_tokens=12, temperature=2.0, top_p=1.0, seed=seed, ignore_stop=True
        )
        return [c.tokens for c in found]

    assert sampled(1) == sampled(1) != sampled(2)
    assert sampled(None) != sampled(None)
    assert sampled(1) != greedy(engine, PROMPTS, 12, ignore_stop=True)


def test_stop(engine: Engine) -> None:
    """A stop token ends its own row, as its last token; the other rows go on as if nothing had
    been.
    """
    free = greedy(without_text(engine), PROMPTS, 12)
    assert all(len(tokens) == 12 for tokens in free)
    stop = next(t for t in free[0] if t not in free[1])
    first = free[0].index(stop)
    stopped = without_text(engine, stop).generate(PROMPTS, max_new_tokens=12, temperature=0.0)
    assert stopped[0].tokens == free[0][: first + 1] and stopped[0].finish == "stop"
    assert stopped[1].tokens == free[1] and stopped[1].finish == "length"
    assert stopped[0].seconds < stopped[1].seconds
    ignored = without_text(engine, stop).generate(
        PROMPTS, max_new_tokens=12, temperature=0.0, ignore_stop=True
    )
    assert [c.tokens for c in ignored] == free and {c.finish for c in ignored} == {"length"}


def test_all_rows_stopped_ends_the_work(engine: Engine) -> None:
    steps: list[list[int | None]] = []
    every = without_text(engine, *range(320))
    with mock.patch.object(every.runner, "decode", wraps=every.runner.decode) as decode:
        completions = every.generate(
            PROMPTS, max_new_tokens=50, temperature=0.0, on_tokens=steps.append
        )
    assert decode.call_count == 0  # nothing is computed that nobody will see
    assert [len(c.tokens) for c in completions] == [1, 1, 1] and len(steps) == 1
    assert {c.finish for c in completions} == {"stop"} and {c.tpot for c in completions} == {0.0}


def test_many_rows_are_read_in_short_chunks(engine: Engine) -> None:
    """A prefill call's tokens are bounded over all rows together."""
    runner = engine.runner
    with (
        mock.patch("r1.run.runner.MOST_TOKENS", 9),
        mock.patch.object(runner, "_read", wraps=runner._read) as read,
    ):
        runner.prefill([[5] * 8, [6] * 3], runner.cache(2, 8))
    assert [tuple(call.args[2].shape) for call in read.call_args_list] == [(2, 4), (2, 4)]


def test_the_stream_is_the_result(engine: Engine) -> None:
    free = greedy(without_text(engine), PROMPTS, 10)
    stop = next(t for t in free[2][2:6] if t not in free[0])
    steps: list[list[int | None]] = []
    completions = without_text(engine, stop).generate(
        PROMPTS, max_new_tokens=10, temperature=0.0, on_tokens=steps.append
    )
    assert len(steps) == 10 and all(len(step) == 3 for step in steps)
    for row, completion in enumerate(completions):
        column = [step[row] for step in steps]
        assert column == completion.tokens + [None] * (10 - len(completion.tokens))
    assert steps[-1][2] is None


def test_one_new_token(engine: Engine) -> None:
    (completion,) = engine.generate([[0, 5, 7]], max_new_tokens=1, temperature=0.0)
    assert len(completion.tokens) == 1 and completion.tpot == 0.0


def test_the_context_is_the_limit() -> None:
    """A row goes on to the last position of the context and no further; a longer prompt is
    refused.
    """
    config = TINY.change(num_hidden_layers=2, max_position_embeddings=16)
    run = runner(unit_gain(config))
    small = Engine(run.model, run.backend)
    prompts = [list(range(12)), [3]]
    completions = small.generate(prompts, max_new_tokens=100, temperature=0.0)
    assert [len(c.tokens) for c in completions] == [4, 4] and {c.finish for c in completions} == {
        "length"
    }
    assert len(small.generate([[3] * 15], 100)[0].tokens) == 1
    with pytest.raises(InputError, match="leaves no room for an answer in a context of 16"):
        small.generate([[3] * 16])
    with pytest.raises(InputError, match="has 17 tokens, more than the context of 16"):
        small.generate([[3] * 17])
    assert small.logits(torch.zeros(1, 16, dtype=torch.int64)).shape == (1, 16, 320)
    with pytest.raises(InputError, match="more than the context"):
        small.logits(torch.zeros(1, 17, dtype=torch.int64))


# ---------------------------- sampling
DRAWS = 40_000
CRITICAL = {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7}
"""Chi-square's 0.9999 quantile by degrees of freedom; the seed is fixed, so a pass stays one."""


def chi_square(sampler: Sampler, logits: list[float], wanted: list[float]) -> bool:
    """Whether DRAWS samples of one row of logits fall as `wanted` says: never where it is 0, else
    by Pearson's test.
    """
    drawn = sampler(torch.tensor(logits).expand(DRAWS, -1))[0].bincount(minlength=len(logits))
    expected = torch.tensor(wanted) * DRAWS
    if bool((drawn[expected == 0] > 0).any()):
        return False
    seen, expected = drawn[expected > 0], expected[expected > 0]
    statistic = float(((seen - expected) ** 2 / expected).sum())
    return len(seen) == 1 or statistic < CRITICAL[len(seen) - 1]


P = [0.05, 0.4, 0.1, 0.15, 0.3]
LOGITS = torch.tensor(P).log().tolist()


def softened(p: list[float], temperature: float) -> list[float]:
    powers = [x ** (1 / temperature) for x in p]
    return [x / sum(powers) for x in powers]


def nucleus(p: list[float], kept: list[int]) -> list[float]:
    total = sum(p[i] for i in kept)
    return [x / total if i in kept else 0.0 for i, x in enumerate(p)]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    assert chi_square(Sampler(temperature, 1.0, seed=0), LOGITS, softened(P, temperature))
    assert not chi_square(
        Sampler(temperature, 1.0, seed=0), LOGITS, softened(P, temperature * 1.1)
    )  # the test can fail


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, [1]),
        (0.45, [1, 4]),
        (0.69, [1, 4]),
        (0.72, [1, 4, 3]),
        (0.86, [1, 4, 3, 2]),
        (1.0, [0, 1, 2, 3, 4]),
        (1e-9, [1]),
    ],
)
def test_nucleus(top_p: float, kept: list[int]) -> None:
    """The fewest likeliest tokens that reach top_p, in proportion; the first one always, the tail
    never.
    """
    assert chi_square(Sampler(1.0, top_p, seed=0), LOGITS, nucleus(P, kept))


def test_temperature_comes_before_the_nucleus() -> None:
    """At temperature 0.5 the two likeliest reach 0.8 already (0.56 + 0.31); the other way round it
    takes three.
    """
    assert chi_square(Sampler(0.5, 0.8, seed=0), LOGITS, nucleus(softened(P, 0.5), [1, 4]))


@pytest.mark.parametrize("temperature", [1e-38, 1e-40, 1e-46, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    """The last two are 0 in fp32."""
    logits = torch.tensor([[3.0, 9.0, -4.0], [0.5, 0.25, 0.75]])
    assert Sampler(temperature, 1.0, 0)(logits)[0].tolist() == [1, 2]


def test_rows_are_drawn_apart() -> None:
    """Each row by its own logits, and independently of its neighbour."""
    rows = torch.tensor([[0.0, 0.0], [20.0, -20.0], [-20.0, 20.0]]).repeat(5000, 1)
    drawn = Sampler(1.0, 1.0, seed=3)(rows)[0].view(-1, 3)
    assert (
        drawn[:, 1].sum() == 0
        and drawn[:, 2].sum() == 5000
        and 2300 < int(drawn[:, 0].sum()) < 2700
    )
    pairs = Sampler(1.0, 1.0, seed=4)(torch.zeros(10000, 2))[0].view(-1, 2)
    assert 1100 < int((pairs[:, 0] & pairs[:, 1]).sum()) < 1400  # a quarter of 5000: 1250 +- 31


def test_defaults_and_greedy() -> None:
    assert (Sampler().temperature, Sampler().top_p) == (TEMPERATURE, TOP_P) == (0.6, 0.95)
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampler(0.0)(logits)[0], logits.argmax(-1))
    one, two = Sampler(1.0, seed=7), Sampler(1.0, seed=7)
    first = one(logits)[0]
    assert torch.equal(first, two(logits)[0]) and torch.equal(one(logits)[0], two(logits)[0])
    assert not torch.equal(first, Sampler(1.0, seed=8)(logits)[0])
    # Very small and very large values neither overflow nor divide 0 by 0.
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    assert Sampler(0.01, 0.95, seed=0)(extreme)[0][0] == 0


# ---------------------------- logits that are no numbers
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_score_tells_logits_that_are_no_distribution(temperature: float, top_p: float) -> None:
    """One NaN, one +inf, nothing but -inf; a hidden token (-inf) is none of these."""
    rows = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    rows[0, 4], rows[1, 4], rows[2], rows[3, 4] = math.nan, math.inf, -math.inf, -math.inf
    token, score = Sampler(temperature, top_p, seed=0)(rows)
    assert score.isfinite().tolist() == [False, False, False, True, True]
    right = rows if temperature == 0 else Sampler(temperature, top_p).probabilities(rows)
    assert torch.equal(score[3:], right.gather(1, token[:, None])[3:, 0])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_logits_that_are_no_numbers(at: int, drafts: int, temperature: float) -> None:
    """One NaN in a hidden state of row 1, of the prompt or of a later step, ends the answer."""
    broken = drafting_engine(V3, 3, drafts)
    calls = itertools.count()

    def break_one(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        place = len(PROMPTS[1]) - 1 if at == 0 else 0
        if next(calls) == at:
            output[1, place, 5] = math.nan
        return output

    broken.model.norm.register_forward_hook(break_one)
    with pytest.raises(InputError, match="logits for prompt 1 are no numbers: the checkpoint's"):
        broken.generate(PROMPTS, 12, temperature, seed=0)
    assert next(calls) <= at + 2
    assert len(broken.generate(PROMPTS, 12, temperature)) == 3  # the next call is another


def test_a_rejected_drafts_logits_do_not_matter() -> None:
    """Nothing is chosen after a rejected draft; what the model says there may overflow."""
    wanted = greedy(drafting_engine(V3, 3), PROMPTS, 12)
    engine, rejected = drafting_engine(V3, 3, 2), 0
    judge = speculate.judge

    def judged(p: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        nonlocal rejected
        accepted, rest = judge(p, *arguments)
        rejected += int((accepted < 2).sum())
        where.append(accepted)
        return accepted, rest

    where: list[Tensor] = []
    amax = Tensor.amax

    def broken(logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
        best = amax(logits, *arguments, **options)
        after = torch.arange(best.shape[1]) > where[-1][:, None]
        return best.masked_fill(after, math.nan)

    with mock.patch.object(speculate, "judge", judged), mock.patch.object(Tensor, "amax", broken):
        assert greedy(engine, PROMPTS, 12) == wanted
    assert rejected


@pytest.mark.parametrize(
    ("dtype", "advice"), [("fp16", "take bf16 or fp32"), ("bf16", "with dtype fp32"), ("fp32", "")]
)
def test_what_to_do_about_them(dtype: str, advice: str) -> None:
    engine = drafting_engine(V3, 3, dtype=dtype)
    engine.model.norm.weight.data[3] = math.inf
    with pytest.raises(InputError, match=f"are no numbers: .*{advice}"):
        greedy(engine, [[0, 5]], 2)


# ---------------------------- chat and MTP
def test_chat(engine: Engine) -> None:
    messages = [{"role": "user", "content": "17*23=?"}]
    streamed: list[tuple[str, str]] = []
    completion = engine.chat(
        messages, max_new_tokens=200, seed=0, on_text=lambda a, b: streamed.append((a, b))
    )
    assert (
        "17 * 20" in completion.reasoning
        and completion.answer == "17 * 23 = 391."
        and completion.finish == "stop"
    )
    assert "".join(a for a, _ in streamed).strip() == completion.reasoning.strip()
    assert "".join(b for _, b in streamed).strip() == completion.answer.strip()
    again = engine.chat(messages, max_new_tokens=200, seed=0)
    assert (again.tokens, again.reasoning, again.answer) == (
        completion.tokens,
        completion.reasoning,
        completion.answer,
    )
    assert engine.tokenizer is not None
    assert completion.prompt_tokens == len(engine.tokenizer.chat_prompt(messages, think=True))
    with pytest.raises(InputError, match="no tokenizer"):
        without_text(engine).chat(messages)


def test_mtp_layer() -> None:
    """Loaded when asked for, callable, and neither of its two inputs is taken for the other."""
    loaded = r1.load(CHECKPOINT, Backend(device="cpu", dtype="fp32"), mtp=True, quiet=True)
    layer, tokens = loaded.model.mtp[0], torch.tensor([[0, 5, 7, 9], [0, 9, 11, 13]])
    with torch.inference_mode():
        step = loaded.model.step("prefill", torch.arange(3).expand(2, -1), 0)
        hidden = loaded.model(tokens[:, :-1], step)
        embedding = loaded.model.embed_tokens(tokens[:, 1:])
        out = layer(embedding, hidden, step)
        assert out.shape == (2, 3, 160) and bool(torch.isfinite(out).all())
        logits = loaded.model.lm_head(out)
        assert logits.shape == (2, 3, 320)
        assert float((layer(hidden, embedding, step) - out).abs().max()) > 0.1
        assert float((layer(embedding, hidden.roll(1, 0), step) - out).abs().max()) > 1e-3
        assert float((layer(embedding.roll(1, 0), hidden, step) - out).abs().max()) > 1e-3
        # Decoding it through a cache of its own is the same.
        cache = loaded.runner.cache(2, 8)
        one = [
            layer(
                embedding[:, i : i + 1],
                hidden[:, i : i + 1],
                loaded.model.step("decode", torch.full((2, 1), i), 128),
                cache.layers[0],
            )
            for i in range(3)
        ]
        assert float((torch.cat(one, dim=1) - out).abs().max()) < atol("algebra fp32")


# ---------------------------- python -m r1
def test_a_question_on_the_command_line() -> None:
    result = command("2+2?", "--new", "8", "--seed", "1")
    assert result.returncode == 0, result.stderr
    found = TIMING.search(result.stderr)
    assert found and 1 <= int(found[1]) <= 8
    assert result.stdout.endswith("\n") and "\x1b" not in result.stdout  # no colors into a pipe
    assert "Traceback" not in result.stderr


def test_a_chat_on_stdin() -> None:
    """Two questions, an empty line between that isn't one, and the end of the input."""
    result = command("--new", "4", "--temperature", "0", "--device", "cpu", stdin="1+1\n\n2+2\n")
    assert result.returncode == 0, result.stderr
    assert len(TIMING.findall(result.stderr)) == 2 and result.stderr.count("\n") == 2
    assert ">" not in result.stdout  # the prompt is for those who type


def test_what_the_user_should_know_is_said(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """fp16's range is; that a model without speculation has no use for its MTP layer is not, nor is
    it lost.
    """
    from r1.__main__ import main

    said = {}
    for dtype in ("fp32", "fp16"):
        assert main(["2+2?", "--new", "2", "--device", "cpu", "--dtype", dtype]) == 0
        said[dtype] = [
            line for line in capsys.readouterr().err.splitlines() if not TIMING.match(line)
        ]
    assert (
        said["fp32"] == []
        and len(said["fp16"]) == 1
        and said["fp16"][0].startswith("r1: fp16 ends at 65504")
    )
    assert any("MTP layers are loaded only when asked for" in note for note in engine.notes)
