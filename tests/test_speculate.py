"""Tests speculation: the text is the model's own, whatever the drafter is worth.

Holds to account: r1/run/speculate.py, r1/run/drafter.py, r1/model/mtp.py and their switches.
test_draft_model.py has what only a small model as drafter does.

Each test is shown to fail on a wrong turn.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import ROOT
from command import TIMING, command
from conftest import CountingBackend
from models import FIVE_WORDS, ROOMY, V3, drafted_engine, with_switches
from models import drafting_engine as engine
from recorded import recorded
from tolerances import atol
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import r1
from r1 import Backend, InputError
from r1.bench import arms
from r1.model.cache import Cache
from r1.model.shapes import shape
from r1.run import speculate
from r1.run.completion import Completion
from r1.run.drafter import Drafter, Judged, MTPDrafter
from r1.run.engine import Engine
from r1.run.sampler import Sampler
from r1.run.speculate import Turn, judge
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

PROMPTS = [[3, 1, 4, 1, 3], [2], [4, 4, 0, 3, 2, 1, 0, 0, 2, 3, 1], [0, 4, 2]]
SEED = 2
"""With these weights every number of drafts is accepted at some time, for k = 1, 2 and 3."""
H100 = Machine(cuda=True, name="NVIDIA H100", capability=(9, 0), memory=80 * 10**9)


def greedy(
    engine: Engine, new: int, prompts: list[list[int]] = PROMPTS, **options: Any
) -> list[Completion]:
    return engine.generate(prompts, max_new_tokens=new, temperature=0.0, **options)


def texts(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def drafter_of(engine: Engine) -> Drafter:
    assert engine.drafter is not None
    return engine.drafter


drafted = partial(drafted_engine, noise=0.1)
BOTH = pytest.mark.parametrize("make", [engine, drafted], ids=["mtp", "draft"])
"""The makers of engines, by what drafts. Each has weights of its own, the same for every k."""
Make = Callable[..., Engine]


# ---------------------------- greedy
def differing(
    k: int, seeds: range, new: int = 24, make: Make = engine, **switches: Any
) -> tuple[int, Counter[int]]:
    """How many rows differ from plain ones, and how many turns accepted 0, 1, ... drafts."""
    different, accepted = 0, Counter[int]()
    for seed in seeds:
        wanted = texts(greedy(make(ROOMY, seed, **switches), new))
        speculating = make(ROOMY, seed, k, **switches)
        different += sum(
            a != b for a, b in zip(texts(greedy(speculating, new)), wanted, strict=True)
        )
        drafter = drafter_of(speculating)
        cache = drafter.cache(len(PROMPTS), 64)
        turns = speculate.speculate(drafter, PROMPTS, Sampler(0.0), cache)
        next(turns)
        accepted.update(count for _ in range(6) for count in next(turns)[0][:, -1].tolist())
    return different, accepted


@BOTH
@pytest.mark.parametrize("k", [1, 2, 3])
def test_greedy_text_is_the_same(k: int, make: Make) -> None:
    """Ragged batches over random models, and every number of accepted drafts comes up."""
    different, accepted = differing(k, range(8), make=make)
    assert different == 0
    assert set(accepted) == set(range(k + 1)), accepted
    if make is engine:  # a model that looks farther back than its drafter is right
        assert differing(k, range(4), blocks=1.0)[0] == 0


@pytest.mark.parametrize("attention", ["naive", "expand", "absorbed"])
@pytest.mark.parametrize("moe", ["loop", "gather", "grouped"])
def test_with_every_strategy(attention: str, moe: str) -> None:
    prefill = "naive" if attention == "naive" else "expand"
    assert (
        differing(
            2,
            range(1),
            attention=attention,
            prefill_attention=prefill,
            moe=moe,
            prefill_moe="grouped",
        )[0]
        == 0
    )


def one_more(p: Tensor, q: Tensor, drafts: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    accepted, weights = judge(p, q, drafts, *rest)
    return (accepted + 1).clamp(max=drafts.shape[1]), weights


def not_a_prefix(
    p: Tensor, q: Tensor, drafts: Tensor, uniform: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    agree = p[:, :-1].argmax(-1) == drafts
    accepted = agree.sum(dim=1)
    return accepted, p[torch.arange(len(p)), accepted]


def next_from_one_before(p: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    accepted, _ = judge(p, *rest)
    return accepted, p[torch.arange(len(p)), (accepted - 1).clamp(min=0)]


@pytest.mark.parametrize("wrong", [one_more, not_a_prefix, next_from_one_before])
def test_wrong_judges_change_the_text(
    wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculate, "judge", wrong)
    assert differing(2, range(2))[0] > 0


@pytest.mark.parametrize("shift", [-1, 1])
def test_wrong_positions_change_the_text(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that reads its tokens one place off: lengths that grew by one too many, or too few."""
    right = Turn.__call__

    def wrong(
        self: Turn, tokens: Tensor, q: Tensor, uniform: Tensor, exponential: Tensor, cache: Cache
    ) -> tuple[Tensor, ...]:
        outputs = right(self, tokens, q, uniform, exponential, cache)
        cache.lengths += shift
        return outputs

    monkeypatch.setattr(Turn, "__call__", wrong)
    assert differing(2, range(2))[0] > 0


def test_a_prompt_of_several_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(48, (n,), generator=generator).tolist() for n in (30, 7, 17)]
    wanted, speculating = engine(ROOMY, 0), engine(ROOMY, 0, 2)
    speculating.runner.prefill_chunk = 8
    assert texts(greedy(speculating, 12, prompts)) == texts(greedy(wanted, 12, prompts))


# ---------------------------- stops and limits
@BOTH
def test_a_stop_within_an_accepted_run(make: Make) -> None:
    """The stop token is the last, wherever in a turn it came; the rows beside it go on as they
    would have.
    """
    free = texts(greedy(make(ROOMY, SEED), 24))
    seen = 0
    for stop in sorted({token for row in free for token in row[1:6]}):
        plain, speculating = make(ROOMY, SEED, 0, (stop,)), make(ROOMY, SEED, 3, (stop,))
        steps: list[list[int | None]] = []
        wanted, found = greedy(plain, 24), greedy(speculating, 24, on_tokens=steps.append)
        assert [(c.tokens, c.finish) for c in found] == [(c.tokens, c.finish) for c in wanted]
        assert texts(found) == [
            [token for step in steps if (token := step[row]) is not None] for row in range(4)
        ]
        assert not any(all(token is None for token in step) for step in steps)
        seen += sum(
            c.finish == "stop" and c.accepted + 1 + c.steps > len(c.tokens) for c in found
        )  # more was accepted
        ignored = greedy(speculating, 24, ignore_stop=True)
        assert texts(ignored) == free and {c.finish for c in ignored} == {"length"}
    assert seen > 0


@BOTH
@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 9])
def test_the_limit_cuts_an_accepted_run(new: int, make: Make) -> None:
    found = greedy(make(ROOMY, SEED, 3), new)
    assert texts(found) == texts(greedy(make(ROOMY, SEED), new))
    assert all(len(c.tokens) == new and c.finish == "length" for c in found)


@BOTH
def test_a_row_that_is_done_stays_in_the_cache(make: Make) -> None:
    """Capacity is what the slowest row needs: one that accepts all its drafts would pass the end
    several times over.
    """
    for k in (1, 3):
        speculating = make(ROOMY, SEED, k)
        new = 128 - k - len(PROMPTS[2])
        drafter = drafter_of(speculating)
        cache = drafter.cache(4, new + len(PROMPTS[2]))
        assert cache.capacity == 128
        turns = speculate.speculate(drafter, PROMPTS, Sampler(0.0), cache, assumed=0.9)
        for _ in range(128):
            next(turns)
        assert cache.lengths.tolist() == [128 - k - 1] * 4


def test_the_last_drafts_have_room() -> None:
    """Text that fills a cache of 128 to the end: what the last turn drafts must not cost it a
    token.
    """
    prompts = torch.randint(48, (8, 120), generator=torch.Generator().manual_seed(0)).tolist()
    found, wanted = (texts(greedy(engine(ROOMY, SEED, k, blocks=1.0), 8, prompts)) for k in (3, 0))
    assert found == wanted


@BOTH
def test_the_context_is_the_limit(make: Make) -> None:
    short = V3.change(max_position_embeddings=20)
    found = greedy(make(short, SEED, 2), 100)
    assert texts(found) == texts(greedy(make(short, SEED), 100)) and {
        len(c.tokens) for c in found
    } == {9}


@BOTH
def test_what_is_reported(make: Make) -> None:
    done = greedy(make(ROOMY, SEED, 2), 24)
    for c in done:
        assert c.drafted == 2 * c.steps and 0 <= c.acceptance <= 1
        assert 0 <= c.steps + c.accepted + 1 - len(c.tokens) <= 2  # the last turn may have been cut
        assert c.tokens_per_step == pytest.approx(23 / c.steps) and 1 <= c.tokens_per_step <= 3
    assert sum(c.accepted for c in done) > 0
    plain = greedy(engine(ROOMY, SEED), 24)
    assert {(c.steps, c.drafted, c.accepted, c.acceptance, c.tokens_per_step) for c in plain} == {
        (23, 0, 0, 0.0, 1.0)
    }
    assert {c.tokens_per_step for c in greedy(engine(ROOMY, SEED), 1)} == {0.0}


# ---------------------------- caches
def clean_run(network: Any, text: Tensor, layers: list[Any], k: int) -> list[int]:
    """Fill `layers` by whole forwards over text (1, S), and return the k drafts after it.

    It uses nothing of speculate.py.
    """
    length = text.shape[1] - 1
    states = network(text[:, :-1], network.step("prefill", torch.arange(length)[None], 0), layers)
    drafts: list[int] = []
    for number in range(k):
        step = network.step("prefill", torch.arange(length + number)[None], 0)
        said = network.mtp[0](network.embed_tokens(text[:, 1:]), states, step, layers[-1])[:, -1:]
        drafts.append(int(network.lm_head(said).argmax()))
        text, states = (
            torch.cat((text, torch.tensor([drafts[-1:]])), dim=1),
            torch.cat((states, said), dim=1),
        )
    return drafts


def cache_errors(k: int, turns: int = 9, chunk: int = 2048) -> tuple[float, Counter[int]]:
    """Run some turns, and compare the caches with those of a clean run over each row's text.

    Returns the largest difference in any layer, the drafter's too (1 where the next drafts differ),
    and how many turns accepted 0, 1, ... drafts.
    """
    speculating = engine(ROOMY, SEED, k)
    run, network, drafter = speculating.runner, speculating.model, drafter_of(speculating)
    run.prefill_chunk = chunk
    cache = drafter.cache(len(PROMPTS), 96)
    turn = Turn(drafter, Sampler(0.0))
    with run.context():
        hidden = run.read(PROMPTS, cache, along=drafter.along)
        token = network.lm_head(hidden).argmax(-1)
    rows = [[*prompt, int(t)] for prompt, t in zip(PROMPTS, token, strict=True)]
    tokens, q = turn.begin(PROMPTS, hidden, token, cache)
    error, counts = 0.0, Counter[int]()
    for _ in range(turns):
        inputs = (tokens, q, *turn.random(cache))
        following, accepted, _, tokens, q = run.call((), turn, inputs, cache)
        for row, new, count in zip(rows, following.tolist(), accepted.tolist(), strict=True):
            row += new[: count + 1]
            counts[count] += 1
        for number, row in enumerate(rows):
            assert int(cache.lengths[number]) == len(row) - 1
            clean = drafter.cache(1, 96)
            with run.context():
                drafts = clean_run(network, torch.tensor([row]), clean.layers, k)
            error = max(error, float(tokens[number].tolist() != [row[-1], *drafts]))
            for layer, (ours, theirs) in enumerate(zip(cache.layers, clean.layers, strict=True)):
                end = (
                    len(row) - 1 + (k - 1 if layer == run.config.num_hidden_layers else 0)
                )  # the drafter's guesses too
                error = max(error, float((ours[0][number] - theirs[0][0])[:end].abs().max()))
    return error, counts


@pytest.mark.parametrize("k", [1, 2, 3])
def test_caches_are_a_clean_runs(k: int) -> None:
    error, counts = cache_errors(k)
    assert error < atol("algebra fp32")
    assert set(counts) == set(range(k + 1)), "every number of accepted drafts came up"
    # The drafter reads along with every chunk of a prompt.
    assert cache_errors(k, turns=1, chunk=4)[0] < atol("algebra fp32")


def test_a_drafter_that_reads_wrongly_is_found() -> None:
    """Not the text but the cache, and so the acceptance, would suffer: each way to be one off
    shows.
    """
    read, draft = MTPDrafter.run, Turn.draft

    def unshifted(self: MTPDrafter, following: Tensor, *rest: Any) -> Tensor:
        return read(self, following.roll(1, 1), *rest)

    def one_state_late(self: MTPDrafter, following: Tensor, hidden: Tensor, *rest: Any) -> Tensor:
        return read(self, following, hidden.roll(1, 1), *rest)

    def one_too_far(self: Turn, judged: Judged, *rest: Any) -> tuple[Tensor, Tensor]:
        later = (judged.last + 1).clamp(max=2)
        return draft(self, dataclasses.replace(judged, last=later), *rest)

    def drafts_kept(
        self: Turn, judged: Judged, cache: Cache, exponential: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Entries of the drafter's own output, or of rejected tokens, are not made again."""
        before = [tensor.clone() for tensor in cache.layers[-1]]
        found = draft(self, judged, cache, exponential)
        first = (judged.step.positions[:, :1] + judged.last[:, None])[
            ..., None
        ]  # only the newest entry is written
        slots = torch.arange(before[0].shape[1])[None, :, None]
        for tensor, old in zip(cache.layers[-1], before, strict=True):
            tensor.copy_(torch.where(slots < first, old, tensor))
        return found

    def guesses_one_late(
        self: Turn, judged: Judged, cache: Cache, exponential: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The drafter's second entry leaves a hole before it."""
        cache.lengths += 1
        drafts = draft(self, judged, cache, exponential)
        cache.lengths -= 1
        return drafts

    mistakes: tuple[tuple[type, str, Callable[..., Any]], ...] = (
        (MTPDrafter, "run", unshifted),
        (MTPDrafter, "run", one_state_late),
        (Turn, "draft", one_too_far),
        (Turn, "draft", drafts_kept),
        (Turn, "draft", guesses_one_late),
    )
    for owner, name, wrong in mistakes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, wrong)
            assert cache_errors(2)[0] > 1000 * atol("algebra fp32"), wrong.__name__


# ---------------------------- sampling
DRAWS, NEW = 4000, 4
FOUR_WORDS = FIVE_WORDS.change(vocab_size=4)
"""A draft that lacks the last word."""


def exact(plain: Engine, prompt: list[int], sampler: Sampler) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of NEW tokens."""
    words = range(plain.config.vocab_size)
    every = torch.tensor([[*prompt, *tail] for tail in itertools.product(words, repeat=NEW)])
    p = sampler.probabilities(plain.logits(every))[:, len(prompt) - 1 : -1]  # (all, NEW, W)
    each = p.gather(2, every[:, len(prompt) :, None]).squeeze(2).double().prod(dim=1)
    return {
        tuple(tail): float(x)
        for tail, x in zip(every[:, len(prompt) :].tolist(), each, strict=True)
    }


def surprise(found: list[Completion], wanted: dict[tuple[int, ...], float]) -> float:
    """Pearson's chi-square over all continuations as a standard normal (Wilson and Hilferty); the
    rare ones are one cell.
    """
    seen = Counter(tuple(c.tokens) for c in found)
    cells, rare, rarely = [], 0.0, 0
    for tail, p in wanted.items():
        if p == 0 and seen[tail]:
            return math.inf
        if p * len(found) < 5:
            rare, rarely = rare + p * len(found), rarely + seen[tail]
        else:
            cells.append((seen[tail], p * len(found)))
    cells += [(rarely, rare)] if rare >= 5 else []
    statistic, free = sum((a - b) ** 2 / b for a, b in cells), len(cells) - 1
    assert free > 20
    return float(((statistic / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free)))


def sampled(k: int, temperature: float, top_p: float, make: Make = engine) -> tuple[float, float]:
    """How surprising what was sampled is, and the share of drafts that were accepted."""
    prompt = [3, 1, 4]
    speculating = make(FIVE_WORDS, 5, k)
    found = speculating.generate([prompt] * DRAWS, NEW, temperature, top_p, seed=11)
    acceptance = sum(c.accepted for c in found) / sum(c.drafted for c in found)
    wanted = exact(make(FIVE_WORDS, 5), prompt, Sampler(temperature, top_p))
    return surprise(found, wanted), acceptance


@pytest.mark.parametrize(
    "make", [engine, drafted, partial(drafted, draft=FOUR_WORDS)], ids=["mtp", "draft", "fewer"]
)
@pytest.mark.parametrize(
    ("k", "temperature", "top_p"), [(1, 1.0, 1.0), (1, 0.7, 0.9), (2, 1.3, 1.0), (3, 1.0, 0.85)]
)
def test_sampling_keeps_the_distribution(
    k: int, temperature: float, top_p: float, make: Make
) -> None:
    """Of whole continuations, so what follows on what is right too."""
    surprising, acceptance = sampled(k, temperature, top_p, make)
    assert abs(surprising) < 3.7  # one seed in 5000 would be farther off
    assert 0.2 < acceptance < 0.9, "both outcomes matter"


def all_of_p(p: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    accepted, _ = judge(p, q, *rest)
    return accepted, p[torch.arange(len(p)), accepted]


def other_q(p: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """As if the drafts had been drawn at another temperature."""
    softer = q.sqrt() / q.sqrt().sum(-1, keepdim=True)
    return judge(p, softer, *rest)


def half_as_strict(
    p: Tensor, q: Tensor, drafts: Tensor, uniform: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return judge(p, q, drafts, uniform / 2, *rest)


@pytest.mark.parametrize("wrong", [all_of_p, other_q, half_as_strict])
def test_wrong_rules_change_the_distribution(
    wrong: Callable[..., tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculate, "judge", wrong)
    assert sampled(2, 1.0, 0.9)[0] > 6


@BOTH
def test_a_seed_makes_it_again(make: Make) -> None:
    speculating = make(ROOMY, SEED, 2)
    one, two, other = (texts(speculating.generate(PROMPTS, 16, seed=seed)) for seed in (1, 1, 2))
    assert one == two != other


# ---------------------------- how it is called
@BOTH
def test_a_turn_asks_for_no_value(make: Make) -> None:
    """As test_properties.py shows for a step: tensors that have shapes but no values raise at every
    look at one.
    """
    for temperature in (0.0, 0.7):
        drafter = drafter_of(make(ROOMY, 0, 2, moe="gather"))
        with FakeTensorMode(allow_non_fake_inputs=True):
            cache = drafter.cache(2, 16)
            cache.lengths += torch.tensor([3, 5])
            turn = Turn(drafter, Sampler(temperature, seed=0))
            tokens, q = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2, 48)
            inputs = (tokens, q, torch.zeros(2, 2), torch.ones(2, 3, 48))
            following, accepted, _, _, _ = drafter.runner.call((), turn, inputs, cache)
            assert following.shape == (2, 3) and accepted.shape == (2,)


@pytest.mark.parametrize(("make", "graphs"), [(engine, 4), (drafted, 6)], ids=["mtp", "draft"])
def test_a_turn_is_compiled_once(compiler: CountingBackend, make: Make, graphs: int) -> None:
    """For k = 2 a dense block, a sparse one, and the drafter at S = 3 and S = 1: whole, once, and
    never again. For a draft, the two at S = 2 and S = 1.
    """
    wanted, speculating = make(ROOMY, SEED), make(ROOMY, SEED, 2, compile=True)
    drafter = drafter_of(speculating)
    cache = drafter.cache(len(PROMPTS), 64)
    turns = speculate.speculate(drafter, PROMPTS, Sampler(0.0), cache)
    next(turns)
    before = compiler.graphs
    for _ in range(12):
        next(turns)
    assert compiler.graphs - before == graphs
    assert texts(greedy(speculating, 24)) == texts(greedy(wanted, 24))
    assert compiler.graphs - before == graphs


@BOTH
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_turn_repeated_at_its_addresses(
    temperature: float, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a CUDA graph does: what was yielded isn't overwritten by later turns, and chance isn't
    frozen into the capture.
    """
    made = recorded(monkeypatch)
    made_engine = make(ROOMY, SEED, 2)
    drafter, plain = drafter_of(made_engine), made_engine.runner
    captured = with_switches(plain, cuda_graphs=True)
    found = []
    for run in (plain, captured):
        drafter.runner = run
        cache = drafter.cache(3, 60)
        assert cache.rows == (4 if run is captured else 3)
        sampler = Sampler(temperature, 0.95, seed=3)
        turns = speculate.speculate(drafter, [[7, 8]] * 3, sampler, cache)
        found.append([new for new, _ in itertools.islice(turns, 20)])
    assert len(made) == 1
    if temperature == 0:
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    else:  # a fourth row draws too, so the numbers are others
        rows = [
            [tokens[: tokens[-1] + 1] for tokens in (step[row].tolist() for step in found[1])]
            for row in range(3)
        ]
        assert rows[0] != rows[1] != rows[2]
        assert len({tuple(turn) for turn in rows[0]}) > 5


@BOTH
def test_rows_beyond_the_prompts(make: Make) -> None:
    """A cache for a CUDA graph has more rows than there are prompts: they run along, finite, and
    change nothing.
    """
    drafter = drafter_of(make(ROOMY, SEED, 2))
    cache = drafter.cache(8, 126)
    assert (cache.rows, cache.capacity) == (8, 128)
    rows: list[list[int]] = [[] for _ in PROMPTS]
    turns = speculate.speculate(drafter, PROMPTS, Sampler(0.0), cache)
    for step, scores in itertools.islice(turns, 12):
        assert step.shape == (4, 4) and scores.shape == (4, 3)
        for row, (*tokens, accepted) in zip(rows, step.tolist(), strict=True):
            row += tokens[: accepted + 1]
    wanted = texts(greedy(make(ROOMY, SEED), 12))
    assert [row[:12] for row in rows] == wanted
    turn, hidden, token = (
        Turn(drafter, Sampler(1.0)),
        torch.ones(4, 32),
        torch.ones(4, dtype=torch.int64),
    )
    _, q = turn.begin(PROMPTS, hidden, token, cache)
    cache.reset()
    _, empty = turn.begin(PROMPTS, hidden, token, cache)
    everything = [q, empty, *(tensor for layer in cache.layers for tensor in layer)]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in everything)


def test_assumed_acceptance() -> None:
    """Coins decide, and the rest of the turn is as ever."""
    drafter = drafter_of(engine(ROOMY, SEED, 3))
    for assumed, least, most in (
        (0.0, 0, 0),
        (1.0, 3, 3),
        (0.8, 1.85, 2.05),
    ):  # 0.8 + 0.64 + 0.512 = 1.952
        cache = drafter.cache(32, 300)
        sampler = Sampler(0.0, seed=0)
        turns = itertools.islice(
            speculate.speculate(drafter, [[1, 2]] * 32, sampler, cache, assumed=assumed), 1, 50
        )
        mean = float(torch.stack([step[:, -1] for step, _ in turns]).double().mean())
        assert least <= mean <= most


# ---------------------------- the switches
def test_what_cannot_draft_is_refused() -> None:
    with pytest.raises(InputError, match="this model has none: use speculate=off"):
        resolve(Backend(speculate="mtp"), shape("moonlight-16b"), H100)
    with pytest.raises(InputError, match="draft_tokens=2 is of no use without drafts"):
        resolve(Backend(draft_tokens=2), V3, H100)


def test_experts_are_chosen_for_the_tokens_of_a_turn() -> None:
    """R1 has 256 experts, 8 of them for each token: up to 8 tokens are gathered, and 2 rows of k =
    4 have ten.
    """
    for batch, k, moe in (
        (2, 1, "gather"),
        (4, 1, "gather"),
        (5, 1, "grouped"),
        (2, 3, "gather"),
        (2, 4, "grouped"),
    ):
        backend = Backend(dtype="bf16", speculate="mtp", draft_tokens=k)
        assert resolve(backend, shape("r1"), H100, batch=batch).moe == moe, (batch, k)
    assert resolve(Backend(dtype="bf16"), shape("r1"), H100, batch=5).moe == "gather"


def test_arms_keep_the_number_of_drafts_with_their_switch() -> None:
    found = arms.from_switches({"compile": True, "speculate": "mtp", "draft_tokens": 2})
    assert [a.name for a in found] == [
        "baseline",
        "compile",
        "speculate=mtp + draft_tokens=2",
        "compile + speculate=mtp + draft_tokens=2",
    ]
    assert (found[2].backend.draft_tokens, found[1].backend.draft_tokens) == (2, 1)


def test_on_the_embedded_checkpoint() -> None:
    """Loaded by the switch alone; and the command reports the acceptance."""
    checkpoint = ROOT / "weights" / "tiny-r1"
    speculating = r1.load(
        checkpoint, Backend(device="cpu", dtype="fp32", speculate="mtp", draft_tokens=2), quiet=True
    )
    assert len(speculating.model.mtp) == 1 and not any(
        "MTP layers" in note for note in speculating.notes
    )
    plain = r1.load(checkpoint, Backend(device="cpu", dtype="fp32"), quiet=True)
    assert texts(greedy(speculating, 12)) == texts(greedy(plain, 12))
    result = command("2+2?", "--new", "8", "--seed", "1", "--speculate", "mtp")
    assert result.returncode == 0 and TIMING.search(result.stderr), result.stderr
    assert "of drafts accepted" in result.stderr and "tokens a step" in result.stderr
