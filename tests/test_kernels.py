"""Compares every Triton kernel with its torch twin.

Holds to account: r1/kernels, tools/measure/bench_kernels.py and tools/check/compile_kernels.py.

On a CPU the kernels run under Triton's interpreter (conftest.py), on a GPU as machine code. Skipped
where there is no triton.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_kernels
import compile_kernels as compile_tool
import kernel_cases
import pytest
import torch
from models import (
    FIVE_WORDS,
    TINY_GROUPED,
    TINY_QWEN2,
    V3,
    VARIANTS,
    drafting_engine,
    unit_gain,
    unresolved_runner,
)
from tolerances import TOLERANCES, atol
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels need the triton package: pip install triton")

import triton
import triton.language as tl

from r1 import InputError, build
from r1.kernels.attention import AttentionLaunch, attention, attention_torch
from r1.kernels.block import DecodeBlock, output_head
from r1.kernels.chip import Chip
from r1.kernels.experts import experts, experts_torch
from r1.kernels.experts_dispatch import dispatch
from r1.kernels.experts_launch import ExpertsLaunch
from r1.kernels.gated import gated, gated_torch
from r1.kernels.greedy import likeliest
from r1.kernels.latent import LatentLaunch, latent, latent_torch
from r1.kernels.linear import linear, linear_torch
from r1.kernels.linear_launch import LinearLaunch
from r1.kernels.prefetch import CHUNK, LANES, requests
from r1.kernels.router import RouterLaunch, route, route_torch
from r1.kernels.sort import (
    divide_torch,
    sort_by_expert,
    sort_by_expert_torch,
    sort_into_tiles,
)
from r1.kernels.step import begin_step, begin_step_torch, step_kernel
from r1.kernels.tiles import operand
from r1.model import rope
from r1.model.dispatch import STRATEGIES
from r1.model.layers import MLP, Linear
from r1.model.moe import Experts
from r1.model.router import Router
from r1.model.shapes import shape
from r1.run.engine import Engine
from r1.run.runner import MOST_TOKENS, Runner
from r1.run.sampler import greedy
from r1.run.ways import Eager, Fused
from r1.storage.dense import Dense
from r1.storage.joined import Part, join
from r1.storage.matrix import Matrix

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHIP = Chip.of(DEVICE)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = (1, 3, 8, 33)
run_here = partial(unresolved_runner, device=DEVICE.type)
"""Through `resolve` a CPU has no Triton: the interpreter is for tests."""
both = pytest.mark.parametrize("dtype", DTYPES)
GUARD = 64
"""Numbers of NaN before and behind each buffer."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def guarded(tensor: Tensor) -> Tensor:
    """A copy that stands between NaNs: who reads beyond it shows it in what comes out."""
    room = torch.full(
        (tensor.numel() + 2 * GUARD,), float("nan"), dtype=tensor.dtype, device=DEVICE
    )
    copy = room[GUARD:-GUARD].view(tensor.shape)
    return copy.copy_(tensor)


def intact(tensor: Tensor) -> bool:
    """Whether nobody wrote beyond a guarded tensor."""
    room = torch.empty(0, dtype=tensor.dtype, device=DEVICE).set_(tensor.untyped_storage())
    return bool(room[:GUARD].isnan().all() and room[-GUARD:].isnan().all())


def draw(*shape: int, dtype: str, scale: float = 1.0) -> Tensor:
    return guarded((torch.randn(shape) * scale).to(DTYPES[dtype]))


def matrix(*shape: int, dtype: str) -> Dense:
    return Dense(draw(*shape, dtype=dtype, scale=max(1, shape[-1]) ** -0.5)).requires_grad_(False)


def close(ours: Tensor, twin: Tensor, dtype: str) -> None:
    """Within the table's tolerance, of bf16 relative to the largest value. Everything ours must be
    a number.
    """
    gap, scale = (
        float((ours.float() - twin.float()).abs().max()),
        max(1.0, float(twin.float().abs().max())),
    )
    row = TOLERANCES[f"kernels {dtype}"]
    assert ours.shape == twin.shape and ours.dtype == twin.dtype
    assert gap <= row.atol * scale / row.scale, f"off by {gap:.2e}, values to {scale:.2g}"


# ---------------------------- one kernel each
@both
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("how", ["plain", "norm", "residual", "norm and residual"])
def test_linear(how: str, tokens: int, dtype: str) -> None:
    inputs, outputs = 75, 37
    x = draw(tokens, 2 * inputs + 5, dtype=dtype)[:, :inputs]  # rows with a stride
    weight = matrix(outputs, inputs, dtype=dtype)
    options: dict[str, Any] = {}
    if "norm" in how:
        options |= {"norm": draw(inputs, dtype=dtype), "eps": 1e-2}
    if "residual" in how:
        options["residual"] = draw(tokens, outputs, dtype=dtype)
    launches = [None, LinearLaunch(1, 8, 32, 4) if tokens == 1 else LinearLaunch(16, 16, 32, 4)]
    launches += [LinearLaunch(1, 16, 32, 1)] * (tokens == 1)
    launches += [LinearLaunch(4, 16, 32, 4)] * (1 < tokens <= 8)  # dot products of dense weights
    for each in launches:
        close(
            linear(CHIP, x, weight, **options, launch=each),
            linear_torch(x, weight, **options),
            dtype,
        )


def feed_forward(dim: int, inner: int, dtype: str, joined: bool) -> MLP:
    """Random weights, on the device."""
    mlp = MLP(dim, inner).requires_grad_(False).to(DEVICE, DTYPES[dtype])
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.matrix = matrix(inner, dim, dtype=dtype)
    if joined:
        build.join_matrices(mlp)
    return mlp.requires_grad_(False)


@both
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
def test_gated(tokens: int, joined: bool, dtype: str) -> None:
    """Ragged edges: 75 inputs, and 37 inner values in blocks of one, or of four."""
    mlp, gain = feed_forward(75, 37, dtype, joined), draw(75, dtype=dtype)
    x = draw(tokens, 75, dtype=dtype)
    twin = gated_torch(x, mlp, gain, 1e-2)
    launch = LinearLaunch(1, 8, 32, 4) if tokens == 1 else LinearLaunch(16, 16, 32, 4)
    ours = gated(CHIP, x, mlp, gain, 1e-2)
    for each in (ours, gated(CHIP, x, mlp, gain, 1e-2, launch)):
        close(each, twin, dtype)
    for wrong in (gated_torch(x, mlp, gain, 1.0), gated_torch(x, mlp, gain * 0.9, 1e-2)):
        with pytest.raises(AssertionError, match="off by"):
            close(ours, wrong, dtype)
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    with pytest.raises(AssertionError, match="off by"):
        close(gated_torch(x, mlp, gain, 1e-2), twin, dtype)


@both
@pytest.mark.parametrize("tokens", TOKENS)
def test_logits_are_not_rounded(tokens: int, dtype: str) -> None:
    """The output head's sums are fp32, whatever the weights are, so they are nearer to an fp32
    product than rounded ones.
    """
    x, weight = draw(tokens, 75, dtype=dtype), matrix(37, 75, dtype=dtype)
    found, exact = (
        linear(CHIP, x, weight, dtype=torch.float32),
        linear_torch(x.float(), Dense(weight.dense().float()).requires_grad_(False)),
    )
    close(found, exact, "fp32")
    assert linear_torch(x, weight, dtype=torch.float32).dtype == torch.float32
    lm_head = Linear(75, 37)
    lm_head.matrix = weight
    assert torch.equal(output_head(lm_head, CHIP, x[:, None])[:, 0], found)


# ---------------------------- weights, however they are stored
class Negated(Matrix):
    """A storage of which the kernels know nothing."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("negated", -weight)
        self.shape = weight.shape

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return -self.get_buffer("negated").to(dtype or self.get_buffer("negated").dtype)


def test_an_unknown_storage_is_refused() -> None:
    weight = torch.randn(6, 5, device=DEVICE)
    for stored in (Negated(weight), Part(Negated(weight), 0, 3)):
        with pytest.raises(InputError, match=r"^[^.\n]* stored as Negated: [^.\n]*$"):
            operand(stored)
        with pytest.raises(InputError, match="Negated"):
            linear(CHIP, torch.randn(1, 5, device=DEVICE), stored)


def test_a_fused_block_says_what_it_cannot_hold() -> None:
    """In any of its layers; its twins hold every storage."""
    made = unit_gain(VARIANTS["v3"], device=DEVICE.type)
    run = run_here(made, "fp32")
    plain = decoded(run, 2)
    assert all(DecodeBlock.why_not(block) is None for block in made.layers)
    layers: Any = made.layers
    dense, sparse = layers
    dense.mlp.down_proj.matrix = Negated(dense.mlp.down_proj.matrix.dense())
    sparse.mlp.experts.up_proj = Negated(sparse.mlp.experts.up_proj.dense())
    for block in made.layers:
        assert "Negated" in (DecodeBlock.why_not(block) or "")
    run.blocks["decode"] = [DecodeBlock(block, None) for block in made.layers]
    assert float((decoded(run, 2) - plain).abs().max()) < atol("algebra fp32")


@pytest.mark.parametrize("chip", [CHIP, None], ids=["kernels", "twins"])
def test_a_fused_block_runs_experts_in_passes(chip: Chip | None) -> None:
    """A pass gives weight 0 to choices that it does not hold. One place adds the other terms."""
    block: Any = unit_gain(VARIANTS["v3"], device=DEVICE.type).layers[-1]
    moe, x = block.mlp, draw(3, VARIANTS["v3"].hidden_size, dtype="fp32")
    fused = DecodeBlock(block, chip)
    whole = fused.mixture(x, moe)

    def here(indices: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(indices, weights * (indices % 2 == odd)) for odd in (0, 1)]

    moe.experts.here = here
    close(fused.mixture(x, moe), whole, "fp32")
    moe.experts.leads = False
    h = block.post_attention_layernorm(x)
    close(fused.mixture(x, moe) + x + moe.shared_experts(h), whole, "fp32")


def test_an_operand_is_a_view() -> None:
    """Of a part, too: no weight is copied for a launch."""
    gate, up = join(Dense(torch.randn(3, 4, 5)), Dense(torch.randn(3, 4, 5)))
    one, two = operand(gate), operand(up)
    assert two.weight.data_ptr() - one.weight.data_ptr() == 4 * 4 * 5
    assert (two.ROW.value, two.EXPERT.value) == (5, 2 * 4 * 5)
    assert operand(Dense(torch.randn(4, 5))).EXPERT.value == 0


@pytest.mark.parametrize("interleave", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize("new", [1, 3])
def test_begin_step(new: int, interleave: bool) -> None:
    """Also far out, where an angle is many turns: position times frequency is one rounded number in
    both.
    """
    before = torch.tensor([0, 7, 4095, 163_000], device=DEVICE)
    frequency = 10_000.0 ** -(torch.arange(0, 6, 2, device=DEVICE) / 6)
    for grow in (False, True):
        lengths = [before.clone(), before.clone()]
        made = begin_step(CHIP, lengths[0], new, frequency, 1.3, interleave, grow)
        twin = begin_step_torch(lengths[1], new, frequency, 1.3, interleave, grow)
        assert torch.equal(made[0], twin[0]) and made[0].dtype == torch.int64
        for ours, theirs in zip(made[1:], twin[1:], strict=True):
            close(ours, theirs, "fp32")
        for each in lengths:
            assert torch.equal(each, before + new * grow)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 163), (1, 3, 1024), (5, 1, 5000)])
def test_likeliest(shape: tuple[int, ...]) -> None:
    """The first of equals, also where programs share a row; NaN is the largest."""
    logits = torch.randn(shape, device=DEVICE).round(decimals=1)
    for fill in (None, float("inf"), float("nan"), float("-inf")):
        if fill is not None:
            logits[..., shape[-1] // 2 :: 7] = fill
        if fill == float("-inf"):
            logits.fill_(fill)
        tokens = torch.zeros(shape[:-1], dtype=torch.int64, device=DEVICE)
        scores = likeliest(CHIP, logits, tokens)
        wanted, best = greedy(logits.cpu())  # on a GPU torch takes any of equals
        assert torch.equal(tokens.cpu(), wanted)
        torch.testing.assert_close(scores.cpu(), best, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("grow", [False, True])
def test_begin_step_writes_what_is_its_own(grow: bool) -> None:
    """Six dimensions in a tile of eight; the length of a row, if it is to grow."""
    cos, sin = guarded(torch.zeros(6)), guarded(torch.zeros(6))
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    lengths = torch.ones(3, dtype=torch.int64, device=DEVICE)
    CHIP.run(
        step_kernel,
        (1,),
        lengths[1:],
        torch.ones(3, device=DEVICE),
        1.0,
        position,
        cos,
        sin,
        NEW=1,
        ROPE=6,
        PAD=8,
        INTERLEAVE=True,
        GROW=grow,
        warps=1,
    )
    assert intact(cos) and intact(sin) and cos[0] > 0.5 and int(position) == 1
    assert lengths.tolist() == [1, 1 + grow, 1]


@triton.jit
def list_requests(at, size, address, nbytes, done):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, LANES)
    begins, lengths = requests(address, nbytes, done)
    tl.store(at + lane, begins)
    tl.store(size + lane, lengths)


@pytest.mark.parametrize(
    ("address", "nbytes"),
    [(4096, 1), (4101, 16), (4101, 31), (7, 200_001), (2**40 + 8, 65_536), (64, 0)],
)
def test_prefetch_asks_for_all_that_is_aligned_and_no_more(address: int, nbytes: int) -> None:
    asked: list[range] = []
    per_pass = LANES.value * CHUNK.value
    for done in range(0, nbytes, per_pass):
        at = torch.zeros(LANES.value, dtype=torch.int64, device=DEVICE)
        size = torch.zeros(LANES.value, dtype=torch.int32, device=DEVICE)
        list_requests[(1,)](at, size, address, nbytes, done)
        asked += [range(a, a + n) for a, n in zip(at.tolist(), size.tolist(), strict=True) if n > 0]
    first, end = -(-address // 16) * 16, (address + nbytes) // 16 * 16
    assert all(each.start % 16 == 0 and len(each) % 16 == 0 for each in asked)
    assert sum(map(len, asked)) == max(0, end - first), (
        "nothing is left out, nothing asked for twice"
    )
    assert not asked or (asked[0].start, max(each.stop for each in asked)) == (first, end)


def latent_inputs(rows: int, new: int, dtype: str, capacity: int = 40) -> dict[str, Any]:
    """Odd sizes: 3 heads, nope 11, rope 6, latent 20."""
    heads, nope, r, c, tokens = 3, 11, 6, 20, rows * new
    positions = (torch.randint(capacity - new + 1, (rows, 1)) + torch.arange(new)).to(DEVICE)
    cos, sin = rope.angles(positions, torch.rand(r // 2, device=DEVICE), 1.0)
    fused = draw(tokens, heads * (nope + r) + c + r, dtype=dtype)
    q, kv = fused.split([heads * (nope + r), c + r], dim=-1)
    w = draw(heads, nope + 7, c, dtype=dtype, scale=nope**-0.5)
    cache = draw(rows, capacity, c + r, dtype=dtype)
    return {
        "q": q,
        "kv": kv,
        "w_uk": w[:, :nope],
        "gain": draw(c, dtype=dtype),
        "eps": 1e-2,
        "cos": cos,
        "sin": sin,
        "positions": positions,
        "cache": cache,
    }


@both
@pytest.mark.parametrize(("rows", "new"), [(1, 1), (3, 1), (8, 1), (11, 3)])
def test_latent(rows: int, new: int, dtype: str) -> None:
    given = latent_inputs(rows, new, dtype)
    theirs = {**given, "cache": guarded(given["cache"])}
    twin = latent_torch(**theirs)
    for launch in (None, LatentLaunch(16, 16)):
        ours = {**given, "cache": guarded(given["cache"])}
        for made, other in zip(latent(CHIP, **ours, launch=launch), twin, strict=True):
            close(made, other, dtype)
        close(ours["cache"], theirs["cache"], dtype)
        assert intact(ours["cache"])


def test_a_position_behind_the_cache_writes_nothing_and_sees_what_there_is() -> None:
    """A row that a graph decodes to nobody may have outgrown its cache, which here is cut from a
    larger one.
    """
    given, capacity = latent_inputs(3, 1, "fp32"), 40
    around = torch.full((3, capacity + 5, given["cache"].shape[2]), 7.0, device=DEVICE)
    around[:, :capacity] = given["cache"]
    given |= {
        "cache": around[:, :capacity],
        "positions": torch.tensor([[capacity], [5], [capacity + 3]], device=DEVICE),
    }
    before = around.clone()
    latent(CHIP, **given)
    assert not torch.equal(around[1, 5], before[1, 5])
    around[1, 5] = before[1, 5]
    assert torch.equal(around, before)

    seen = attention_inputs([[70], [33], [70]], 3, "fp32")
    around = torch.full((3, 75, seen["cache"].shape[2]), float("nan"), device=DEVICE)
    around[:, :70] = seen["cache"]
    late = {
        **seen,
        "cache": around[:, :70],
        "positions": seen["positions"] + torch.tensor([[3], [0], [1]], device=DEVICE),
    }
    close(attention(CHIP, **late), attention_twin(seen), "fp32")


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_row_of_nan_has_experts_that_exist(tokens: int) -> None:
    """Its own outputs are NaN, and nobody else's."""
    config = V3.change(n_routed_experts=12, n_group=1, topk_group=1)
    gate = Router(config).to(DEVICE).requires_grad_(False)
    gate.weight.normal_()
    gate.e_score_correction_bias.zero_()
    x = torch.randn(tokens, config.hidden_size, device=DEVICE)
    x[0] = float("nan")
    _, indices, weights = route(CHIP, gate, x, torch.ones(config.hidden_size, device=DEVICE), 1e-6)
    assert (
        int(indices.min()) >= 0
        and int(indices.max()) < 12
        and len(set(indices[0].tolist())) == indices.shape[1]
    )
    assert bool(weights[0].isnan().all()) and bool(weights[1:].isfinite().all())


def attention_inputs(
    lengths: list[list[int]], heads: int, dtype: str, capacity: int = 70
) -> dict[str, Any]:
    """Rows whose tokens attend to so many slots; the rest of the cache is poison."""
    r, c, v = 6, 20, 9
    positions = torch.tensor(lengths, device=DEVICE) - 1  # (B, S)
    cache = draw(len(lengths), capacity, c + r, dtype=dtype)
    for row, longest in enumerate(positions.amax(dim=1).tolist()):
        cache[row, longest + 1 :] = float("nan")
    tokens = positions.numel()
    return {
        "q_c": draw(tokens, heads, c, dtype=dtype),
        "q_pe": draw(tokens, heads, r, dtype=dtype),
        "cache": cache,
        "positions": positions,
        "w_uv": draw(heads, 7 + v, c, dtype=dtype, scale=c**-0.5)[:, 7:],
        "scale": 0.2,
    }


def attention_twin(given: dict[str, Any]) -> Tensor:
    """The twin looks at the whole cache, where 0 times NaN is NaN."""
    return attention_torch(**{**given, "cache": given["cache"].nan_to_num(0.0)})


RAGGED, TURNS = [[1], [33], [70]], [[5, 6], [69, 70]]


@pytest.mark.parametrize(
    ("lengths", "heads", "dtype"),
    [
        *((each, heads, "fp32") for each in ([[1]], [[70]], RAGGED, TURNS) for heads in (3, 20)),
        (RAGGED, 3, "bf16"), (TURNS, 20, "bf16"), (RAGGED, 20, "fp16"), (TURNS, 3, "fp16"),
    ],
    ids=str,
)  # fmt: skip
def test_attention(lengths: list[list[int]], heads: int, dtype: str) -> None:
    given = attention_inputs(lengths, heads, dtype)
    twin = attention_twin(given)
    splits = AttentionLaunch(16, 16, 8, 4, 2, sum_rows=16, values=16, latents=16)
    for launch in (
        None,
        AttentionLaunch(16, 16, 1, 4, 1),
        splits,
        dataclasses.replace(splits, apart=True, early=True),
    ):
        close(attention(CHIP, **given, launch=launch), twin, dtype)


@pytest.mark.parametrize("rows", [8, 33])
def test_attention_of_many_rows(rows: int) -> None:
    given = attention_inputs([[1 + 7 * row % 70] for row in range(rows)], 3, "fp32")
    close(attention(CHIP, **given), attention_twin(given), "fp32")


ROUTERS: dict[str, dict[str, Any]] = {
    "r1": {"n_routed_experts": 16, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 5},
    "one group": {"n_routed_experts": 13, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6},
    "odd groups": {
        "n_routed_experts": 15,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "v2": {
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "n_routed_experts": 12,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "v2-lite": {
        "model_type": "deepseek_v2",
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "n_routed_experts": 12,
        "n_group": 4,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
    },
    "mistral4": {
        "model_type": "mistral4",
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "n_routed_experts": 12,
        "n_group": 1,
        "num_experts_per_tok": 4,
    },
}


def router(name: str) -> Router:
    gate = Router(V3.change(hidden_size=75, **ROUTERS[name])).to(DEVICE)
    gate.requires_grad_(False)
    gate.weight.copy_(torch.randn(gate.weight.shape) * 75**-0.5)
    if hasattr(gate, "e_score_correction_bias"):
        gate.e_score_correction_bias.copy_(
            torch.randn(gate.e_score_correction_bias.shape) - 1.0
        )  # mostly negative: a group that is masked with 0 would win
    return gate


def check_route(
    gate: Router,
    dtype: str,
    tokens: int,
    told: Router | None = None,
    draws: Tensor | None = None,
) -> None:
    """`told` is what the kernel sees in the gate's place.

    By default a program has one expert of one token: two tokens are enough of them.
    """
    x, gain = draw(tokens, 75, dtype=dtype), draw(75, dtype=dtype)
    twin_h, twin_indices, twin_weights = route_torch(gate, x, gain, 1e-2, draws)
    for launch, n in ((None, min(2, tokens)), (RouterLaunch(4, 32, 4), tokens)):
        h, indices, weights = route(CHIP, told or gate, x[:n], gain, 1e-2, draws, launch)
        close(h, twin_h[:n], dtype)
        (a, order), (b, twin_order) = indices.sort(dim=1), twin_indices[:n].sort(dim=1)
        assert torch.equal(a, b)
        close(weights.gather(1, order), twin_weights[:n].gather(1, twin_order), dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "fp32") for name in ROUTERS),
        ("r1", "bf16"), ("r1", "fp16"), ("v2", "bf16"), ("mistral4", "fp16"),
    ],
)  # fmt: skip
def test_route(name: str, dtype: str) -> None:
    check_route(router(name), dtype, 8)


@pytest.mark.parametrize("tokens", [1, 65])
def test_route_of_so_many(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token has a count of its own; what lies behind the counts is none."""
    room = torch.full((256,), 7, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr("r1.kernels.router.tickets", lambda _, size: room[:size].zero_())
    check_route(router("r1"), "fp32", tokens)


def test_route_of_drawn_experts() -> None:
    """bench.py's --routing uniform: fewer draws than tokens, so that they come round."""
    gate = router("r1")
    drawn = torch.rand(7, 16, device=DEVICE)

    def choose(scores: Tensor) -> Tensor:
        assert torch.equal(scores, drawn[torch.arange(len(scores)) % 7])
        return Router.choose(gate, scores)

    gate.choose = choose  # type: ignore[method-assign]
    check_route(gate, "fp32", 9, draws=drawn)


def first_of_equals(gate: Router, choice: list[float]) -> list[int]:
    """A token's experts by the rules, the best one first: of equals the first. NaN is the least."""
    e, size = gate.shape, len(choice) // gate.shape.n_group
    choice = [-1e30 if math.isnan(each) else each for each in choice]
    best = 2 if e.topk_method == "noaux_tc" else 1
    groups = [choice[first : first + size] for first in range(0, len(choice), size)]
    worth = [sum(sorted(group)[-best:]) for group in groups]
    kept = sorted(range(e.n_group), key=lambda g: (-worth[g], g))[: e.topk_group]
    experts = [i for i in range(len(choice)) if i // size in kept]
    return sorted(experts, key=lambda i: (-choice[i], i))[: e.num_experts_per_tok]


@pytest.mark.parametrize("name", ["r1", "one group", "odd groups", "v2"])
def test_of_equals_the_first_is_chosen(name: str) -> None:
    """The order matters too: slots, and sums over them, follow it. Many choices are equal, some are
    NaN, and minus zero equals zero. The weights are those of the indices' scores.
    """
    gate, tokens = router(name), 12
    if hasattr(gate, "e_score_correction_bias"):
        gate.e_score_correction_bias.zero_().neg_()  # minus zeros, which leave minus zeros
    draws = torch.randint(-2, 2, (tokens, gate.shape.n_routed_experts)).float()
    draws[draws == 0] *= torch.randn(draws.shape)[draws == 0].sign()
    draws[4:8, ::3], draws[8:] = math.nan, draws[8:].sign().clamp(min=0)
    draws[0], draws[1] = math.nan, 1.0
    x, gain = draw(tokens, 75, dtype="fp32"), draw(75, dtype="fp32")
    launch = RouterLaunch(4, 128, 4)
    _, indices, weights = route(CHIP, gate, x, gain, 1e-2, draws.to(DEVICE), launch)
    right = [first_of_equals(gate, row) for row in draws.tolist()]
    assert indices.tolist() == right
    gate.choose = lambda scores: indices  # type: ignore[method-assign]
    close(weights, route_torch(gate, x, gain, 1e-2, draws.to(DEVICE))[2], "fp32")


def expert_inputs(
    tokens: int, dtype: str, shared: int, dim: int = 27, inner: int = 21, *, joined: bool = True
) -> dict[str, Any]:
    """Odd sizes: hidden 27, inner 21, 9 experts, of which only 0, 4 and 8 are ever chosen; the
    others' weights are poison.
    """
    count, chosen = 9, 2
    config = V3.change(hidden_size=dim, moe_intermediate_size=inner, n_routed_experts=count)
    routed = Experts(config)
    routed.gate_proj = matrix(count, inner, dim, dtype=dtype)
    routed.up_proj = matrix(count, inner, dim, dtype=dtype)
    routed.down_proj = matrix(count, dim, inner, dtype=dtype)
    for stack in (routed.gate_proj, routed.up_proj, routed.down_proj):
        stack.dense().data[[1, 2, 3, 5, 6, 7]] = float("nan")
    indices = torch.stack([torch.randperm(3)[:chosen] for _ in range(tokens)]).to(DEVICE) * 4
    always = MLP(dim, shared * inner)
    for layer in (always.gate_proj, always.up_proj, always.down_proj):
        layer.matrix = matrix(*layer.matrix.shape, dtype=dtype)
    if joined:
        routed.gate_proj, routed.up_proj = join(routed.gate_proj, routed.up_proj)
        pair = (always.gate_proj, always.up_proj)
        always.gate_proj.matrix, always.up_proj.matrix = join(*(each.matrix for each in pair))
    return {
        "x": draw(tokens, dim, dtype=dtype),
        "indices": indices,
        "weights": torch.rand(tokens, chosen, device=DEVICE),
        "experts": routed.requires_grad_(False),
        "shared": always.requires_grad_(False) if shared else None,
        "residual": draw(tokens, dim, dtype=dtype) if shared else None,
    }


@pytest.mark.parametrize(
    ("tokens", "apart", "dtype"),
    [
        (1, False, "fp32"), (3, False, "bf16"), (33, False, "fp16"),
        (1, True, "bf16"), (3, True, "fp16"), (33, True, "fp32"),
    ],
)  # fmt: skip
def test_experts_of_joined_and_of_separate_matrices_agree(
    tokens: int, apart: bool, dtype: str
) -> None:
    """To the bit: the same numbers, read in the same order."""
    found = []
    for joined in (False, True):
        torch.manual_seed(1)
        given = expert_inputs(tokens, dtype, 2, joined=joined)
        launch = ExpertsLaunch(16, 16, 16, 16, 32, apart=True) if apart else None
        found.append(experts(CHIP, **given, launch=launch))
    assert torch.equal(*found) and bool(found[0].isfinite().all())


@pytest.mark.parametrize(
    ("tokens", "shared", "dtype"),
    [
        *((tokens, shared, "fp32") for tokens in TOKENS for shared in (0, 2)),
        *((tokens, 2, dtype) for tokens in (1, 3, 33) for dtype in ("bf16", "fp16")),
        *((tokens, 0, dtype) for tokens in (1, 3) for dtype in ("bf16", "fp16")),
    ],
)
def test_experts(tokens: int, shared: int, dtype: str) -> None:
    given = expert_inputs(tokens, dtype, shared)
    twin = experts_torch(**given)
    launches = [None, ExpertsLaunch(16, 16, 16, 16, 32)] + [ExpertsLaunch(1, 8, 16, 16, 16)] * (
        tokens <= 3
    )
    if (
        dtype == "fp32" or not shared
    ):  # each slot is rounded, as a prompt's are, and the twin rounds other sums
        launches.append(ExpertsLaunch(16, 16, 16, 16, 32, apart=True))
    for launch in launches:
        close(experts(CHIP, **given, launch=launch), twin, dtype)


@pytest.mark.parametrize("way", ["kernels", "gather", "grouped", "loop"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_choices_of_no_expert(tokens: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other devices have them. They add nothing, and nothing is read for them: what lies behind
    the last expert here is poison, and so is what a grouped product does not write.
    """
    written = Dense.grouped

    def grouped(matrix: Dense, x: Tensor, ends: Tensor) -> Tensor:
        y = written(matrix, x, ends)
        y[int(ends[-1]) :] = torch.nan
        return y

    monkeypatch.setattr(Dense, "grouped", grouped)
    given = expert_inputs(tokens, "fp32", 0, 28, 20)  # torch's grouped_mm wants such rows
    routed, indices, weights = given["experts"], given["indices"], given["weights"]
    for name in ("gate_proj", "up_proj", "down_proj"):
        held = getattr(routed, name).dense()
        held = torch.cat((held, held.new_full((1, *held.shape[1:]), torch.nan)))
        setattr(routed, name, Dense(held[:9]))
    whole = experts_torch(**given)
    indices[:, 0], weights[::2, 0] = 4, 0
    indices[1::2, 1], weights[1::2, 1] = 0, 0
    right = experts_torch(**given)
    assert (right - whole).abs().max() > 0.01
    routed.partial = True
    indices[weights == 0] = 9
    weights[weights == 0] = 7  # of no use
    if way == "kernels":
        launches = [None, ExpertsLaunch(16, 16, 16, 16, 32)]
        # By rows of 1 each choice is read by itself, however many there are: 3 tokens show it.
        launches += [ExpertsLaunch(rows, 8, 16, 16, 16) for rows in (1, 4)[tokens > 3 :]]
        launches += [ExpertsLaunch(16, 16, 16, 16, 32, apart=True)]
        found = [experts(CHIP, **given, launch=each) for each in launches]
        found += [dispatch(routed, given["x"], indices, weights)]
    else:
        strategy = next(each for each in STRATEGIES if each.name == way)
        found = [strategy(routed, given["x"], indices, weights)]
    for each in found:
        close(each, right, "fp32")


@pytest.mark.parametrize("launch", [None, ExpertsLaunch(16, 32, 128, 64, 32, apart=True)])
def test_experts_of_a_wide_model(launch: ExpertsLaunch | None) -> None:
    """Wider than a program that adds up."""
    given = expert_inputs(3, "fp32", 1, dim=600)
    close(experts(CHIP, **given, launch=launch), experts_torch(**given), "fp32")


@pytest.mark.parametrize(("shared", "dtype"), [(1, "fp32"), (2, "bf16"), (2, "fp16")])
def test_shared_experts_norm_the_residual(shared: int, dtype: str) -> None:
    """x is the residual's norm. Told of another gain, the shared experts of one token use it, and
    nothing else does.
    """
    given = expert_inputs(1, dtype, shared)
    gain = draw(27, dtype=dtype)
    given["x"] = gain * F.rms_norm(given["residual"], gain.shape, eps=1e-2)
    twin = experts_torch(**given)
    close(experts(CHIP, **given, norm=gain, eps=1e-2), twin, dtype)
    for norm, eps in ((-gain, 1e-2), (gain, 9.0)):
        with pytest.raises(AssertionError, match="off by"):
            close(experts(CHIP, **given, norm=norm, eps=eps), twin, dtype)


@pytest.mark.parametrize("tokens", [200, 333])
def test_experts_of_a_prompt(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the other tests have: tiles by default, and torch sorts."""
    monkeypatch.setattr("r1.kernels.sort.MOST_CHOICES", 100)
    monkeypatch.setattr("r1.kernels.sort.MOST_AT_ONCE", 100)
    monkeypatch.setattr("r1.kernels.sort.sort_kernel", None)
    given = expert_inputs(tokens, "fp32", 1)
    assert ExpertsLaunch.default((tokens, 2, 9, 27, 21, 4), CHIP).apart
    close(experts(CHIP, **given), experts_torch(**given), "fp32")


@pytest.mark.parametrize(
    ("tokens", "chosen", "count"),
    [
        (5000, 3, 8),
        (9000, 2, 4),
        (2300, 2, 1500),
        (5000, 1, 1),
        (40000, 2, 40000),
        (40000, 2, 5),
        (1, 1, 1),
        (3, 2, 5),
        (33, 4, 7),
        (100, 3, 300),
    ],
)
def test_sort_by_expert(tokens: int, chosen: int, count: int) -> None:
    indices = torch.randint(count, (tokens, chosen), device=DEVICE)
    for ours, twin in zip(
        sort_by_expert(CHIP, indices, count), sort_by_expert_torch(indices, count), strict=True
    ):
        assert torch.equal(ours, twin)
    order, ends = sort_by_expert(CHIP, indices, count)
    assert (
        torch.equal(indices.flatten()[order.long()], indices.flatten().sort().values)
        and ends[-1] == tokens * chosen
    )


def test_a_grid_holds_the_longest_prompt() -> None:
    """CUDA's limit, of all dimensions but the first."""
    grids: list[tuple[int, ...]] = []

    class Grids(compile_tool.Recorder):
        def run(
            self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any
        ) -> None:
            grids.append(grid)

    config, chip = shape("r1"), Grids(132, 2**17, True, ptx=True, byte_products=True)
    with torch.device("meta"):
        x = torch.empty(MOST_TOKENS, config.hidden_size, dtype=torch.bfloat16)
        chosen = torch.empty(MOST_TOKENS, config.experts.num_experts_per_tok)
        routed = Experts(config).bfloat16()
        experts(chip, x, chosen.long(), chosen, routed)  # type: ignore[arg-type]
    assert len(grids) == 3 and all(max(grid[1:], default=0) < 2**16 for grid in grids)


@pytest.mark.parametrize(
    ("counts", "rows", "shared"),
    [([0, 40, 16, 0, 17, 1], 16, 0), ([3, 0, 0], 32, 2), ([0, 0, 65], 64, 1)],
)
def test_divide(counts: list[int], rows: int, shared: int) -> None:
    ends = torch.tensor(counts, dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)
    tokens = sum(counts) // 2
    tiles = sum(counts) // rows + len(counts) + shared * -(-tokens // rows)
    twin = divide_torch(ends, tiles, rows, tokens, shared)
    covered = [(expert, i) for expert, first, end in twin.tolist() for i in range(first, end)]
    wanted = [
        (expert, i)
        for expert, count in enumerate(counts)
        for i in range(sum(counts[:expert]), sum(counts[: expert + 1]))
    ]
    assert covered == wanted + [(len(counts) + s, i) for s in range(shared) for i in range(tokens)]


@pytest.mark.parametrize("kernels", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "chosen", "count", "rows", "shared"),
    [(8, 6, 64, 8, 2), (1, 1, 1, 8, 0), (33, 4, 7, 8, 2), (100, 3, 300, 8, 1), (64, 8, 16, 32, 3)],
)
def test_sort_into_tiles(
    kernels: int, tokens: int, chosen: int, count: int, rows: int, shared: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By one kernel for a decode step, and by two for more choices: what the twins make."""
    unused = "count_kernel" if kernels == 1 else "MOST_AT_ONCE"
    monkeypatch.setattr(f"r1.kernels.sort.{unused}", None if kernels == 1 else 0)
    # Some are choices of no expert. They come last, and no tile has them.
    indices = torch.randint(count + 1, (tokens, chosen), device=DEVICE)
    order, ends, work = sort_into_tiles(CHIP, indices, count, rows, shared)
    twin, twin_ends = sort_by_expert_torch(indices, count)
    assert torch.equal(ends, twin_ends) and torch.equal(order[: ends[-1]], twin[: ends[-1]])
    assert torch.equal(work, divide_torch(ends, len(work), rows, tokens, shared))


# ---------------------------- a whole model
def decoded(run: Runner, rows: int, new: int = 1, steps: int = 2) -> Tensor:
    """Prefill ragged prompts and decode fixed tokens: fp32 logits (B, steps S, W)."""
    prompts = [[5, 9, 20, 7], [11, 3], [40, 41, 42, 43, 44, 45, 46]]
    cache = run.cache(rows, 32)
    run.prefill([prompts[row % 3] for row in range(rows)], cache)
    tokens = torch.arange(rows * new * steps, device=DEVICE).view(steps, rows, new) % 48
    return torch.cat([run.decode(each, cache).clone() for each in tokens], dim=1)


SWITCHES: dict[str, dict[str, Any]] = {
    "attention": {"attention": "triton"},
    "moe": {"moe": "triton"},
    "prefill_moe": {"prefill_moe": "triton"},
    "kernels": {"attention": "triton", "moe": "triton", "kernels": "triton"},
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("switch", "name"),
    [
        *((switch, "v3") for switch in SWITCHES if switch != "kernels"),
        *(("kernels", name) for name in VARIANTS),
    ],
)
def test_a_model_decodes_as_torch_does(switch: str, name: str, rows: int) -> None:
    made = unit_gain(VARIANTS[name], device=DEVICE.type)
    plain = decoded(run_here(made, "fp32"), rows)
    assert float(plain.std()) > 0.2
    assert float(
        (decoded(run_here(made, "fp32", **SWITCHES[switch]), rows) - plain).abs().max()
    ) < atol("algebra fp32")


def test_a_long_prompt() -> None:
    """So long that its experts' tokens are cut into tiles."""
    made = unit_gain(VARIANTS["v3"], device=DEVICE.type)
    tokens = torch.arange(300, device=DEVICE).view(2, 150) % 48
    plain, ours = (
        run_here(made, "fp32", **s).logits(tokens) for s in ({}, SWITCHES["prefill_moe"])
    )
    assert float((ours - plain).abs().max()) < atol("algebra fp32")


@pytest.mark.parametrize("switch", ["attention", "kernels"])
def test_several_tokens_a_step(switch: str) -> None:
    made = unit_gain(VARIANTS["v3"], device=DEVICE.type)
    plain, fused = (
        decoded(run_here(made, "fp32", **s), 2, new=3, steps=1) for s in ({}, SWITCHES[switch])
    )
    assert float((fused - plain).abs().max()) < atol("algebra fp32")


def test_speculation_has_a_fused_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and drafts are torch's; and a drafter that is wrong drafts worse, so it is the fused one
    that is asked.
    """

    def accepted(engine: Engine) -> tuple[list[list[int]], int]:
        done = engine.generate([[3, 1, 4], [2]], max_new_tokens=9, temperature=0.0)
        return [each.tokens for each in done], sum(each.accepted for each in done)

    made = drafting_engine(FIVE_WORDS, 0, 1)
    plain = Engine(made.model.to(DEVICE), dataclasses.replace(made.backend, device=DEVICE.type))
    fused = Engine(plain.model, dataclasses.replace(plain.backend, **SWITCHES["kernels"]))
    text, drafts = accepted(plain)
    assert accepted(fused) == (text, drafts) and drafts > 2
    assert fused.drafter is not None
    block = fused.drafter.layers["decode"].keywords["block"]  # type: ignore[attr-defined]
    monkeypatch.setattr(block, "mixture", lambda x, _moe: -3 * x)
    worse, few = accepted(fused)
    assert worse == text and few < drafts


@pytest.mark.parametrize("name", VARIANTS)
def test_the_fused_block_of_twins_is_the_block(name: str) -> None:
    """The composition, without a kernel."""
    made = unit_gain(VARIANTS[name], device=DEVICE.type)
    run = run_here(made, "fp32")
    plain = decoded(run, 3)
    run.blocks["decode"] = [DecodeBlock(block, None) for block in made.layers]
    assert float((decoded(run, 3) - plain).abs().max()) < atol("algebra fp32")


def test_a_step_begins_with_a_kernel() -> None:
    """Which knows of rows of several lengths, and of several tokens."""
    made = unit_gain(VARIANTS["v3"], device=DEVICE.type)
    fused, plain = run_here(made, "fp32", **SWITCHES["kernels"]), run_here(made, "fp32")
    assert isinstance(fused.ways["decode"], Fused) and type(plain.ways["decode"]) is Eager
    cache = fused.cache(3, 40)
    cache.lengths.copy_(torch.tensor([0, 7, 33]))
    ours, theirs = (run.next_step(cache, 2) for run in (fused, plain))
    assert ours.mask is None and torch.equal(ours.positions, theirs.positions)
    close(ours.cos, theirs.cos, "fp32")
    close(ours.sin, theirs.sin, "fp32")


def test_results_do_not_change_from_run_to_run() -> None:
    run = run_here(
        unit_gain(VARIANTS["v3"], dtype="bf16", device=DEVICE.type), "bf16", **SWITCHES["kernels"]
    )
    assert torch.equal(decoded(run, 3, steps=2), decoded(run, 3, steps=2))


# ---------------------------- proof that these can fail
def wrong_length(given: dict[str, Any]) -> Tensor:
    return attention(CHIP, **{**given, "positions": given["positions"] - 1})


def wrong_scale(given: dict[str, Any]) -> Tensor:
    return attention(CHIP, **{**given, "scale": given["scale"] * 1.1})


def no_rope(given: dict[str, Any]) -> Tensor:
    return attention(CHIP, **{**given, "q_pe": given["q_pe"] * 0})


@both
@pytest.mark.parametrize("wrong", [wrong_length, wrong_scale, no_rope])
def test_wrong_attention_is_seen(wrong: Callable[[dict[str, Any]], Tensor], dtype: str) -> None:
    given = attention_inputs([[2], [9], [70]], 3, dtype)
    with pytest.raises(AssertionError, match="off by"):
        close(wrong(given), attention_twin(given), dtype)


def test_poison_is_seen() -> None:
    """A token too many, and the cache's tail shows in the output."""
    given = attention_inputs([[2], [9]], 3, "fp32")
    given["positions"] += 1
    assert attention(CHIP, **given).isnan().any()


@both
@pytest.mark.parametrize("change", ["weights", "swapped halves", "neighbour"])
def test_wrong_experts_are_seen(change: str, dtype: str) -> None:
    given = expert_inputs(3, dtype, 1)
    twin, wrong = experts_torch(**given), dict(given)
    if change == "weights":
        wrong["weights"] = given["weights"] * 1.1
    elif change == "swapped halves":
        swapped = wrong["experts"] = copy.copy(given["experts"])
        swapped._modules = {
            "gate_proj": given["experts"].up_proj,
            "up_proj": given["experts"].gate_proj,
            "down_proj": given["experts"].down_proj,
        }
    else:
        wrong["indices"] = (given["indices"] + 4) % 12
    with pytest.raises(AssertionError, match="off by"):
        close(experts(CHIP, **wrong), twin, dtype)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("r1", {"topk_group": 8}),
        ("r1", {"norm_topk_prob": False}),
        ("r1", {"routed_scaling_factor": 1.0}),
        ("r1", {"topk_method": "group_limited_greedy"}),  # the best of a group, and no bias
        ("v2", {"scoring_func": "sigmoid"}),
        ("v2", {"topk_method": "greedy"}),
        ("odd groups", {"n_group": 5}),
    ],
)
def test_wrong_choice_is_seen(name: str, change: dict[str, Any]) -> None:
    """The kernel told another rule than its twin."""
    gate = router(name)
    told = copy.copy(gate)
    told.shape = dataclasses.replace(gate.shape, **change)
    with pytest.raises(AssertionError):
        check_route(gate, "fp32", 8, told)


@both
def test_wrong_rotation_is_seen(dtype: str) -> None:
    given = latent_inputs(3, 1, dtype)
    q_pe = latent_torch(**{**given, "cache": guarded(given["cache"])})[1]
    with pytest.raises(AssertionError, match="off by"):
        close(latent(CHIP, **{**given, "sin": -given["sin"]})[1], q_pe, dtype)


@both
def test_wrong_norm_is_seen(dtype: str) -> None:
    x, gain = draw(3, 75, dtype=dtype), draw(75, dtype=dtype)
    weight = Dense(draw(37, 75, dtype=dtype))
    with pytest.raises(AssertionError, match="off by"):
        close(
            linear(CHIP, x, weight, norm=gain, eps=0.2),
            linear_torch(x, weight, norm=gain, eps=0.0),
            dtype,
        )


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_the_fused_block_tells_of_its_norms(eps: float) -> None:
    """One token's shared experts norm the residual themselves: by the block's gain and its eps."""
    config = dataclasses.replace(VARIANTS["v3"], rms_norm_eps=eps)
    block: Any = unit_gain(config, device=DEVICE.type).layers[-1]
    block.post_attention_layernorm.weight.data.uniform_(0.5, 1.5)
    fused, x = DecodeBlock(block, CHIP), draw(1, config.hidden_size, dtype="fp32")
    close(
        fused.mixture(x, block.mlp),
        x + block.mlp(block.post_attention_layernorm(x)[None], "decode")[0],
        "fp32",
    )


H100 = Chip(132, 227 * 1024, dependent_launch=True, ptx=True, byte_products=True)


@pytest.mark.parametrize(
    ("launch", "sizes", "wanted"),
    [
        (LinearLaunch, (1, 7168, 2112, 2), LinearLaunch(1, 2, 1024, 4)),
        (LinearLaunch, (1, 2048, 3072, 2), LinearLaunch(1, 2, 1024, 4)),
        (LinearLaunch, (1, 2048, 2048, 2), LinearLaunch(1, 1, 2048, 2)),
        (LinearLaunch, (1, 4096, 28672, 2), LinearLaunch(1, 2, 2048, 8)),
        (LinearLaunch, (1, 8192, 2048, 2), LinearLaunch(1, 2, 2048, 4)),
        (LinearLaunch, (1, 3584, 37888, 2, 4, 1), LinearLaunch(1, 2, 4096, 2)),
        (LinearLaunch, (1, 18944, 3584, 2, 4, 1), LinearLaunch(1, 2, 2048, 1)),
        (LinearLaunch, (1, 2048, 2048, 2, 4, 1), LinearLaunch(1, 2, 2048, 1)),
        (LinearLaunch, (1, 1536, 24576, 2, 4, 1, 128), LinearLaunch(1, 16, 512, 2)),
        (LinearLaunch, (1, 1536, 24576, 2, 8, 0, 128), LinearLaunch(1, 16, 512, 1)),
        (LinearLaunch, (1, 1536, 17920, 2, 8, 0, 128), LinearLaunch(1, 8, 2048, 4)),
        (LinearLaunch, (1, 2048, 22528, 2, 8, 0, 128), LinearLaunch(1, 8, 2048, 4)),
        (LinearLaunch, (1, 7168, 2112, 2, 4, 1, 128), LinearLaunch(1, 2, 4096, 4)),
        (LinearLaunch, (1, 7168, 2112, 2, 8, 0, 128), LinearLaunch(1, 4, 2048, 4)),
        (LinearLaunch, (1, 16384, 7168, 2, 8, 0, 128), LinearLaunch(1, 4, 2048, 4)),
        (LinearLaunch, (1, 16384, 7168, 2, 4, 1, 128), LinearLaunch(1, 4, 2048, 2)),
        (LinearLaunch, (8, 2048, 2048, 2, 4, 1), LinearLaunch(2, 8, 2048, 1)),
        (LinearLaunch, (8, 2048, 3648, 2, 4, 1, 128), LinearLaunch(4, 8, 2048, 1)),
        (LinearLaunch, (1, 2048, 3648, 2, 4, 1, 128), LinearLaunch(1, 4, 2048, 1)),
        (LinearLaunch, (4, 2048, 22528, 2, 4, 1, 128), LinearLaunch(4, 8, 2048, 1)),
        (LinearLaunch, (8, 2048, 22528, 2, 4, 1, 128), LinearLaunch(8, 64, 128, 4, 4, True)),
        (LinearLaunch, (32, 2048, 3648, 2, 4, 1, 128), LinearLaunch(32, 32, 128, 8, parts=8)),
        (LinearLaunch, (64, 2048, 3648, 2, 4, 1, 128), LinearLaunch(32, 64, 128, 4, 4, True)),
        (LinearLaunch, (8, 2048, 2048, 2, 8, 0, 128), LinearLaunch(16, 32, 128, 8, parts=8)),
        (LinearLaunch, (32, 11264, 2048, 2, 4, 1, 128), LinearLaunch(32, 16, 128, 8, parts=8)),
        (LinearLaunch, (8, 11264, 2048, 2, 8, 0, 128), LinearLaunch(16, 16, 128, 8, parts=8)),
        (LinearLaunch, (32, 11264, 2048, 2, 8, 0, 128), LinearLaunch(32, 16, 128, 8, parts=8)),
        (LinearLaunch, (32, 11264, 2048, 2), LinearLaunch(32, 64, 128, 4, 4)),
        (LinearLaunch, (4, 2048, 2048, 2, 8), LinearLaunch(4, 4, 1024, 1)),
        (LinearLaunch, (2, 2048, 2048, 2, 8), LinearLaunch(2, 4, 1024, 1)),
        (LinearLaunch, (1, 2048, 2048, 2, 8), LinearLaunch(1, 4, 2048, 4)),
        (LinearLaunch, (1, 2048, 3648, 2, 8, 0, 128), LinearLaunch(1, 8, 2048, 4)),
        (LinearLaunch, (32, 2048, 2048, 2, 8), LinearLaunch(32, 16, 128, 4, 5)),
        (LinearLaunch, (32, 2048, 2048, 2), LinearLaunch(32, 16, 128, 4, 5)),
        (LinearLaunch, (32, 2048, 3648, 2), LinearLaunch(32, 32, 128, 4, 5)),
        (LinearLaunch, (8, 2048, 163840, 2), LinearLaunch(16, 64, 128, 4, 5)),
        (LinearLaunch, (32, 16384, 7168, 2), LinearLaunch(32, 64, 128, 4, 4)),
        (LinearLaunch, (8, 7168, 2112, 2), LinearLaunch(16, 64, 128, 4, 5)),
        (
            AttentionLaunch,
            (1, 128, 512, 64, 256, 2),
            AttentionLaunch(16, 16, 16, 8, 2, True, True, 16, 32, 512, 4, 2),
        ),
        (
            AttentionLaunch,
            (1, 128, 512, 64, 4096, 2),
            AttentionLaunch(64, 64, 64, 8, 2, True, True, 64, 64, 128, 4, 3),
        ),
        (
            AttentionLaunch,
            (8, 128, 512, 64, 256, 2),
            AttentionLaunch(64, 32, 8, 8, 3, True, False, 64, 128, 128, 4, 3),
        ),
        (
            AttentionLaunch,
            (1, 16, 512, 64, 256, 2),
            AttentionLaunch(16, 16, 16, 4, 2, False, True, 16, 32, 512, 4, 2),
        ),
        (RouterLaunch, (1, 64, 2048), RouterLaunch(1, 2048, 1)),
        (RouterLaunch, (8, 64, 2048), RouterLaunch(1, 2048, 1)),
        (RouterLaunch, (1, 256, 7168), RouterLaunch(1, 8192, 4)),
        (RouterLaunch, (2, 256, 7168), RouterLaunch(1, 2048, 2)),
        (RouterLaunch, (8, 256, 7168), RouterLaunch(8, 512, 4)),
        (ExpertsLaunch, (2, 6, 64, 2048, 1408, 2, 8, 0, 128), ExpertsLaunch(1, 4, 2048, 4, 512, 4)),
        (
            ExpertsLaunch,
            (1, 8, 256, 7168, 2048, 2, 4, 1, 128),
            ExpertsLaunch(1, 8, 2048, 4, 512, 4, ahead=3),
        ),
        (
            ExpertsLaunch,
            (1, 8, 256, 7168, 2048, 2, 8, 0, 128),
            ExpertsLaunch(1, 8, 2048, 2, 512, 4),
        ),
        (
            ExpertsLaunch,
            (1, 6, 64, 2048, 1408, 2, 4, 1, 128),
            ExpertsLaunch(1, 8, 2048, 2, 512, 4, ahead=2),
        ),
        (
            ExpertsLaunch,
            (8, 6, 64, 2048, 1408, 2, 4, 1),
            ExpertsLaunch(1, 4, 2048, 2, 512, 4, ahead=3),
        ),
        (
            ExpertsLaunch,
            (32, 6, 64, 2048, 1408, 2, 8),
            ExpertsLaunch(16, 32, 128, 64, 128, 4, 4, apart=True),
        ),
        (
            ExpertsLaunch,
            (4, 6, 64, 2048, 1408, 2, 8, 0, 128),
            ExpertsLaunch(8, 64, 128, 64, 128, 4, 4, apart=True, narrow=True),
        ),
        (
            ExpertsLaunch,
            (32, 6, 64, 2048, 1408, 2, 4, 1, 128),
            ExpertsLaunch(8, 64, 128, 64, 128, 4, 3, apart=True, narrow=True),
        ),
        (
            ExpertsLaunch,
            (4096, 6, 64, 2048, 1408, 2, 4, 1, 128),
            ExpertsLaunch(128, 128, 64, 256, 64, 8, 4, apart=True),
        ),
        (
            ExpertsLaunch,
            (4096, 6, 64, 2048, 1408, 2),
            ExpertsLaunch(128, 128, 64, 256, 64, 8, 4, apart=True),
        ),
        (
            ExpertsLaunch,
            (4096, 6, 64, 2048, 1408, 4),
            ExpertsLaunch(128, 64, 32, 128, 32, 8, 4, apart=True),
        ),
    ],
)
def test_defaults_are_what_was_measured(launch: Any, sizes: tuple[int, ...], wanted: Any) -> None:
    """tools/measure/bench_kernels.py --sweep on an H100, and compile_kernels.py where something
    else spilled. (First guesses: what packed weights take for up to 8 tokens.)
    """
    assert launch.default(sizes, H100) == wanted


# ---------------------------- tools/measure/bench_kernels.py
MEASURED = {
    "v3": (VARIANTS["v3"], 12),
    "moonlight": (VARIANTS["moonlight"], 11),
    "qwen2": (TINY_QWEN2, 8),
    "qwen3": (TINY_GROUPED, 8),
}
"""Configs, and how many cases each has with two contexts."""


@pytest.mark.parametrize(
    ("name", "tokens", "quant"),
    [
        ("v3", 1, "none"), ("v3", 3, "none"), ("moonlight", 1, "none"), ("moonlight", 3, "int4"),
        ("qwen2", 1, "int4"), ("qwen2", 3, "none"), ("qwen3", 1, "none"),
    ],
)  # fmt: skip
def test_what_is_timed_is_right(name: str, tokens: int, quant: str) -> None:
    """Every case of the benchmark beside its twin, on this machine."""
    config, count = MEASURED[name]
    with torch.device(DEVICE), torch.inference_mode():
        place = kernel_cases.Place(CHIP, 1, quant)
        found = [make() for make in bench_kernels.makers(place, config, tokens, [20, 33], [])]
        packed = {"prompt"} if quant != "none" else set()
        assert len(found) == count + len(packed)
        for case in found:
            assert bench_kernels.off(case, None) < 0.02, case.name
            assert case.nbytes > 0 and case.flops > 0 and len(case.copies) >= 2
            if case.default is not None:
                assert case.default.choices.keys() <= vars(case.default).keys()
        bare = {case.name for case in found if case.default is None}
        assert bare == {"step"} | packed
        if quant == "int4":
            half = {case.name: case.nbytes for case in found}["dense_down"]
            inner, dim = config.intermediate_size, config.hidden_size
            assert half < 2 * inner * dim  # of the weights in bf16 alone


def test_a_sweep_finds_the_best_and_survives_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    config = VARIANTS["v3"]
    with torch.device(DEVICE), torch.inference_mode():
        (make,) = bench_kernels.makers(kernel_cases.Place(CHIP, 1), config, 1, [20], ["qkv_a"])
        case = make()
        monkeypatch.setattr(LinearLaunch, "choices", {"outputs": (1, 2, 4, 8), "warps": (4, 8, 3)})
        right = case.run

        def run(weight: Dense, use: LinearLaunch) -> Tensor:
            if use.warps == 3:
                raise RuntimeError("out of resources")
            return right(weight, use) * (2 if use.outputs == 8 else 1)  # fast, and wrong

        case.run = run

        def timed(calls: list[Any]) -> list[float]:
            use = calls[0].args[1]
            return [abs(use.outputs - 4) + 1 / use.warps if use.outputs < 8 else 0.0]

        monkeypatch.setattr(bench_kernels, "timed", timed)
        best, tried = bench_kernels.sweep(case, case.default, time.monotonic() + 60)
    assert (best.outputs, best.warps) == (4, 8)
    assert any("out of resources" in t.get("error", "") for t in tried) and any(
        t.get("off", 0) > 0.05 for t in tried
    )


def test_launches_that_are_given_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with all its changes at a time. The search begins with the best."""
    place = kernel_cases.Place(CHIP, 1)
    with torch.device(DEVICE), torch.inference_mode():
        (make,) = bench_kernels.makers(place, VARIANTS["v3"], 1, [20], ["qkv_a"])
        case, begun = make(), list[Any]()

        def timed(calls: list[Any]) -> list[float]:
            use = getattr(calls[0], "args", (None, None))[1:]
            return [{2: 3.0, 16: 1.0}.get(use[0].warps, 9.0) if use and use[0] else 5.0]

        def sweep(_case: Any, start: Any, _deadline: float) -> tuple[Any, list[Any]]:
            begun.append(start)
            return start, []

        monkeypatch.setattr(bench_kernels, "timed", timed)
        monkeypatch.setattr(bench_kernels, "sweep", sweep)
        given = ["outputs=8,inputs=32,warps=2", "warps=16,outputs=3"]
        launches = [bench_kernels.changes(text) for text in given]
        row = bench_kernels.measure("v3", 1, case, 1.0, 1.0, launches)
        with pytest.raises(InputError, match="--launch heads: qkv_a has rows, outputs"):
            bench_kernels.changed(case, {"heads": 1})
    asked = dataclasses.replace(case.default, outputs=8, inputs=32, warps=2)
    right, failed = row["launches"]
    assert right["launch"] == dataclasses.asdict(asked) and right["us"] == 3.0
    assert failed["us"] is None and failed["error"]  # 3 rows are no power of two
    assert begun == [asked] and f"3.0 us with {asked}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "torch sees none"),
        (["--launch", "warps"], "--launch takes NAME=N,.. and not warps"),
        (["--launch", "warps=2"], "name the kernel in --only"),
        (["--batch", "0"], "whole numbers"),
        (["--shape", "r2"], "there is no shape"),
        (["--only", "latent,attend"], "--only attend: choose of step, qkv_a"),
        (["-o", "/"], "no file can be written"),
        (["-o", "/nowhere/x.json"], "no file can be written"),
    ],
)
def test_bench_kernels_bad_input(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_kernels.main(arguments) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and not out


# ---------------------------- for GPUs that aren't here
@pytest.mark.parametrize(
    ("name", "batch", "dense", "sparse"),
    [
        ("moonlight-16b", 1, 7, 8), ("moonlight-16b", 8, 10, 11),
        ("r1", 1, 8, 9), ("r1", 8, 12, 13),
        ("r1-distill-qwen-7b", 1, 6, 6), ("r1-distill-qwen-7b", 8, 9, 9),
    ],
)  # fmt: skip
def test_kernels_of_a_layer(name: str, batch: int, dense: int, sparse: int) -> None:
    """As r1/kernels says; each costs a launch."""
    once = 4 + (batch > 1)  # begin, the head (and its norm), its best, and one sum over devices
    assert (
        len(compile_tool.launches(shape(name), batch, compile_tool.TARGETS["sm_90"]))
        == dense + sparse + once
    )


def compile_kernels(*arguments: str) -> SimpleNamespace:
    tool = Path(__file__).parents[1] / "tools" / "check" / "compile_kernels.py"
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(tool), *arguments],
        capture_output=True,
        text=True,
        env=clean,
        check=False,
    )
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


@pytest.mark.parametrize(
    ("targets", "batches"),
    [(["sm_90"], [1, 8]), (["sm_80", "sm_89", "gfx942", "gfx1100"], [8])],
    ids=["Hopper", "others"],
)
def test_kernels_compile_for(targets: list[str], batches: list[int]) -> None:
    """What R1 would launch there for 8 tokens: every kernel for several tokens and the attention,
    with shared experts and without; and for a prompt. For one token on Hopper alone (which asks for
    keys ahead then): that takes as long again.
    """
    batch_list = ",".join(map(str, batches))
    done = compile_kernels(
        "--shape", "r1", "--batch", batch_list, "--target", ",".join(targets), "--quant", "none"
    )
    assert done.status == 0, done.out + done.err
    assert done.out.endswith("all kernels fit\n")
    for target in targets:
        lines = [line for line in done.out.splitlines() if line.startswith(f"{target} ")]
        text = "\n".join(lines)
        assert "step_kernel" in text
        for batch in batches:
            # One token: the block's, and experts alone: all of them, or a device's. Several: the
            # block's, experts alone, and a prompt's.
            assert text.count("up_vector_kernel" if batch == 1 else "up_tile_kernel") == 3, text
        found = {
            tuple(re.findall(r"(\w+_kernel) +(r1 \w+(?: \d+)?).*\((.*)\)", line)) for line in lines
        }
        orders = {
            (name, where == "r1 batch 1", order) for each in found for name, where, order in each
        }
        assert orders == (ORDERS if target == "sm_90" else set())


@pytest.mark.parametrize(
    ("targets", "batches"),
    [(["sm_90"], [1, 9]), (["sm_80", "gfx942"], [1, 8])],
    ids=["Hopper", "others"],
)
def test_kernels_of_packed_weights_compile_for(targets: list[str], batches: list[int]) -> None:
    """e4m3 by integer operations, which every chip has, and half bytes; one token and several: up
    to 8 of them by dot products (half bytes on NVIDIA's chips alone), more by tiles, and FP8 as it
    is where a chip multiplies it.
    """
    done = compile_kernels(
        "--shape", "moonlight-16b", "--batch", ",".join(map(str, batches)),
        "--target", ",".join(targets), "--quant", "fp8,int4",
    )  # fmt: skip
    assert done.out.endswith("all kernels fit\n"), done.out + done.err
    for target in targets:
        whole = target.startswith("sm_")
        narrow = "up_narrow_kernel" if target == "sm_90" else "up_tile_kernel"
        few = "narrow_kernel" if target == "sm_90" else "few_kernel"
        of = [("fp8", narrow), ("int4", few if whole else "tile_kernel")]
        for kind, kernel in [*of, ("fp8", "down_vector_kernel"), ("int4", "down_vector_kernel")]:
            line = rf"^{target} +{kernel} +moonlight-16b {kind} batch"
            assert re.search(line, done.out, re.MULTILINE), done.out
        if target == "sm_90":
            for kernel in ("rounded_kernel", "up_rounded_kernel", "down_rounded_kernel"):
                assert re.search(rf" {kernel} +moonlight-16b W8A8 prompt", done.out), done.out
            # add_kernel reads the residual before its wait.
            lines = re.findall(r" down_(?:narrow|rounded)_kernel .*\((.*)\)", done.out)
            assert set(lines) == {"wait let write"}
            check_widths(done.out, batches, ["fp8", "int4"], target)


def check_widths(text: str, batches: list[int], quants: list[str], target: str) -> None:
    """Packed words are loaded four at a time. A mask that Triton can't see to be the same for four
    made each of them a load.
    """
    shapes = {"moonlight-16b": shape("moonlight-16b")}
    recorded = compile_tool.wanted(shapes, batches, quants, compile_tool.TARGETS[target])
    for (_, launch), line in zip(recorded, text.splitlines(), strict=False):
        assert launch.name in line
        if not re.search("vector|gated|few|tile|narrow|dense", launch.name):
            continue
        names = launch.kernel.arg_names
        given = {names[place[0]]: v for place, v in launch.constants.items() if len(place) == 1}
        rows = given["BLOCK_OUT"] * given.get("CHOSEN_PAD", 1)
        rows *= 2 if launch.name.startswith(("up", "gated")) else 1
        columns = given.get("BLOCK_IN") or given["STEP"]
        words = rows * columns / (8 if " int4 " in line else 4) / (32 * launch.warps)
        loads = {int(size): int(count) for count, size in re.findall(r"(\d+) x (\d+)\b", line)}
        assert loads[16] >= words / 4, line
        others = words if launch.name.startswith("down") else 0  # indices, weights, shared experts
        if "tile" in launch.name:
            others = max(others, launch.stages)  # the scales, in each stage of the pipeline
        if "narrow" not in launch.name:  # whose scales of x are fp32 numbers
            assert loads.get(4, 0) < words + others, line


ORDERS = {
    # What is small lets the next start at once; what needs a processor's room, or reads ahead what
    # is older, behind its wait.
    *(
        ("vector_kernel", True, "let wait write"),
        ("gated_kernel", True, "let wait write"),
        ("all_reduce_kernel", True, "let wait write"),
        ("latent_kernel", True, "let wait write wait write"),
    ),
    *(
        ("latent_kernel", False, "let wait write wait write"),
        ("sort_kernel", False, "let wait write"),
        ("count_kernel", False, "let wait write"),
        ("place_kernel", False, "let wait write"),
        ("prepare_kernel", False, "let wait write"),
        ("add_kernel", False, "let wait write"),
    ),
    *((f"{name}_kernel", True, "wait let write") for name in ("split", "sum", "down_vector")),
    *((f"{name}_kernel", False, "wait let write") for name in ("tile", "split", "sum", "route")),
    *((f"{name}_kernel", False, "wait let write") for name in ("logits", "choose")),
    *(
        (f"{name}_kernel", False, "wait let write")
        for name in ("up_tile", "down_tile")  # add_kernel reads the residual before its wait
    ),
    *(
        ("up_vector_kernel", True, order)
        for order in ("wait let write wait let write", "wait let write")
    ),
    # These let nobody start: what comes behind reads before its own wait what they write.
    *((f"{name}_kernel", True, "wait write") for name in ("step", "likeliest")),
    ("route_kernel", True, "wait write let write"),
}
"""A kernel, whether it is for one token, and in which order it waits for the one ahead, lets the
next start, and writes."""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "r2"], "there is no shape"),
        (["--batch", "x"], "whole numbers"),
        (["--target", "sm_1"], "choose of sm_80"),
    ],
)
def test_compile_kernels_bad_input(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # it refuses this first
    assert compile_tool.main(arguments) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and not out
