"""tools/quantize.py: its algorithms against small exact cases, what it writes, and how it goes on.

Holds to account: tools/quantizing, tools/quantize.py, tools/measure/quality.py, and how
r1/files/quantized reads what they write.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import quality
import quantize as command
import torch
from folders import load, tensors
from models import FP8, V2, model, runner
from quantizing import awq, calibration, gptq, job, layer, rounding, sites
from quantizing.formats import FORMATS
from quantizing.rounding import Grid, by_output, fit, rtn
from quantizing.source import Source
from refusals import check_sentence, refused, snapshot
from tasks import is_held_out
from torch import Tensor

import r1
from r1 import Backend
from r1.files.config_json import load_config
from r1.files.names import slots
from r1.files.save import save
from r1.model.transformer import Block, Transformer
from r1.storage.codes import Codes, dequantize, round_to_nearest
from r1.storage.kinds import KINDS
from r1.switches.precision import KEPT


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(columns: int, lead: tuple[int, ...] = (), seed: int = 1, tokens: int = 200) -> Tensor:
    """The mean of x x^T of inputs that go together: a few directions hold most of them."""
    few = random(*lead, tokens, max(1, columns // 3), seed=seed)
    mixed = few @ random(*lead, few.shape[-1], columns, seed=seed + 1)
    x = mixed + 0.3 * random(*lead, tokens, columns, seed=seed + 2)
    return x.mT @ x / tokens


def harm(codes: Codes, w: Tensor, h: Tensor, grid: Grid) -> Tensor:
    """The squared change of each row's output, (..., out)."""
    change = dequantize(codes, grid.spec(w.shape[-1])) - w
    return ((change @ h) * change).sum(-1)


# ---------------------------- grids and scales
GRIDS = [
    Grid(8, 16), Grid(4, 16), Grid(4, 0), Grid(4, 32, zeros=True, scale="fp16"),
    Grid(8, 16, zeros=True), Grid(3, 16), Grid(2, 16), Grid(3, 16, zeros=True),
]  # fmt: skip


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.bits >= 4], ids=str)
def test_rtn_is_what_quant_does_while_loading(grid: Grid) -> None:
    w = random(24, 96)
    ours, theirs = rtn(w, grid), round_to_nearest(w, grid.spec(96))
    assert torch.equal(ours.q, theirs.q) and torch.equal(ours.scale, theirs.scale)
    assert (ours.zero is None) == (theirs.zero is None) == (not grid.zeros)
    if ours.zero is not None and theirs.zero is not None:
        assert torch.equal(ours.zero, theirs.zero)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_grid_has_as_many_numbers_as_its_bits_tell(grid: Grid) -> None:
    """Of 2 and 3 bits too, which are stored as 4. Many numbers in each group, so all are used."""
    codes = rtn(random(2000, 16).clamp(-1.5, 1.5), Grid(grid.bits, 0, grid.zeros, grid.scale))
    used = len(codes.q.unique())
    assert used == 2**grid.bits - (grid.bits == 8 and not grid.zeros)
    matrix = KINDS[grid.kind](
        grid.spec(16), (2000, 16), torch.float32, KINDS[grid.kind].encode(codes)
    )
    assert torch.equal(matrix.dense(), dequantize(codes, grid.spec(16)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zeros_stay_zeros(grid: Grid) -> None:
    """A group, or a row, of zeros harms no other one, in any method."""
    w = random(4, 32)
    w[1] = w[2, 16:] = 0
    h = moments(32)
    for codes in (rtn(w, grid), gptq.gptq(w, h, grid), awq.clipped(w, h, grid)):
        back = dequantize(codes, grid.spec(32))
        assert bool(back.isfinite().all()) and not bool(back[1].any())
        assert bool((codes.scale > 0).all())
        assert bool(((back - w)[[0, 3]].norm(dim=1) < w[[0, 3]].norm(dim=1)).all())


@pytest.mark.parametrize(
    ("columns", "group", "width"),
    [
        (256, 128, 128), (160, 128, 80), (72, 32, 24), (10944, 128, 96), (72, 128, 72),
        (20, 8, 20), (64, 0, 64), (96, 48, 48), (30, 15, 15),
    ],
)  # fmt: skip
def test_groups_divide_a_matrix(columns: int, group: int, width: int) -> None:
    grid = Grid(4, group)
    assert grid.width(columns) == width and columns % width == 0
    assert grid.spec(columns).grid((1, columns)) == (1, columns // width)


def test_the_search_for_scales_measures_the_output() -> None:
    """One group: the search finds the best of its trials, by trying them."""
    w, h, grid, trials = random(5, 8), moments(8), Grid(2, 8), rounding.parts(0.5, 1.2)
    best = fit(w, grid, trials, by_output(h))
    found = harm(best.codes(rounding.nearest(w, best)), w, h, grid)
    each = [fit(w, grid, (trial,)) for trial in trials]
    errors = torch.stack([harm(f.codes(rounding.nearest(w, f)), w, h, grid) for f in each])
    assert torch.allclose(found, errors.min(0).values, rtol=1e-5)
    assert bool((errors.max(0).values > 1.2 * found).all())


def test_errors_are_of_single_groups() -> None:
    """The groups' parts of H are its diagonal blocks, of one matrix and of a stack."""
    h, d = moments(12, (3,)), random(3, 5, 12)
    got = by_output(h)(d.unflatten(-1, (-1, 4)))  # (3, 5, 3)
    for e, o, g in itertools.product(range(3), range(5), range(3)):
        part = d[e, o, 4 * g : 4 * g + 4]
        block = h[e, 4 * g : 4 * g + 4, 4 * g : 4 * g + 4]
        assert torch.allclose(got[e, o, g], part @ block @ part, rtol=1e-4)


# ---------------------------- GPTQ
@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ with the whole ranges alone, whose scales rtn has too."""
    monkeypatch.setattr(gptq, "TRIALS", ((1.0,),))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("h", [torch.eye(32), torch.rand(32).diag(), torch.zeros(32, 32)])
def test_gptq_of_inputs_apart_is_rtn(h: Tensor, ordered: bool, whole: None) -> None:
    """No column can make up for another's error; nor can one whose input was always 0."""
    w = random(6, 32)
    for grid in (Grid(4, 8), Grid(3, 32), Grid(8, 8, zeros=True)):
        ours, theirs = gptq.gptq(w, h, grid, ordered=ordered), rtn(w, grid)
        assert torch.equal(ours.q, theirs.q) and torch.equal(ours.scale, theirs.scale)


def by_definition(w: Tensor, h: Tensor, grid: Grid) -> Tensor:
    """GPTQ's numbers without any of its tricks: after each column, solve for all that follow.

    The columns that follow move by d, such that the error e of the column and d together change
    the output least: h_ff d = -h_fj e.
    """
    h, rest = gptq.damped(h, gptq.DAMPING), w.double().clone()
    fitted, groups = fit(w, grid), rounding.groups_of(w.shape[1], grid)
    q = torch.empty_like(w)
    for j in range(w.shape[1]):
        at = groups[j : j + 1]
        q[:, j : j + 1] = fitted.q(rest[:, j : j + 1].float(), at)
        e = fitted.value(q[:, j : j + 1], at) - rest[:, j : j + 1]  # (out, 1)
        if j + 1 < w.shape[1]:
            move = torch.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j : j + 1])  # (rest, 1)
            rest[:, j + 1 :] -= e * move.T
    return q


@pytest.mark.parametrize("block", [3, 128])
def test_gptq_moves_the_columns_that_follow(
    block: int, monkeypatch: pytest.MonkeyPatch, whole: None
) -> None:
    """As the definition does; however many columns are between two updates of the rest."""
    monkeypatch.setattr(gptq, "BLOCK", block)
    w, h, grid = random(7, 24), moments(24), Grid(3, 8)
    got = gptq.gptq(w, h, grid, ordered=False)
    assert torch.equal(got.q.float(), by_definition(w, h, grid))
    order = h.diagonal().argsort(descending=True)
    row = Grid(3, 0)  # one group, so columns may change places
    ordered = gptq.gptq(w, h, row).q.float()
    assert torch.equal(ordered[:, order], by_definition(w[:, order], h[order][:, order], row))


def test_the_order_is_undone(whole: None) -> None:
    """Columns in another order, with their inputs, give the same numbers at their new places."""
    w, h, grid = random(5, 16), moments(16), Grid(4, 0)
    p = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    here, there = gptq.gptq(w, h, grid), gptq.gptq(w[:, p], h[p][:, p], grid)
    assert torch.equal(here.q[:, p], there.q)
    plain = gptq.gptq(w, h, grid, ordered=False).q
    assert not torch.equal(plain[:, p], gptq.gptq(w[:, p], h[p][:, p], grid, ordered=False).q)


def test_the_factor_is_of_the_inverse() -> None:
    h = gptq.damped(moments(9, (2,)), 0.01)
    h = (h + h.mT) / 2  # fp32 sums are not symmetric to the last bit
    u = gptq.inverse_factor(h)
    assert torch.equal(u, u.triu())
    assert torch.allclose(u.mT @ u, torch.linalg.inv(h), rtol=1e-8)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_near_the_best_of_all_numbers(bits: int, whole: None) -> None:
    """All numbers of a row of a few columns are tried, with the same scales."""
    columns = {2: 6, 3: 4, 4: 3}[bits]
    w, h, grid = random(40, columns), moments(columns), Grid(bits, 0)
    fitted, (low, high) = fit(w, grid), grid.ends
    every = torch.tensor(list(itertools.product(range(low, high + 1), repeat=columns)))
    values = (every.float() - grid.middle) * fitted.scale[:, :, None]  # (rows, all, columns)
    change = values - w[:, None]
    best = ((change @ h) * change).sum(-1).min(-1).values  # (rows,)
    ours, plain = (harm(c, w, h, grid) for c in (gptq.gptq(w, h, grid), rtn(w, grid)))
    assert bool((ours >= best * (1 - 1e-4)).all())
    assert ours.sum() < 1.35 * best.sum() and ours.sum() < 0.7 * plain.sum()


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.bits < 8], ids=str)
def test_gptq_harms_less_than_rtn(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix, a stack with the same inputs, and a stack with inputs of its own."""
    monkeypatch.setattr(rounding, "PART", 700)
    w = random(3, 10, 32)
    shared, each = moments(32), moments(32, (3,))
    for h in (shared, each):
        got = gptq.gptq(w, h, grid)
        in_parts = rounding.by_parts(partial(gptq.gptq, grid=grid), w, h)  # two at a time
        assert harm(got, w, h, grid).sum() < 0.7 * harm(rtn(w, grid), w, h, grid).sum()
        for e in range(3):
            assert torch.equal(in_parts.q[e], got.q[e])
            one = gptq.gptq(w[e], h if h.dim() == 2 else h[e], grid)
            assert torch.equal(got.q[e], one.q) and torch.equal(got.scale[e], one.scale)
            assert one.zero is None or torch.equal(got.zero[e], one.zero)  # type: ignore[index]


def test_each_row_keeps_its_better_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h, grid = random(60, 32), moments(32), Grid(3, 8)
    both = harm(gptq.gptq(w, h, grid), w, h, grid)
    alone = []
    for trials in gptq.TRIALS:
        monkeypatch.setattr(gptq, "TRIALS", (trials,))
        alone.append(harm(gptq.gptq(w, h, grid), w, h, grid))
    assert torch.allclose(both, torch.minimum(*alone), rtol=1e-4)
    assert 5 < int((alone[0] < alone[1]).sum()) < 55


# ---------------------------- what is seen of a layer
@pytest.fixture(scope="module")
def plain() -> Transformer:
    """Random weights; norms differ by column, so folding matters. fp32."""
    made = model(FP8, dtype="fp32", join="off")
    runner(made, join="off")  # fills the slots
    return made


def block_of(made: Transformer, sparse: bool) -> Block:
    return next(b for b in made.layers if isinstance(b, Block) and b.sparse == sparse)


def calibrated(made: Transformer, block: Block) -> layer.Calibrated:
    """Rows of two lengths, so one is padded."""
    pairs = layer.batches([list(range(12)), list(range(9))])
    (tokens, real), width = pairs[0], made.config.hidden_size
    batch = layer.Batch(tokens, real, random(*tokens.shape, width, seed=9))
    return layer.Calibrated(
        block, [batch],
        lambda t: made.step("prefill", torch.arange(t.shape[1]).expand_as(t), 0),
    )  # fmt: skip


@pytest.mark.parametrize("sparse", [False, True])
@torch.inference_mode()
def test_every_token_visits_every_expert(plain: Transformer, sparse: bool) -> None:
    """The statistics are of all real tokens, and the output stays as it was, to the bit."""
    block = block_of(plain, sparse)
    work = calibrated(plain, block)
    before = work.output()[0]
    every = [site for stage in sites.sites(block) for site in stage]
    with sites.watch(block, every) as watcher:
        watcher.real = work.batches[0].real.flatten()
        during = block(work.batches[0].hidden, work.step(work.batches[0].tokens), None)
    assert torch.equal(during, before) and torch.equal(work.output()[0], before)
    seen = work.seen(every).seen
    assert {s.tokens for s in seen.values()} == {21}
    x = block.input_layernorm(work.batches[0].hidden)[work.batches[0].real]  # (21, D)
    first = seen["self_attn.q_a_proj"]
    assert torch.allclose(first.h, x.T @ x / 21, atol=1e-5)
    assert torch.allclose(first.size, x.abs().mean(0), atol=1e-5)
    if not sparse:
        return
    inner, down = seen["mlp.experts.gate_proj"], seen["mlp.experts.down_proj"]
    mlp: Any = block.mlp
    assert inner.h.dim() == 2 and down.h.shape[0] == mlp.experts.count
    kept: list[Tensor] = []
    hook = block.post_attention_layernorm.register_forward_hook(lambda *a: kept.append(a[2]))
    work.output()
    hook.remove()
    x = kept[0][work.batches[0].real]
    assert torch.allclose(inner.h, x.T @ x / 21, atol=1e-4)
    loads = torch.zeros(mlp.experts.count, dtype=torch.int64)
    for chosen in mlp.gate(x)[0].tolist():
        loads[chosen] += 1
    counted = work.seen(every).loads
    assert counted is not None and torch.equal(counted, loads) and loads.sum() == 21 * 3
    for e in range(mlp.experts.count):
        h = mlp.experts.inner(lambda m, e=e: x @ m.one(e).T)
        assert torch.allclose(down.h[e], h.T @ h / 21, atol=1e-4 * float(h.square().max()))


@pytest.mark.parametrize("sparse", [False, True])
@torch.inference_mode()
def test_folding_leaves_the_function_unchanged(
    sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any powers of two, at every site: to the last bits, and all weights have the digits they
    had. So a fold that forgot the router, or one of the experts, would be seen.
    """
    made = model(FP8, dtype="fp32", join="off")
    runner(made, join="off")
    block = block_of(made, sparse)
    work, generator = calibrated(made, block), torch.Generator().manual_seed(4)
    before = work.output()[0]
    old = {name: p.clone() for name, p in block.named_parameters()}

    def anything(_readers: list[Tensor], stats: sites.Statistics, _grid: Grid) -> Tensor:
        return torch.exp2(torch.randint(-2, 3, stats.size.shape, generator=generator).float())

    monkeypatch.setattr(awq, "search", anything)
    for stage in sites.sites(block):
        for site in stage:
            seen = work.seen([site]).seen
            awq.fold(block, site, site.readers, seen, Grid(4, 8))
            again = work.seen([site]).seen[site.name]  # what the matrices read now
            assert torch.allclose(seen[site.name].h, again.h, rtol=1e-3, atol=1e-5)
            assert torch.allclose(work.output()[0], before, atol=1e-4), site.name
    changed = {name for name, p in block.named_parameters() if not torch.equal(p, old[name])}
    left = {"self_attn.kv_a_layernorm.weight", "mlp.gate.e_score_correction_bias"}
    assert changed == old.keys() - left
    for name, p in block.named_parameters():
        assert torch.equal(p.abs().frexp().mantissa, old[name].abs().frexp().mantissa), name


def test_awq_weighs_all_readers_of_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack with the same inputs counts as all its matrices; else each expert has its s."""
    w, h, size = random(3, 8, 16), moments(16, (3,)), random(3, 16, seed=5).exp()
    grid, s = Grid(3, 8), torch.exp2(random(3, 16, seed=6).round())
    for part in (2**20, 1):  # all at once, and one after the other
        monkeypatch.setattr(rounding, "PART", part)
        together = awq._error(w, s[0], h[0], grid)
        each = torch.stack([awq._error(one, s[0], h[0], grid) for one in w])
        assert torch.allclose(together, each.sum(), rtol=1e-4)
        apart = awq._error(w, s, h, grid)
        each = torch.stack([awq._error(w[e], s[e], h[e], grid) for e in range(3)])
        assert torch.allclose(apart, each, rtol=1e-4)
    found = awq.search([w], sites.Statistics(h, size), grid)
    for e in range(3):
        one = awq.search([w[e]], sites.Statistics(h[e], size[e]), grid)
        assert torch.equal(torch.ones(16) if one is None else one, found[e])  # type: ignore[index]


def test_awq_saves_columns_with_large_inputs() -> None:
    """Their s is larger, and the output is nearer. With even inputs nothing is to be gained."""
    w, grid = random(32, 32), Grid(3, 32)
    size = torch.ones(32)
    size[[3, 17]] = 40.0
    h = size.diag() @ (moments(32) * 0.02 + torch.eye(32)) @ size.diag()
    s = awq.search([w], sites.Statistics(h, size), grid)
    assert s is not None and torch.equal(s, torch.exp2(s.log2().round()))
    assert bool((s[[3, 17]] >= 2 * s[0]).all())
    apart = awq.clipped(w * s, h / (s[:, None] * s), grid)
    change = dequantize(apart, grid.spec(32)) / s - w
    folded = float(((change @ h) * change).sum())
    assert folded < 0.7 * float(harm(awq.clipped(w, h, grid), w, h, grid).sum())
    assert awq.search([w], sites.Statistics(torch.eye(32), torch.ones(32)), grid) is None


# ---------------------------- whole runs
TEXT = "What is 12 + 30? It is 42. What is 7 * 8? It is 56. Then 42 + 56 = 98.\n" * 6


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def flags(folder: Path, out: Path, method: str, text: Path, *more: str) -> list[str]:
    words = ["--method", method, "--group", "8", "-n", "4", "--length", "24", "--device", "cpu"]
    words += [] if method == "rtn" else ["--text", str(text)]
    return [*words, *more, str(folder), str(out)]


def spy(monkeypatch: pytest.MonkeyPatch) -> list[layer.Done]:
    """What becomes of each layer, as it is decided."""
    decided: list[layer.Done] = []

    def quantize(*arguments: Any) -> layer.Done:
        decided.append(layer.quantize(*arguments))
        return decided[-1]

    monkeypatch.setattr(job, "quantize", quantize)
    return decided


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("rtn", ()), ("gptq", ()), ("awq", ()), ("gptq", ("--bits", "8")),
        ("gptq", ("--format", "awq")), ("awq", ("--format", "awq")), ("rtn", ("--bits", "3")),
        ("gptq", ("--experts-only",)), ("rtn", ("--group", "0")),
    ],
)  # fmt: skip
def test_r1_reads_what_was_decided(
    method: str, more: tuple[str, ...], made: Path, tmp_path: Path, text: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Packed and dequantized, to the bit; with everything else of the source."""
    decided, out = spy(monkeypatch), tmp_path / "out"
    assert command.main(flags(made, out, method, text, *more)) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt"]
    printed = capsys.readouterr().out
    assert printed.count("\nlayer ") + printed.startswith("layer ") == 3
    config, source = load_config(out), Source(made)
    bits = 8 if "8" in more else 4
    assert config.files.kind == f"int{bits}"
    packed, dense = (load(out, mtp=True, dtype="fp32", quant=q)[0] for q in ("auto", "none"))
    numbers, plain_ = slots(dense), slots(load(made, mtp=True, dtype="fp32", quant="none")[0])
    stored = {key for key, slot in slots(packed).items() if slot.spec}
    form, seen = FORMATS["awq" if "awq" in more else "compressed-tensors"], set()
    for n, done in enumerate(decided):
        for path, codes in done.codes.items():
            columns = codes.q.shape[-1]
            group = 0 if more == ("--group", "0") else 8
            grid = Grid(4 if bits == 4 else 8, group, form.zeros, form.scale)
            whole_ = dequantize(codes, grid.spec(columns))
            block: Any = source.model.get_submodule(source.path(n))
            names = job.modules(block, path)
            for e, name in enumerate(names):
                key = f"{source.stem(n)}.{name}.weight"
                seen.add(key)
                assert torch.equal(numbers[key].weight, whole_[e] if len(names) > 1 else whole_)
    assert stored == seen and not any(
        part in key for part in KEPT if part != "gate" for key in seen
    )
    assert any(".experts." in key for key in seen)
    assert ("--experts-only" in more) == all(".experts." in key for key in seen)
    for key in numbers.keys() - seen:
        if method != "awq":
            assert torch.equal(
                numbers[key].weight,
                plain_[key].weight.bfloat16().float()
                if key in source.survey.files.found
                else plain_[key].weight,
            ), key
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (made / name).read_bytes()
    logits = r1.load(out, Backend(device="cpu", dtype="fp32")).logits(torch.arange(20)[None])
    assert bool(logits.isfinite().all())


def test_a_layer_reads_what_the_quantized_ones_make(
    made: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 1 and the layer for multi-token prediction are calibrated on the written model's own
    hidden states.
    """
    read: list[list[layer.Batch]] = []

    def inputs(*arguments: Any) -> list[layer.Batch]:
        read.append(old(*arguments))
        return read[-1]

    old = job._inputs
    monkeypatch.setattr(job, "_inputs", inputs)
    assert command.main(flags(made, tmp_path / "out", "gptq", text, "-n", "40")) == 0
    assert not read[0][0].real.all()  # the last row is shorter
    got, _ = load(tmp_path / "out", mtp=True, dtype="fp32", quant="none")
    with torch.inference_mode():
        for number, batch in enumerate(read[0]):
            positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
            step, x = got.step("prefill", positions, 0), got.embed_tokens(batch.tokens)
            real = batch.real
            assert torch.allclose(x[real], batch.hidden[real], atol=1e-5)
            x = got.layers[0](x, step, None)
            assert torch.allclose(x[real], read[1][number].hidden[real], atol=1e-4)
            x = got.layers[1](x, step, None)
            mtp: Any = got.mtp[0]
            following = got.embed_tokens(batch.tokens.roll(-1, 1))
            x = mtp.eh_proj(torch.cat((mtp.enorm(following), mtp.hnorm(got.norm(x))), -1))
            last = read[2][number]
            assert int(last.real.sum()) == int(real.sum()) - len(real)
            assert torch.allclose(x[last.real], last.hidden[last.real], atol=1e-3)


def killed_in_layer_1(words: list[str], threads: int) -> None:
    """Run quantize.py in a process of its own: one that is killed can clean up nothing."""
    torch.set_num_threads(threads)
    count = itertools.count()

    def killed(*arguments: Any) -> layer.Done:
        if next(count) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return layer.quantize(*arguments)

    job.quantize = killed  # type: ignore[assignment]
    command.main(words)


def test_a_killed_run_goes_on(
    made: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Killed in the middle of layer 1: nothing that loads is left, layer 0 is not done again, and
    the files are those of a run that was not killed.
    """
    whole_, out = tmp_path / "whole", tmp_path / "out"
    assert command.main(flags(made, whole_, "gptq", text)) == 0
    words = flags(made, out, "gptq", text)
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that uses a GPU can't use it
    child = spawn.Process(target=killed_in_layer_1, args=(words, torch.get_num_threads()))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    unfinished = tmp_path / "out.quantizing"
    assert not out.exists() and (unfinished / "layer-0.json").exists()
    with refused("no config.json"):
        r1.load(unfinished, Backend(device="cpu"))
    decided = spy(monkeypatch)
    monkeypatch.setattr(calibration, "from_text", lambda *_: pytest.fail("the rows are there"))
    assert command.main(flags(made, out, "gptq", text)) == 0
    assert len(decided) == 2 and "going on with layer 1 of 3" in capsys.readouterr().out
    assert not unfinished.exists()
    a, b = tensors(whole_), tensors(out)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    names = {p.name for p in whole_.iterdir()}
    assert names == {p.name for p in out.iterdir()}
    assert (whole_ / "config.json").read_text() == (out / "config.json").read_text()


def stopped(monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
    def stop(*_: Any) -> layer.Done:
        raise error()

    monkeypatch.setattr(job, "quantize", stop)


def test_work_of_another_plan_is_left_alone(
    made: Path, sound: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped(patch, KeyboardInterrupt)
        assert command.main(flags(sound, out, "gptq", text)) == 130
    before = snapshot(tmp_path)
    assert command.main(flags(sound, out, "awq", text)) == 2
    assert "unfinished quantization with other method" in capsys.readouterr().err
    assert command.main(flags(sound, out, "gptq", text, "--group", "16")) == 2
    assert "with other grid" in capsys.readouterr().err
    assert command.main(flags(made, out, "gptq", text)) == 2  # the same, at other times
    assert "with other files" in capsys.readouterr().err
    text.write_text(TEXT + "more", encoding="utf-8")
    assert command.main(flags(sound, out, "gptq", text)) == 2
    assert "with other text" in capsys.readouterr().err
    after = snapshot(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} <= {
        "text.txt", "out.quantizing/lock"
    }  # fmt: skip


def test_two_runs_at_once(
    made: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The second one is refused, and the first one finishes."""
    out, again = tmp_path / "out", []

    def quantize(*arguments: Any) -> layer.Done:
        again.append(command.main(flags(made, out, "gptq", text)))
        return layer.quantize(*arguments)

    monkeypatch.setattr(job, "quantize", quantize)
    assert command.main(flags(made, out, "gptq", text)) == 0
    assert again == [2, 2, 2]
    err = capsys.readouterr().err
    assert err.count("another run is at work") == 3 and out.is_dir()


def test_a_full_disk(
    made: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One sentence; and the run goes on when there is room again."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped(patch, lambda: OSError(28, "No space left on device"))
        assert command.main(flags(made, out, "gptq", text)) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err and not out.exists()
    check_sentence(err.strip())
    assert command.main(flags(made, out, "gptq", text)) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "gptq"], "give --text FILE, or --questions"),
        (["--method", "rtn", "--text", "x"], "rtn looks at no text"),
        (["--method", "rtn", "--format", "awq", "--bits", "8"], "awq has no numbers of 8 bits"),
        (["--method", "rtn", "--group", "-1"], "--group -1: give columns"),
        (["--method", "awq", "-n", "0", "--text", "x"], "-n 0: give 2 to"),
        (["--method", "awq", "--length", "1", "--text", "x"], "--length 1: give 2 to"),
        (["--method", "awq", "--text", "nothing.txt"], "nothing.txt can't be read"),
        (["--method", "awq", "--text", "empty.txt"], "empty.txt is empty"),
        (["--method", "awq", "--text", "binary.txt"], "binary.txt can't be read"),
        (["--method", "gptq", "--questions", "long.txt", "--length", "20"], "no room for its"),
        (["--method", "rtn", "--format", "awq", "--group", "128"], "no matrix can be written"),
        (["--method", "rtn", "-o", "gone/x.json"], "no file can be written there"),
    ],
)
def test_unusable_input(
    words: list[str], said: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("long.txt").write_text("What is 1 + 1? " * 20)
    assert command.main([*words, str(made), "out"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("quantize: ") and err.count("\n") == 1
    check_sentence(err.strip())
    assert sorted(os.listdir()) == ["binary.txt", "empty.txt", "long.txt"]


def test_folders_that_are_refused(
    made: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An OUT that exists, one whose work folder is somebody's, a model in 4 bits, a broken one."""
    rtn_ = ["--method", "rtn", "--group", "8"]
    (tmp_path / "there").mkdir()
    assert command.main([*rtn_, str(made), str(tmp_path / "there")]) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "x.quantizing").mkdir()
    (tmp_path / "x.quantizing" / "diary").write_text("mine")
    assert command.main([*rtn_, str(made), str(tmp_path / "x")]) == 2
    assert "is no unfinished quantization" in capsys.readouterr().err
    assert (tmp_path / "x.quantizing" / "diary").read_text() == "mine"
    assert command.main([*rtn_, str(made), str(tmp_path / "four")]) == 0
    assert command.main([*rtn_, str(tmp_path / "four"), str(tmp_path / "again")]) == 2
    assert "is quantized to 4 bits already" in capsys.readouterr().err
    assert command.main([*rtn_, str(tmp_path / "gone"), str(tmp_path / "y")]) == 2
    next(sound.glob("model-00002*")).unlink()
    assert command.main([*rtn_, str(sound), str(tmp_path / "y")]) == 2
    assert "which the folder lacks" in capsys.readouterr().err
    assert not (tmp_path / "y").exists() and not (tmp_path / "y.quantizing").exists()


def test_inputs_that_are_no_numbers(
    made: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    old = Source.embedded
    monkeypatch.setattr(Source, "embedded", lambda *a: [x * torch.inf for x in old(*a)])
    assert command.main(flags(made, tmp_path / "out", "gptq", text)) == 2
    err = capsys.readouterr().err
    assert "NaN or infinite inputs of self_attn.q_a_proj" in err
    check_sentence(err.strip())


def test_the_report_names_each_experts_tokens(made: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "report.json"
    assert command.main(flags(made, tmp_path / "out", "awq", text, "-o", str(out))) == 0
    record = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    dense, sparse, mtp = record["layers"]
    assert dense["expert_tokens"] is None and dense["tokens"] == 4 * 24
    assert len(sparse["expert_tokens"]) == 8 and sum(sparse["expert_tokens"]) == 3 * 4 * 24
    assert sum(mtp["expert_tokens"]) == 3 * 4 * 23  # a row's last token has none after it
    assert all(0 < report["error"] < 1 for report in record["layers"])


def test_v2_and_its_bf16(tmp_path: Path, text: Path) -> None:
    """Another family, without an MTP layer, tokenizer or FP8: rtn needs none of them."""
    save(model(V2), tmp_path / "v2")
    words = ["--method", "rtn", "--group", "8", str(tmp_path / "v2"), str(tmp_path / "out")]
    assert command.main(words) == 0
    got, report = load(tmp_path / "out", dtype="fp32")
    assert got.config.files.kind == "int4" and not report.skipped
    words = ["--method", "gptq", "--text", str(text), str(tmp_path / "v2"), str(tmp_path / "x")]
    assert command.main(words) == 2


# ---------------------------- the calibration's text
def test_no_question_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """tiny-r1's own questions are of its training problems."""
    drawn: list[Any] = []

    def draw(*arguments: Any) -> Any:
        drawn.append(old(*arguments))
        return drawn[-1]

    old = calibration.draw
    monkeypatch.setattr(calibration, "draw", draw)
    questions = calibration.training_questions(calibration_model(), 50, 0)
    assert questions and len(set(questions)) > 40 and len(drawn) == 50
    assert not any(is_held_out(problem.expression) for problem in drawn)
    assert questions == calibration.training_questions(calibration_model(), 50, 0)
    assert questions != calibration.training_questions(calibration_model(), 50, 1)


def calibration_model() -> Path:
    from r1.files.embedded import EMBEDDED

    return EMBEDDED


def test_rows_of_text_and_of_answers(made: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = r1.Tokenizer.load(made)
    rows = calibration.from_text(tokenizer, text, 5, 16)
    assert [len(row) for row in rows] == [16] * 5
    assert all(row[0] == tokenizer.bos_id for row in rows)
    ids = [token for row in rows for token in row[1:]]
    assert ids == tokenizer.encode(TEXT)[: len(ids)]
    assert calibration.training_questions(made, 3, 0) is None
    asked = tmp_path / "questions.txt"
    asked.write_text("1 + 1?\n\n2 + 2?\n")
    questions = calibration.questions_in(asked)
    assert questions == ["1 + 1?", "2 + 2?"]
    backend = Backend(device="cpu", dtype="fp32", quant="none")
    rows = calibration.own_answers(made, backend, questions, 40, lambda _: None)
    prompts = [tokenizer.chat_prompt([{"role": "user", "content": q}]) for q in questions]
    assert len(rows) == 2 and all(len(row) <= 40 for row in rows)
    for prompt, row in zip(sorted(prompts, key=len), rows, strict=True):
        assert row[: len(prompt)] == prompt and len(row) > len(prompt)


# ---------------------------- what it costs
def test_greedy_answers_are_those_of_generate(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the answers, others, and the answers with an error in the middle; also their figures
    with themselves.
    """
    monkeypatch.setattr(quality, "READ", 2)
    engine = r1.load(made, Backend(device="cpu", dtype="fp32", quant="none"))
    prompts = [[0, 5, 7], [0, 9], [0, 11, 12, 13]]
    own = [done.tokens for done in engine.generate(prompts, 12, temperature=0.0)]
    for k, answers in enumerate((own, [[3] * 12] * 3, [[*a[:5], 1 + a[5], *a[6:]] for a in own])):
        pairs = [(prompt, list(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        thought = quality.read(engine, pairs)
        got = quality.greedy(engine, pairs, thought, 2)
        assert [answer[:12] for _, answer in got] == own, k
        assert [prompt for prompt, _ in got] == prompts
        assert quality.compare(thought, thought) == {"kl": 0.0, "top1": 1.0}


def test_kl_and_top_1() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.3, 0.6, 0.1]])
    kl = float((p * (p / q).log()).sum())
    both = quality.compare([q.log(), p.log()], [p.log(), p.log()])
    assert both == pytest.approx({"kl": kl / 2, "top1": 0.5}, rel=1e-5)


# ---------------------------- other programs
@pytest.mark.parametrize("more", [(), ("--experts-only",), ("--bits", "8"), ("--group", "0")])
def test_transformers_reads_it_too(
    more: tuple[str, ...], made: Path, tmp_path: Path, text: Path
) -> None:
    """The same logits, through compressed-tensors. It dequantizes experts while it loads them, and
    rounds them to their scales' bf16: so are ours here.
    """
    transformers = pytest.importorskip("transformers", reason="the peer: pip install transformers")
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    transformers.logging.set_verbosity_error()
    out = tmp_path / "out"
    assert command.main(flags(made, out, "gptq", text, *more)) == 0
    peer, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    assert all(key.startswith("model.layers.2.") for key in report["unexpected_keys"]), report
    ours, _ = load(out, dtype="fp32", quant="none", join="off")
    for weight in (p for name, p in ours.named_parameters() if ".experts." in name):
        weight.copy_(weight.bfloat16())
    for weight in (p for name, p in peer.named_parameters() if ".experts." in name):
        weight.data = weight.data.float()
    tokens = torch.arange(40).view(2, 20)
    theirs, got = peer(tokens).logits.detach(), runner(ours, join="off").logits(tokens)
    assert torch.allclose(got, theirs, atol=1e-4), float((got - theirs).abs().max())
