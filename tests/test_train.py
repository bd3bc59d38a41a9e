"""Tests the training of tiny-r1: gradients, packing, balance, Muon, resuming, and its checkpoint.

Holds to account: tools/train, and the gradients of r1/model and r1/storage.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import eval as examination
import packing
import pytest
import torch
import train_tiny
from make_tokenizer import make_tokenizer
from muon import Muon, orthogonal
from packing import IGNORE, Batches, encode, layout, shift
from rounding import round_blocks
from tasks import KINDS, exam, phrase
from tolerances import atol
from torch import Tensor, nn
from train_tiny import Settings, Trainer, finish, schedule

import r1
from r1 import Backend, InputError
from r1.files.names import is_projection, places
from r1.model.dispatch import Grouped, Loop
from r1.model.moe import Experts
from r1.model.shapes import shape
from r1.run.completion import Completion
from r1.storage import fp8
from r1.storage.joined import join
from r1.switches.machine import Machine
from r1.text.chat import END_THINK, THINK
from r1.text.control_tokens import PAD
from r1.text.tokenizer import Tokenizer

SMALL = Settings(steps=20, rows=2, length=320, layers=2, kinds=("fact", "add"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def trained(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Trainer, Path]]:
    """A run of 20 steps, and the checkpoint that it wrote."""
    trainer = trainer_of(tokenizer)
    trainer.run(workers=0)
    folder = tmp_path_factory.mktemp("run") / "tiny"
    finish(trainer, folder, examined=4)
    yield trainer, folder


def trainer_of(tokenizer: Tokenizer, settings: Settings = SMALL) -> Trainer:
    return Trainer(shape("tiny", settings.layers), settings, tokenizer, "cpu")


def uncounted(trainer: Trainer) -> None:
    """Take the counting, which is bound to a batch's shape, out of the model's slots."""
    for layer, counted in trainer.balance.layers:
        layer.dispatch["prefill"] = counted.dispatch


def batches(tokenizer: Tokenizer, settings: Settings = SMALL, **changes: Any) -> Batches:
    return Batches(
        tokenizer,
        **{"rows": settings.rows, "length": settings.length, "seed": 0, "direct": 0.1, **changes},
    )


# ---------------------------- gradients
@pytest.mark.parametrize("amp", [False, True])
def test_grouped_has_the_gradients_of_loop(amp: bool) -> None:
    """Of the tokens, the routing weights and the experts. Experts from 13 on get no token."""
    config = shape("tiny")
    generator = torch.Generator().manual_seed(0)
    experts = Experts(config)
    experts.gate_proj, experts.up_proj = join(experts.gate_proj, experts.up_proj)  # as it trains
    for parameter in experts.parameters():
        nn.init.normal_(parameter, 0.0, 0.1, generator=generator)
    x = torch.randn(50, config.hidden_size, generator=generator).requires_grad_()
    indices = torch.stack([torch.randperm(13, generator=generator)[:4] for _ in range(50)])
    weights = torch.rand(50, 4, generator=generator).requires_grad_()
    along = torch.randn(50, config.hidden_size, generator=generator)
    found = []
    for strategy in (Loop(), Grouped()):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = strategy(experts, x, indices, weights)
        found.append(
            torch.autograd.grad((y.float() * along).sum(), [x, weights, *experts.parameters()])
        )
    for ours, theirs in zip(*found, strict=True):
        scale = float(theirs.abs().max())
        assert scale > 0.1
        assert (
            float((ours - theirs).abs().max())
            < (atol("amp bf16") if amp else atol("experts fp32")) * scale
        )
    assert not any(grad[13:].any() for grad in found[1][2:]), "no token, no gradient"


# ---------------------------- packing
def test_rows_hold_whole_conversations(tokenizer: Tokenizer) -> None:
    """As `chat_prompt` begins them, to their end; only what the model is to write is a target;
    little is padding.
    """
    tokens, targets = batches(tokenizer, rows=20, length=512)[0]
    direct = examples = 0
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        starts = [i for i, token in enumerate(row) if token == tokenizer.bos_id]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            ids = [token for token in row[start:end] if token != tokenizer.control[PAD]]
            learned = [t for t in target[start:end] if t != IGNORE]
            thinks = learned.count(tokenizer.control[END_THINK]) == 1
            question = tokenizer.decode(ids[2 : ids.index(tokenizer.control[THINK]) - 1])
            prompt = tokenizer.chat_prompt([{"role": "user", "content": question}], think=thinks)
            assert ids == prompt + learned and learned[-1] == tokenizer.eos_id
            examples, direct = examples + 1, direct + (not thinks)
    assert 0.02 < direct / examples < 0.25
    assert float((tokens == tokenizer.control[PAD]).float().mean()) < 0.1


def test_batches_follow_from_seed_and_number(tokenizer: Tokenizer) -> None:
    one, again, other, reseeded = (
        batches(tokenizer, seed=seed)[number][0]
        for seed, number in ((1, 5), (1, 5), (1, 6), (2, 5))
    )
    assert (
        torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, reseeded)
    )
    with pytest.raises(
        InputError, match="rows of 297 tokens can't hold the longest examples: take at least 298"
    ):
        batches(tokenizer, length=297)
    longest = max(
        (phrase(problem, random.Random(0)) for problem in exam(200)),
        key=lambda example: example.size,
    )
    assert sum(map(len, encode(tokenizer, longest))) == longest.size + 10


def test_packed_examples_do_not_see_one_another(tokenizer: Tokenizer) -> None:
    """A packed row's hidden states are those of its examples alone, at position 0."""
    trainer = trainer_of(tokenizer)
    uncounted(trainer)
    tokens = batches(tokenizer)[0][0][:1].long()
    positions, mask = layout(tokens, tokenizer.bos_id or 0)
    with torch.no_grad():
        step = trainer.model.step("prefill", positions, 0)
        packed = trainer.model(tokens, replace(step, starts_rows=False, mask=mask))
        starts = [i for i, token in enumerate(tokens[0].tolist()) if token == tokenizer.bos_id]
        assert len(starts) > 1 and positions[0, starts].eq(0).all()
        for start, end in pairwise([*starts, tokens.shape[1]]):
            alone = trainer.model(
                tokens[:, start:end],
                trainer.model.step("prefill", torch.arange(end - start)[None], 0),
            )
            assert torch.allclose(packed[:, start:end], alone, atol=1e-4)


def test_shift() -> None:
    assert shift(torch.tensor([[1, 2, 3]]), 2, IGNORE).tolist() == [[3, IGNORE, IGNORE]]


# ---------------------------- balance
def test_bias_moves_against_the_load(tokenizer: Tokenizer) -> None:
    """Up where an expert was given less than its share, down where more; padding doesn't count."""
    trainer = trainer_of(tokenizer)
    layer, counted = trainer.balance.layers[0]
    bias = layer.gate.e_score_correction_bias
    bias.zero_()
    x = torch.randn(SMALL.rows * SMALL.length, 160)
    indices = torch.tensor([0, 1, 2, 3]).expand(x.shape[0], 4).clone()
    counted.real.fill_(True)
    counted.real[:100] = False
    indices[:100] = torch.tensor([8, 9, 10, 11])
    counted(layer.experts, x, indices, torch.ones(x.shape[0], 4))
    assert counted.load[:4].eq(x.shape[0] - 100).all() and not counted.load[4:].any()
    trainer.balance.step(0.01)
    assert torch.allclose(bias[:4], torch.tensor(-0.01)) and torch.allclose(
        bias[4:], torch.tensor(0.01)
    )
    assert not counted.load.any(), "each step counts anew"
    assert trainer.balance.read()[0].tolist() == [4.0] * 4 + [0.0] * 12


def test_balance_evens_a_skewed_router(tokenizer: Tokenizer) -> None:
    """Inputs with a common direction send most tokens to few experts; some steps of the bias even
    that out.
    """
    trainer = trainer_of(tokenizer)
    layer, counted = trainer.balance.layers[0]
    layer.gate.e_score_correction_bias.zero_()
    counted.real.fill_(True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SMALL.rows * SMALL.length, 160, generator=generator) + 2 * torch.randn(
        160, generator=generator
    )
    loads = []
    with torch.no_grad():
        for _ in range(100):
            indices, weights = layer.gate(x)
            counted(layer.experts, x, indices, weights)
            loads.append(counted.load / counted.load.mean())
            trainer.balance.step(0.02)
    assert float(loads[0].max()) > 3 and float(loads[0].min()) < 0.1
    late = torch.stack(loads[-10:]).mean(dim=0)  # steps of one size swing about the goal
    assert float(late.max()) < 1.5 and float(late.min()) > 0.5


# ---------------------------- Muon and the schedule
@pytest.mark.parametrize("size", [(3, 24, 16), (3, 16, 24), (1, 16, 16)])
def test_muon_evens_singular_values(size: tuple[int, int, int]) -> None:
    matrices = torch.randn(size, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.logspace(0, 1, size[-1])
    )
    found = torch.linalg.svdvals(orthogonal(matrices))
    assert float(found.max()) < 1.3 and float(found[..., : min(size[1:]) // 2].min()) > 0.6
    assert float(torch.linalg.svdvals(matrices).max()) > 10, "they were far from even"


def test_muon_takes_stacks_as_matrices() -> None:
    """A stack of experts moves as each of them would alone."""
    weights = torch.randn(4, 12, 8, generator=torch.Generator().manual_seed(0))
    together, alone = nn.Parameter(weights.clone()), [nn.Parameter(w.clone()) for w in weights]
    together.grad = weights.sin()
    for parameter, w in zip(alone, weights, strict=True):
        parameter.grad = w.sin()
    Muon([together], weight_decay=0.1).step(0.1)
    Muon(alone, weight_decay=0.1).step(0.1)
    assert torch.allclose(together, torch.stack(list(alone)), atol=1e-6)
    moved = weights * (1 - 0.1 * 0.1) - together.detach()
    assert float((moved * weights.sin()).sum()) > 0, "against the gradient"
    entry = (
        0.2 * 12**0.5 * (8 / (12 * 8)) ** 0.5
    )  # 8 singular values near 1 in 96 entries, scaled to Adam's size
    assert 0.5 < float(moved.square().mean().sqrt()) / (0.1 * entry) < 1.5


@pytest.mark.parametrize("size", [(64, 4), (4, 64), (16, 16)])
def test_muon_moves_entries_as_far_as_adam(size: tuple[int, int]) -> None:
    """Typically by 0.2 of the learning rate, however flat the matrix is."""
    weight = nn.Parameter(torch.zeros(size))
    weight.grad = torch.randn(size, generator=torch.Generator().manual_seed(0))
    Muon([weight]).step(0.1)
    assert 0.6 < float(weight.detach().square().mean().sqrt()) / (0.2 * 0.1) < 1.3


def test_muon_remembers_and_looks_ahead() -> None:
    """The second update is of 0.05 of its gradient and 0.95 of the average, which is itself 0.05 of
    the second gradient and 0.95 x 0.05 of the first one.
    """
    first, second = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(torch.zeros(8, 8))
    muon = Muon([weight], momentum=0.95)
    for gradient in (first, second):
        before = weight.detach().clone()
        weight.grad = gradient
        muon.step(1.0)
    average = 0.05 * second + 0.95 * 0.05 * first
    wanted = orthogonal((0.05 * second + 0.95 * average)[None])[0] * -0.2 * 8**0.5
    torch.testing.assert_close(weight.detach() - before, wanted, atol=1e-5, rtol=0)


def test_kinds_are_drawn_by_their_weights(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "draw", lambda _rng, _split, kind: kind)
    monkeypatch.setattr(packing, "phrase", lambda kind, _rng: kind)
    monkeypatch.setattr(packing, "encode", lambda _tokenizer, kind, think: kind)
    rng, data = random.Random(0), batches(tokenizer, kinds=tuple(KINDS))
    drawn: list[Any] = [data.example(rng) for _ in range(4000)]
    total = sum(KINDS.values())
    for kind, weight in KINDS.items():
        assert abs(drawn.count(kind) / 4000 - weight / total) < 0.03, kind


@pytest.mark.parametrize(("done", "mtp_weight"), [(0, 0.3), (9, 0.3), (15, 0.1)])
def test_a_step_follows_the_schedule(
    done: int, mtp_weight: float, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both optimizers and the gate's bias take its rate; the MTP loss counts 0.3, then 0.1; the
    gradient is cut to a length of 1.
    """
    trainer = trainer_of(tokenizer)
    trainer.step = done
    gain: Any = trainer.model.norm.weight
    mtp = torch.tensor(1.0, requires_grad=True)
    seen: dict[str, float] = {}
    monkeypatch.setattr(trainer, "losses", lambda *_: (1e6 * gain.sum(), mtp))
    monkeypatch.setattr(trainer.muon, "step", lambda lr: seen.update(muon=lr))
    monkeypatch.setattr(trainer.balance, "step", lambda speed: seen.update(bias=speed))

    def adam() -> None:
        seen.update(adam=trainer.adam.param_groups[0]["lr"], length=float(gain.grad.norm()))

    monkeypatch.setattr(trainer.adam, "step", adam)
    trainer.train_step((torch.zeros(1), torch.zeros(1)))
    rate = 5e-3 * (done + 1) / 50  # the first steps of any run
    assert seen == pytest.approx({"muon": rate, "adam": rate, "bias": rate, "length": 1.0})
    assert mtp.grad is not None and float(mtp.grad) == pytest.approx(mtp_weight)


def test_padding_counts_for_no_expert(tokenizer: Tokenizer) -> None:
    trainer = trainer_of(tokenizer)
    tokens, targets = (part.long() for part in batches(tokenizer)[0])
    trainer.losses(tokens, targets)
    real = tokens != tokenizer.control[PAD]
    assert torch.equal(trainer.balance.real, real.flatten()) and not bool(real.all())
    chosen = trainer.model.config.experts.num_experts_per_tok
    assert all(float(c.load.sum()) == chosen * int(real.sum()) for _, c in trainer.balance.layers)


def test_schedule() -> None:
    rates = [schedule(step, step / 1000) for step in range(1001)]
    assert rates[0] == 1 / 50 and rates[49:501] == [1.0] * 452 and rates[1000] == 0
    assert all(a > b for a, b in pairwise(rates[500:]))


# ---------------------------- rounding
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-30, 0.0])
def test_rounding_of_weights_of_any_size(size: float) -> None:
    weight = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0)) * size
    for one, rounded in zip(weight, round_blocks(weight, (16, 16)), strict=True):
        back = torch.empty_like(one)
        fp8.dequantize(*fp8.quantize(one, (16, 16)), (16, 16), out=back)
        assert torch.equal(rounded, back)


def test_rounding_is_what_the_checkpoint_will_have(tokenizer: Tokenizer) -> None:
    """Inside, exactly what a load gives back; outside, the weights bit for bit as they were; the
    gradient moves them.
    """
    trainer = trainer_of(tokenizer, replace(SMALL, fp8_from=0.0))
    before = {name: tensor.clone() for name, tensor in places(trainer.model).items()}
    with trainer.rounding.applied():
        for name, tensor in places(trainer.model).items():
            rounded = is_projection(name)
            assert torch.equal(
                tensor, as_stored(name, before[name]) if rounded else before[name]
            ), name
            assert torch.equal(tensor, before[name]) != rounded, name
    after = places(trainer.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    exact = trainer_of(tokenizer)
    batch = batches(tokenizer)[0]
    assert float(exact.train_step(batch)[0]) != float(trainer.train_step(batch)[0]), (
        "the loss is the rounded model's"
    )
    assert all(
        not torch.equal(after[name], tensor)
        for name, tensor in before.items()
        if is_projection(name)
    )


def as_stored(name: str, tensor: Tensor) -> Tensor:
    """fp32 -> what comes back from a"""
    if not is_projection(name):
        return tensor if name.endswith("bias") else tensor.bfloat16().float()
    back = torch.empty_like(tensor)
    fp8.dequantize(*fp8.quantize(tensor, (128, 128)), (128, 128), out=back)
    return back


# ---------------------------- runs
def test_twenty_steps_lower_the_loss(trained: tuple[Trainer, Path], tokenizer: Tokenizer) -> None:
    trainer, _ = trained
    tokens, targets = (part.long() for part in batches(tokenizer, kinds=SMALL.kinds)[10**6])
    with torch.no_grad():
        before, after = (
            torch.stack(t.losses(tokens, targets)) for t in (trainer_of(tokenizer), trainer)
        )
    assert (before > 5).all(), "a random model knows nothing"
    assert (after < 0.8 * before).all(), "neither the model's nor the MTP layer's loss may stay"
    assert trainer.step == 20 and trainer.history[-1]["step"] == 20


def test_resumed_is_uninterrupted_bit_for_bit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    settings = replace(SMALL, steps=4)
    whole, first, second = (trainer_of(tokenizer, settings) for _ in range(3))
    whole.run(workers=0)
    data = Batches(
        tokenizer,
        settings.rows,
        settings.length,
        seed=0,
        direct=settings.direct,
        kinds=settings.kinds,
    )
    for number in range(2):
        first.train_step(data[number])
    first.save_state(state)
    second.load_state(state)
    assert second.step == 2
    second.run(workers=0, state=state)
    assert [path.name for path in tmp_path.iterdir()] == [state.name]
    ours, theirs = second.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    with pytest.raises(
        InputError, match="is of a run with another lr: use its settings, or remove it"
    ):
        trainer_of(tokenizer, replace(settings, lr=1.0)).load_state(state)
    state.write_bytes(b"no state")
    with pytest.raises(InputError, match="is no state of a run"):
        second.load_state(state)


def test_the_checkpoint_is_the_model_but_for_fp8(trained: tuple[Trainer, Path]) -> None:
    """Projections come back as their FP8 blocks have them, all else as bf16 has it, and the logits
    hardly differ.
    """
    trainer, folder = trained
    engine = r1.load(folder, Backend(device="cpu"), mtp=True, quiet=True)
    ours, theirs = places(trainer.model), places(engine.model)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], as_stored(name, tensor)), name
    assert all(tensor.any() for name, tensor in ours.items() if name.endswith("bias")), (
        "the gate's bias has moved"
    )
    assert engine.tokenizer is not None
    example = phrase(exam(1)[0], random.Random(0))
    tokens = torch.tensor([encode(engine.tokenizer, example)[0]])
    uncounted(trainer)
    with torch.no_grad():
        hidden = trainer.model(
            tokens, trainer.model.step("prefill", torch.arange(tokens.shape[1])[None], 0)
        )
        gap = (trainer.model.lm_head(hidden) - engine.logits(tokens)).abs().mean()
    assert 0 < float(gap) < 0.1 * float(engine.logits(tokens).std())
    assert (
        (folder / "tokenizer.json").is_file()
        and engine.tokenizer is not None
        and (folder / "exam.json").is_file()
    )


def test_the_card_says_what_was_measured(trained: tuple[Trainer, Path]) -> None:
    trainer, folder = trained
    record = json.loads((folder / "training.json").read_text())
    page = (folder / "README.md").read_text()
    assert (
        record["steps"] == 20
        and record["figures"]["problems"] == 4
        and len(record["history"]) == len(trainer.history)
    )
    assert f"{record['history'][-1]['loss']:.4f} nats a token" in page
    assert f"perplexity {record['figures']['perplexity']:.4f}" in page.lower()
    assert (
        "fact 18%, add 82%" in page and "`python tools/train/train_tiny.py DIR --steps 20" in page
    )
    assert page.count("\n| 0 |") == 1 and page.count("\n| 1 |") == 1, (
        "a line for each MoE layer, the MTP layer's too"
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "how long? give either --steps or --minutes"),
        (["--steps", "1", "--minutes", "1"], "how long? give either --steps or --minutes"),
        (["--steps", "1", "--layers", "9"], "tiny has"),
        (["--steps", "1", "--device", "cuda"], "--device cuda"),
        (["--steps", "1", "--length", "100"], "rows of 100 tokens can't hold"),
    ],
)
def test_bad_input_is_one_sentence(
    flags: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Machine, "here", lambda: Machine())  # one without a GPU
    assert train_tiny.main([str(tmp_path / "new"), *flags]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("train_tiny: ") and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_no_folder_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_tiny.main([str(tmp_path), "--steps", "1"]) == 2
    assert "exists already: name a new folder" in capsys.readouterr().err


# ---------------------------- tools/train/eval.py
def test_accuracy_counts_right_answers_that_end(trained: tuple[Trainer, Path]) -> None:
    engine = r1.load(trained[1], Backend(device="cpu"), quiet=True)
    assert engine.tokenizer is not None
    problems = exam(40)
    for think in (True, False):
        pairs = [
            encode(engine.tokenizer, phrase(problem, random.Random(0)), think)
            for problem in problems
        ]
        assert examination.accuracy(engine, problems, pairs, think) == dict.fromkeys(
            ["all", "add", "sub", "mul", "expr"], 1.0
        )
        cut = [(prompt, written[:-1]) for prompt, written in pairs]
        assert examination.accuracy(engine, problems, cut, think)["all"] == 0, (
            "an answer that never ended"
        )
        rotated = [*pairs[4:], *pairs[:4]]
        assert examination.accuracy(engine, problems, rotated, think)["all"] < 0.1, (
            "another problem's answer"
        )


class Foresight(nn.Module):
    """In the MTP layer's place: the model's own hidden state, `by` tokens on."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, embedding: Tensor, hidden: Tensor, step: Any) -> Tensor:
        return hidden.roll(-self.by, dims=1)


def test_reading(trained: tuple[Trainer, Path]) -> None:
    """A model that says nothing has a perplexity of its vocabulary; every token visits K experts;
    drafts meet their tokens.
    """
    engine = r1.load(trained[1], Backend(device="cpu"), mtp=True, quiet=True)
    assert engine.tokenizer is not None
    pairs = [encode(engine.tokenizer, phrase(problem, random.Random(0))) for problem in exam(6)]
    reading = examination.read(engine, pairs, batch=4)
    tokens = sum(len(prompt) + len(written) for prompt, written in pairs)
    assert reading.loads.shape == (2, 16) and reading.loads.sum(dim=1).tolist() == [4 * tokens] * 2
    assert reading.tokens == reading.drafts == sum(len(written) for _, written in pairs)
    assert reading.perplexity < 250
    for by, agrees in ((1, True), (0, False)):
        engine.model.mtp[0] = Foresight(by)
        reading = examination.read(engine, pairs, batch=4)
        assert (reading.agreed == reading.drafts) == agrees
    engine.model.lm_head.matrix.dense().zero_()
    assert examination.read(engine, pairs, batch=4).perplexity == pytest.approx(320)


def test_speculation_of_all_answers_together() -> None:
    """Tokens after the first, by all steps: 3 + 5 in 2 + 2; 4 of 8 drafts."""
    one, other = Completion([1] * 4, "stop", 1, 0, 0), Completion([1] * 6, "stop", 1, 0, 0)
    assert examination.speculation([one, other]) is None
    one.steps, one.drafted, one.accepted = 2, 4, 1
    other.steps, other.drafted, other.accepted = 2, 4, 3
    assert examination.speculation([one, other]) == {"acceptance": 0.5, "tokens_per_step": 2.0}


def test_what_is_examined_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def examine(_engine: r1.Engine, count: int, **named: Any) -> Any:
        asked.append((count, named["seed"], list(named["kinds"]), named["batch"]))
        raise InputError("enough: it was asked")

    monkeypatch.setattr(examination, "examine", examine)
    flags = ["-n", "3", "--seed", "5", "--batch", "2"]
    assert examination.main([*flags, "--kinds", "mul", "--device", "cpu"]) == 2
    assert asked == [(3, 5, ["mul"], 2)]


def test_eval_command(
    trained: tuple[Trainer, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(trained[1]), "-n", "2", "--kinds", "mul", "--device", "cpu"]
    assert examination.main([*flags, "-o", str(tmp_path / "out.json")]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["backend"]["device"] == "cpu" and figures["accuracy"].keys() == {"all", "mul"}
    assert "accuracy, with thinking" in capsys.readouterr().out
    assert examination.main([*flags[:2], "-n", "0"]) == 2
    assert "give at least 1" in capsys.readouterr().err
