"""Tests what must hold for any model of this architecture, on small random ones.

Holds to account: r1/model and r1/run.

Random models are of unit gain (`unit_gain` in models.py): sharper ones amplify fp32's own rounding.
Two numerics may choose differently where two experts nearly tie: `tied` leaves such draws out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import CountingBackend
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from models import (
    TINY,
    TINY_GROUPED,
    configs,
    gate_of,
    grouped_configs,
    random_tokens,
    runner,
    unit_gain,
)
from tolerances import atol
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

import r1
from r1 import Backend, Config
from r1.model import dispatch, gqa_attend, rope
from r1.model.cache import Cache
from r1.model.dispatch import Gather, Loop
from r1.model.layers import swiglu
from r1.model.moe import Experts, MoE
from r1.model.router import Router
from r1.model.transformer import Transformer
from r1.run.engine import Engine
from r1.run.runner import Runner
from r1.storage.joined import join
from r1.switches.resolve import resolve

ATTENTION = ("naive", "expand", "absorbed")
GQA = "gqa-"
"""Before the names of the strategies for grouped-query attention."""
GROUPED = tuple(f"{GQA}{strategy.name}" for strategy in gqa_attend.STRATEGIES)
ALL = (*ATTENTION, *GROUPED)
DISPATCH = {strategy.name: strategy for strategy in dispatch.STRATEGIES}
MOE = ("loop", "gather", "grouped")
assert set(MOE) == set(DISPATCH)
few = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,  # the same examples at each run: CI is no lottery
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def both(attention: str) -> dict[str, Any]:
    name = attention.removeprefix(GQA)
    return {"attention": name, "prefill_attention": name}


Drawn = tuple[Config, Config]
drawn_configs = st.tuples(configs(), grouped_configs())
"""A config with latent attention, and one with grouped-query attention."""


def config_of(attention: str, drawn: Drawn = (TINY, TINY_GROUPED)) -> Config:
    """The one that has this attention."""
    return drawn[attention.startswith(GQA)]


def tied(model: Transformer, tokens: Tensor, margin: float = 1e-4) -> bool:
    """Whether rounding may turn any routing decision over these tokens (B, S)."""
    least = float("inf")

    def look(gate: Router, args: tuple[Any, ...], _out: Any) -> None:
        nonlocal least
        e = gate.shape
        logits = args[0].float() @ gate.weight.float().T
        scores = logits.sigmoid() if e.scoring_func == "sigmoid" else logits.softmax(-1)
        v3 = e.topk_method == "noaux_tc"
        if v3:
            scores = scores + gate.e_score_correction_bias
        if e.topk_method != "greedy" and e.topk_group < e.n_group:
            worth = scores.unflatten(-1, (e.n_group, -1)).topk(2 if v3 else 1).values.sum(-1)
            ranked = worth.sort(-1, descending=True).values
            gaps = ranked[:, e.topk_group - 1] - ranked[:, e.topk_group]
            least = min(least, float(gaps.min()))
            shut = worth < ranked[:, e.topk_group - 1, None]
            of_expert = shut.repeat_interleave(e.n_routed_experts // e.n_group, 1)
            scores = scores.masked_fill(of_expert, -1e4)
        if e.num_experts_per_tok < e.n_routed_experts:
            best = scores.topk(e.num_experts_per_tok + 1, -1).values
            least = min(least, float((best[:, -2] - best[:, -1]).min()))

    hooks = [
        module.register_forward_hook(look)
        for module in model.modules()
        if isinstance(module, Router)
    ]
    # Not through `runner`, which would refill the slots.
    backend = resolve(Backend(device="cpu", dtype="fp32"), model.config)
    Runner(model, backend).logits(tokens)
    for hook in hooks:
        hook.remove()
    return least < margin


def off(a: Tensor, b: Tensor) -> float:
    """The largest difference; NaN counts as infinite."""
    gap = float((a - b).abs().max())
    return gap if gap == gap else float("inf")


def drive(
    run: Runner, prompts: Sequence[Sequence[int]], more: Tensor, cache: Cache | None = None
) -> Tensor:
    """Read the prompts, then feed `more` (B, N) one by one: next-token logits, (B, N + 1, W)."""
    cache = cache or run.cache(len(prompts), max(map(len, prompts)) + more.shape[1])
    first = run.prefill([list(p) for p in prompts], cache)
    rest = [run.decode(more[:, i : i + 1], cache)[:, 0] for i in range(more.shape[1])]
    return torch.stack([first, *rest], dim=1)


# ---------------------------- attention and cache
@pytest.mark.parametrize("names", [ATTENTION, GROUPED], ids=["latent", "grouped"])
@few
@given(drawn_configs, st.integers(0, 99), st.integers(1, 14))
def test_all_strategies_agree(names: tuple[str, ...], drawn: Drawn, seed: int, length: int) -> None:
    """Logits of a whole sequence, and those of decoding it from its middle."""
    config = config_of(names[0], drawn)
    model, tokens = unit_gain(config, seed), random_tokens(seed, 2, length + 4)
    assume(not tied(model, tokens))
    full, stepped = {}, {}
    for attention in names:
        run = runner(model, **both(attention))
        full[attention] = run.logits(tokens)
        stepped[attention] = drive(run, tokens[:, :length].tolist(), tokens[:, length:])
    for attention in names[1:]:
        assert off(full[names[0]], full[attention]) < atol("algebra fp32")
        assert off(stepped[names[0]], stepped[attention]) < atol("algebra fp32")
    assert float(full[names[0]].std()) > 0.2, "values too small for the tolerance to mean something"


@pytest.mark.parametrize("attention", ALL)
@few
@given(drawn_configs, st.integers(0, 99), st.integers(1, 12), st.integers(1, 6))
def test_decoding_is_one_full_forward(
    attention: str, drawn: Drawn, seed: int, read: int, steps: int
) -> None:
    config = config_of(attention, drawn)
    model, tokens = unit_gain(config, seed), random_tokens(seed, 2, read + steps)
    assume(not tied(model, tokens))
    run = runner(model, **both(attention))
    stepped = drive(run, tokens[:, :read].tolist(), tokens[:, read:])
    assert off(stepped, run.logits(tokens)[:, read - 1 :]) < atol("algebra fp32")


@pytest.mark.parametrize("attention", ALL)
@few
@given(drawn_configs, st.integers(0, 99), st.integers(2, 12), st.data())
def test_several_tokens_a_step(
    attention: str, drawn: Drawn, seed: int, steps: int, data: st.DataObject
) -> None:
    """A decode step of S tokens (a draft, say) is S steps of one."""
    config = config_of(attention, drawn)
    model, tokens = unit_gain(config, seed), random_tokens(seed, 2, 3 + steps)
    assume(not tied(model, tokens))
    run = runner(model, **both(attention))
    cache = run.cache(2, tokens.shape[1])
    run.prefill(tokens[:, :3].tolist(), cache)
    cut = data.draw(st.integers(1, steps - 1))
    parts = [run.decode(part, cache) for part in tokens[:, 3:].split([cut, steps - cut], dim=1)]
    assert off(torch.cat(parts, dim=1), run.logits(tokens)[:, 3:]) < atol("algebra fp32")
    assert cache.lengths.tolist() == [3 + steps] * 2


@pytest.mark.parametrize("attention", ALL)
@few
@given(
    drawn_configs,
    st.integers(0, 99),
    st.lists(st.integers(1, 17), min_size=1, max_size=3),
    st.integers(1, 7),
)
def test_chunked_prefill_is_full_prefill(
    attention: str, drawn: Drawn, seed: int, lengths: list[int], chunk: int
) -> None:
    """Also where rows end in different chunks, and what stands in the cache is the same."""
    config = config_of(attention, drawn)
    model = unit_gain(config, seed)
    tokens, more = (
        random_tokens(seed, len(lengths), max(lengths)),
        random_tokens(seed + 1, len(lengths), 2),
    )
    padded = tokens * (
        torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    )  # padding is token 0
    assume(
        not tied(model, torch.cat((padded, more), dim=1))
        and not tied(model, torch.cat((tokens, more), dim=1))
    )
    prompts = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
    results = []
    for size in (2048, chunk):
        run = runner(model, chunk=size, **both(attention))
        cache = run.cache(len(prompts), max(lengths) + 2)
        results.append(
            (
                drive(run, prompts, more[:, :1], cache),
                [t.clone() for layer in cache.layers for t in layer],
                cache,
            )
        )
    (full, kept, cache), (chunked, kept_chunked, _) = results
    assume(off(full[:, 0], chunked[:, 0]) < 1 or not tied(model, padded))
    assert off(full, chunked) < atol("algebra fp32")
    for row, length in enumerate(cache.lengths.tolist()):
        assert all(
            off(a[row, :length], b[row, :length]) < atol("algebra fp32")
            for a, b in zip(kept, kept_chunked, strict=True)
        )


@pytest.mark.parametrize("attention", ALL)
@few
@given(
    drawn_configs,
    st.integers(0, 99),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([2048, 3]),
)
def test_prefill_at_a_depth(
    attention: str, drawn: Drawn, seed: int, depth: int, length: int, chunk: int
) -> None:
    """A prompt after `depth` tokens that every row holds already: the same as both at once."""
    config = config_of(attention, drawn)
    model, tokens = unit_gain(config, seed), random_tokens(seed, 2, depth + length + 1)
    assume(not tied(model, tokens))
    run = runner(model, chunk=chunk, **both(attention))
    cache = run.cache(2, tokens.shape[1])
    run.prefill(tokens[:, :depth].tolist(), cache)
    rest = run.prefill(tokens[:, depth:-1].tolist(), cache, depth=depth)
    assert cache.lengths.tolist() == [depth + length] * 2
    got = torch.stack([rest, run.decode(tokens[:, -1:], cache)[:, 0]], dim=1)
    assert off(got, run.logits(tokens)[:, -2:]) < atol("algebra fp32")


@pytest.mark.parametrize("attention", ALL)
@few
@given(drawn_configs, st.integers(0, 99), st.lists(st.integers(1, 12), min_size=2, max_size=4))
def test_a_ragged_batch_is_each_row_alone(
    attention: str, drawn: Drawn, seed: int, lengths: list[int]
) -> None:
    """Logits of the prompt and of three steps after it; then Engine.generate's greedy tokens."""
    config = config_of(attention, drawn)
    model, more = unit_gain(config, seed), random_tokens(seed + 1, len(lengths), 3)
    prompts = [
        random_tokens(seed + row, 1, length)[0].tolist() for row, length in enumerate(lengths)
    ]
    rows = [torch.tensor([prompt + more[row].tolist()]) for row, prompt in enumerate(prompts)]
    assume(not any(tied(model, row) for row in rows))
    run = runner(model, **both(attention), moe="gather", prefill_moe="grouped")
    together = drive(run, prompts, more)
    alone = [drive(run, [prompt], more[row : row + 1]) for row, prompt in enumerate(prompts)]
    assert off(together, torch.cat(alone)) < atol("algebra fp32")
    engine = Engine(model, run.backend)
    batch = engine.generate(prompts, max_new_tokens=5, temperature=0.0, ignore_stop=True)
    for prompt, completion in zip(prompts, batch, strict=True):
        (single,) = engine.generate([prompt], max_new_tokens=5, temperature=0.0, ignore_stop=True)
        whole = torch.tensor([prompt + single.tokens])
        top = run.logits(whole)[0, len(prompt) - 1 : -1].topk(2).values
        if float((top[:, 0] - top[:, 1]).min()) > 1e-3 and not tied(
            model, whole
        ):  # a near tie of tokens may fall either way
            assert completion.tokens == single.tokens and completion.prompt_tokens == len(prompt)


@pytest.mark.parametrize("chunk", [2048, 3])
@pytest.mark.parametrize("attention", ALL)
@few
@given(
    drawn_configs,
    st.integers(0, 99),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from([1e30, -1e30, 7.0]),
)
def test_a_poisoned_cache_changes_nothing(
    attention: str, chunk: int, drawn: Drawn, seed: int, lengths: list[int], poison: float
) -> None:
    """Bit for bit, whatever finite numbers stand after the rows' lengths.

    They are written before the prompt and between the steps.

    Finite is a condition, and cache.py's zeros meet it: a masked probability is exactly 0, and 0
    times NaN is NaN (seen with all three strategies; the test below). Real garbage is finite:
    padding, rejected drafts, a longer row that was here before.
    """
    config = config_of(attention, drawn)
    model, more = unit_gain(config, seed), random_tokens(seed + 1, len(lengths), 3)
    prompts = [
        random_tokens(seed + row, 1, length)[0].tolist() for row, length in enumerate(lengths)
    ]
    run = runner(model, chunk=chunk, **both(attention))

    def results(fill: float | None) -> Tensor:
        cache = run.cache(len(prompts), 20)

        def spoil() -> None:
            unused = torch.arange(cache.capacity) >= cache.lengths[:, None]  # (B, T)
            for tensor in itertools.chain(*cache.layers):
                if fill is not None:
                    tensor[unused] = fill

        spoil()
        out = [run.prefill(prompts, cache)]
        for i in range(more.shape[1]):
            spoil()
            out.append(run.decode(more[:, i : i + 1], cache)[:, 0])
        return torch.stack(out)

    clean = results(None)
    assert bool(torch.isfinite(clean).all()) and torch.equal(clean, results(poison))


@pytest.mark.parametrize("attention", ALL)
def test_nan_in_the_cache_is_the_limit(attention: str) -> None:
    """What `Cache` says of itself: zeros at first and after reset, because hidden NaN would be
    seen.
    """
    model = unit_gain(config_of(attention), 0)
    run = runner(model, **both(attention))
    cache = run.cache(1, 8)
    assert all(not bool(t.any()) for layer in cache.layers for t in layer)
    clean = drive(run, [[1, 2]], torch.tensor([[3]]), cache)
    cache.layers[1][-1][:, 6:] = float("nan")
    run.prefill([[1, 2]], cache)
    assert bool(run.decode(torch.tensor([[3]]), cache).isnan().any())
    cache.reset()
    assert torch.equal(drive(run, [[1, 2]], torch.tensor([[3]]), cache), clean)


def test_logits_are_causal() -> None:
    run = runner(unit_gain(TINY, 0))
    tokens = random_tokens(0, 2, 12)
    before = run.logits(tokens)
    tokens[:, 7] = (tokens[:, 7] + 1) % 31
    after = run.logits(tokens)
    assert off(before[:, :7], after[:, :7]) < atol("algebra fp32")
    assert float((before[:, 7:] - after[:, 7:]).abs().amax(-1).min()) > 1e-3


# ---------------------------- rope
@few
@given(
    st.integers(1, 32),
    st.integers(0, 99),
    st.integers(0, 1000),
    st.integers(0, 1000),
    st.integers(1, 1000),
)
def test_rope_keeps_norms_and_sees_distances_only(
    pairs: int, seed: int, p: int, q: int, shift: int
) -> None:
    c = TINY.change(qk_rope_head_dim=2 * pairs)
    frequency = rope.frequencies(c.attention)
    x, y = torch.randn(
        2, 1, 1, 2, 2 * pairs, generator=torch.Generator().manual_seed(seed)
    ).unbind()

    def turned(v: Tensor, position: int, factor: float = 1.0) -> Tensor:
        return rope.rotate(v, *rope.angles(torch.tensor([[position]]), frequency, factor))

    norms = turned(x, p).unflatten(-1, (-1, 2)).norm(dim=-1)
    assert off(norms, x.unflatten(-1, (-1, 2)).norm(dim=-1)) < atol(
        "rope fp32"
    )  # of every pair, and so of the whole
    assert off(turned(x, p, 1.3), 1.3 * turned(x, p)) < atol("rope fp32")
    scale = float(x.norm() * y.norm()) / 10
    here, there = ((turned(x, p + s) * turned(y, q + s)).sum(-1) for s in (0, shift))
    assert off(here, there) < atol("rope fp32") * max(1.0, scale)
    assert torch.equal(turned(x, 0), x)
    assert torch.equal(turned(x[:, :, :1], p), turned(x, p)[:, :, :1])  # heads are turned alike
    assert off(turned(x, 1), x) > 1e-3


# ---------------------------- experts
@st.composite
def dispatches(draw: st.DrawFn) -> tuple[Experts, Tensor, Tensor, Tensor]:
    """Experts, tokens, their choices (distinct for a token; some experts may have none) and
    weights.
    """
    tokens, experts, k = draw(st.integers(1, 9)), draw(st.integers(2, 9)), draw(st.integers(1, 4))
    k = min(k, experts)
    c = TINY.change(
        hidden_size=draw(st.sampled_from([4, 20])),
        moe_intermediate_size=draw(st.sampled_from([4, 12])),
        n_routed_experts=experts,
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    stacked = Experts(c)
    if draw(st.booleans()):
        stacked.gate_proj, stacked.up_proj = join(stacked.gate_proj, stacked.up_proj)
    stacked.requires_grad_(False)
    for p in stacked.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5)
    reachable = draw(st.integers(k, experts))
    indices = torch.stack(
        [torch.randperm(reachable, generator=generator)[:k] for _ in range(tokens)]
    )
    return (
        stacked,
        torch.randn(tokens, c.hidden_size, generator=generator),
        indices,
        torch.rand(tokens, k, generator=generator),
    )


@few
@given(dispatches())
def test_every_dispatch_is_the_definition(
    drawn: tuple[Experts, Tensor, Tensor, Tensor],
) -> None:
    """loop = gather = grouped = the sum over a token's choices, one at a time."""
    experts, x, indices, weights = drawn
    wanted = torch.zeros_like(x)
    for token, (chosen, w) in enumerate(zip(indices.tolist(), weights, strict=True)):
        for expert, weight in zip(chosen, w, strict=True):
            gate, up, down = (
                matrix.dense()[expert]
                for matrix in (experts.gate_proj, experts.up_proj, experts.down_proj)
            )
            wanted[token] += weight * (down @ swiglu(gate @ x[token], up @ x[token]))
    for name, strategy in DISPATCH.items():
        got = strategy(experts, x, indices, weights)
        assert got.dtype == x.dtype and off(got, wanted) < atol("experts fp32"), name


@pytest.mark.parametrize("name", MOE)
@few
@given(dispatches(), st.integers(0, 99))
def test_dispatch_is_permutation_equivariant(
    name: str, drawn: tuple[Experts, Tensor, Tensor, Tensor], seed: int
) -> None:
    """Tokens in another order come out in that order; a token's choices have none; nor have the
    experts' numbers.
    """
    experts, x, indices, weights = drawn
    run = DISPATCH[name]
    generator = torch.Generator().manual_seed(seed)
    y = run(experts, x, indices, weights)
    rows = torch.randperm(len(x), generator=generator)
    assert off(run(experts, x[rows], indices[rows], weights[rows]), y[rows]) < atol("experts fp32")
    choice = torch.randperm(indices.shape[1], generator=generator)
    assert off(run(experts, x, indices[:, choice], weights[:, choice]), y) < atol("experts fp32")
    renumbered = torch.randperm(experts.count, generator=generator)
    for p in experts.parameters():
        p.copy_(p[renumbered])
    assert off(run(experts, x, renumbered.argsort()[indices], weights), y) < atol("experts fp32")


@few
@given(dispatches())
def test_gather_in_cuts(drawn: tuple[Experts, Tensor, Tensor, Tensor]) -> None:
    """Long inputs are cut so that the copied weights stay within a bound; the cuts don't show."""
    gather = Gather()
    whole = gather(*drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "GATHER_BYTES", 1)
        assert off(gather(*drawn), whole) < atol("experts fp32")


# ---------------------------- router
@few
@given(configs(), st.integers(0, 99), st.sampled_from([-2.0, 0.0, 2.0]))
def test_router_by_hand(config: Config, seed: int, mean: float) -> None:
    """Indices by sorting in plain Python; weights from the unbiased scores; both whatever the
    bias's sign is.
    """
    gate, c = gate_of(config, seed), config
    if c.experts.topk_method == "noaux_tc":
        gate.e_score_correction_bias.data += mean
    x = torch.randn(6, c.hidden_size, generator=torch.Generator().manual_seed(seed))
    indices, weights = gate(x)
    logits = x @ gate.weight.T
    scores = logits.sigmoid() if c.experts.scoring_func == "sigmoid" else logits.softmax(-1)
    size, limited = (
        c.experts.n_routed_experts // c.experts.n_group,
        c.experts.topk_method != "greedy",
    )
    for token in range(len(x)):
        plain = scores[token].tolist()
        biased = (
            plain
            if c.experts.topk_method != "noaux_tc"
            else (scores[token] + gate.e_score_correction_bias).tolist()
        )
        groups = [
            sorted(biased[g * size : (g + 1) * size], reverse=True)
            for g in range(c.experts.n_group)
        ]
        worth = [
            sum(best[:2]) if c.experts.topk_method == "noaux_tc" else best[0] for best in groups
        ]
        allowed = (
            sorted(range(c.experts.n_group), key=lambda g: -worth[g])[: c.experts.topk_group]
            if limited
            else range(c.experts.n_group)
        )
        experts = sorted(
            (e for g in allowed for e in range(g * size, (g + 1) * size)), key=lambda e: -biased[e]
        )
        chosen = indices[token].tolist()
        assert len(set(chosen)) == c.experts.num_experts_per_tok
        assert len({e // size for e in chosen}) <= (
            c.experts.topk_group if limited else c.experts.n_group
        )
        worst = min(biased[e] for e in chosen)
        assert (
            sorted(chosen) == sorted(experts[: c.experts.num_experts_per_tok])
            or abs(worst - biased[experts[len(chosen) - 1]]) < 1e-6
        )
        total = sum(plain[e] for e in chosen) if c.experts.norm_topk_prob else 1.0
        wanted = torch.tensor([plain[e] / total * c.experts.routed_scaling_factor for e in chosen])
        assert off(weights[token], wanted) < atol("algebra fp32")
    assert weights.dtype == torch.float32 and indices.dtype == torch.int64


@few
@given(configs(), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_router_stays_fp32_under_autocast(config: Config, seed: int, dtype: torch.dtype) -> None:
    """The same input gives the same bits, inside autocast and outside."""
    gate = gate_of(config, seed)
    x = torch.randn(40, config.hidden_size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    indices, weights = gate(x)
    for half in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", half):
            again, same = gate(x)
            assert (
                x.float().matmul(gate.weight.T).dtype == half
            )  # autocast is on, and the router isn't in it
        assert (
            same.dtype == torch.float32
            and torch.equal(indices, again)
            and torch.equal(weights, same)
        )


# ---------------------------- pairs of switches
def test_all_switches_together_agree() -> None:
    """Every combination of strategies, prefill and decode, and each with bf16 autocast within its
    own tolerance.
    """
    config = TINY.change(num_hidden_layers=2, vocab_size=31)
    seed = next(
        s for s in range(20) if not tied(unit_gain(config, s), random_tokens(s, 2, 9), 3e-4)
    )
    model, tokens = unit_gain(config, seed), random_tokens(seed, 2, 9)
    wanted = drive(runner(model, **both("naive")), tokens[:, :6].tolist(), tokens[:, 6:])
    pairs = [
        (a, b)
        for a, b in itertools.product(ATTENTION, ATTENTION)
        if (a == "naive") == (b == "naive")
    ]
    for (decode, prefill), experts, prefill_experts in itertools.product(pairs, MOE, MOE):
        run = runner(
            model,
            attention=decode,
            prefill_attention=prefill,
            moe=experts,
            prefill_moe=prefill_experts,
        )
        got = drive(run, tokens[:, :6].tolist(), tokens[:, 6:])
        assert off(got, wanted) < atol("algebra fp32"), (decode, prefill, experts, prefill_experts)


@pytest.mark.parametrize("experts", MOE)
@pytest.mark.parametrize("attention", ALL)
def test_autocast_with_every_strategy(attention: str, experts: str) -> None:
    """bf16 autocast: logits near fp32's, hardly any expert flipped (one choice of all for every
    token, so none can be).
    """
    config = config_of(attention).change(
        num_hidden_layers=2,
        vocab_size=31,
        n_routed_experts=4 if attention in ATTENTION else 0,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
    )
    model, tokens = unit_gain(config, 0), random_tokens(0, 2, 9)
    wanted = drive(runner(model, **both("naive")), tokens[:, :6].tolist(), tokens[:, 6:])
    run = runner(model, **both(attention), moe=experts, prefill_moe=experts, amp="bf16")
    got = drive(run, tokens[:, :6].tolist(), tokens[:, 6:])
    assert 1e-4 < off(got, wanted) < atol("amp bf16")
    assert got.dtype == torch.float32


# ---------------------------- no host sync, one compilation
@pytest.mark.parametrize("experts", ["gather", "grouped"])
@pytest.mark.parametrize("attention", ALL)
def test_a_decode_step_asks_for_no_value(attention: str, experts: str) -> None:
    """On tensors that have shapes but no values, every `.item()`, `.tolist()`, boolean index or
    `nonzero` raises.
    """
    run = runner(unit_gain(config_of(attention), 0), **both(attention), moe=experts)
    assert valueless_step(run).shape == (2, 1, 320)


def test_the_loop_does_ask() -> None:
    """The same look at the strategy that reads its counts on the host: the test above can fail."""
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        valueless_step(runner(unit_gain(TINY, 0), moe="loop"))


def test_a_boolean_index_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, *rest: Tensor) -> Tensor:
        return x[x > 0].sum() + x

    monkeypatch.setattr("r1.model.rope.rotate", wrong)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        valueless_step(runner(unit_gain(TINY, 0), moe="gather"))


def valueless_step(run: Runner) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        cache = run.cache(2, 16)
        cache.lengths += torch.tensor([3, 5])
        return run.decode(torch.zeros(2, 1, dtype=torch.int64), cache)


@pytest.mark.parametrize("experts", ["gather", "grouped"])
@pytest.mark.parametrize("attention", ALL)
def test_decode_compiles_once(attention: str, experts: str, compiler: CountingBackend) -> None:
    """One graph for dense blocks and one for sparse ones, if there are any, however many layers,
    positions and lengths; and whole (fullgraph).
    """
    run = runner(
        unit_gain(config_of(attention), 0),
        **both(attention),
        moe=experts,
        prefill_moe="grouped",
        compile=True,
    )
    cache = run.cache(3, 60)
    prompts = [random_tokens(row, 1, length)[0].tolist() for row, length in enumerate((3, 30, 11))]
    run.prefill(prompts, cache)
    before = compiler.graphs
    for step in range(20):
        run.decode(random_tokens(step, 3, 1), cache)
    assert compiler.graphs - before == (2 if attention in ATTENTION else 1)
    cache.reset()
    run.prefill([prompt[:2] for prompt in prompts], cache)
    before = compiler.graphs
    run.decode(random_tokens(0, 3, 1), cache)
    assert compiler.graphs == before


def test_prefill_compiles_once_for_every_length(compiler: CountingBackend) -> None:
    """A prompt's length is not known before: after the second one no other is compiled for."""
    run = runner(unit_gain(TINY, 0), prefill_moe="grouped", moe="gather", compile=True)
    counts = []
    for length in (5, 9, 17, 40, 33):
        run.prefill(random_tokens(0, 2, length).tolist(), run.cache(2, 60))
        counts.append(compiler.graphs)
    assert counts[0] >= 2 and counts[-1] == counts[0], counts


def test_compile_takes_the_whole_block_or_fails(compiler: CountingBackend) -> None:
    """A graph break is an error, not a slow path: the loop over experts can't be had, and says
    so.
    """
    run = runner(unit_gain(TINY, 0), prefill_moe="gather", moe="gather", compile=True)
    for module in run.model.modules():
        if isinstance(module, MoE):
            module.dispatch = dict.fromkeys(module.dispatch, Loop())
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        run.logits(random_tokens(0, 1, 3))
    with pytest.raises(r1.InputError, match="compile can't hold"):
        runner(run.model, compile=True)


def test_inductor_gives_the_same_logits() -> None:
    """The one test that really compiles: a sparse block, as prefill and as decode; two positions,
    ragged rows.
    """
    torch._dynamo.reset()
    config = TINY.change(num_hidden_layers=2, first_k_dense_replace=0)
    tokens = random_tokens(0, 2, 9, 320)
    seed = next(s for s in range(20) if not tied(unit_gain(config, s), tokens, 3e-4))
    model, prompts = unit_gain(config, seed), [tokens[0, :7].tolist(), tokens[1, :4].tolist()]
    wanted = drive(runner(model), prompts, tokens[:, 7:])
    got = drive(
        runner(model, moe="gather", prefill_moe="grouped", compile=True), prompts, tokens[:, 7:]
    )
    torch._dynamo.reset()
    assert off(got, wanted) < atol("compile fp32")
