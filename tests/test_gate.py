"""The parity gate: its arithmetic, each number by its definition; that it looks at every position;
and mistakes that it must find, each planted into a model.

Holds r1/bench/parity.py and r1/bench/worker/reading.py, rounding.py and reference.py to account.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import ROOT
from torch import Tensor, nn

from r1 import Backend
from r1.bench import parity
from r1.bench.arms import TEXTBOOK
from r1.bench.parity import Bound, Parity, Rounding
from r1.bench.process import Answer
from r1.bench.worker import reading, rounding, steps
from r1.bench.worker.serve import COMMANDS
from r1.bench.worker.subject import Subject
from r1.bench.workload import Workload
from r1.model.mla import MLA
from r1.model.moe import MoE
from r1.model.router import Router
from r1.run import speculate

Patch = pytest.MonkeyPatch
ANY = Bound()
W = 7


def kl(right: Tensor, ours: Tensor) -> float:
    """How surprised a reader of `right`'s tokens is who expects `ours`: sum of p log(p / q)."""
    p, q = right.double().softmax(-1).tolist(), ours.double().softmax(-1).tolist()
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def some(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def middle(numbers: list[float]) -> float:
    ordered, half = sorted(numbers), len(numbers) // 2
    return (ordered[half] + ordered[~half]) / 2


# ---------------------------- arithmetic
def test_compare_by_definition() -> None:
    """20 steps of 2 rows: KL from the reference to us, over all forty."""
    right, ours, usual = some(20, 2, W), some(20, 2, W, seed=1), some(20, 2, seed=2).abs()
    most = torch.full((20, 2), 0.5, dtype=torch.float64)
    most[3, 1] = 1e9  # so it may be far off
    allowed = Bound(0.25, 0.5, usual, 3.0, 4.0, most, 0.1)
    found = parity.compare(list(ours), right, allowed)
    places = list(itertools.product(range(20), range(2)))
    each = {(m, b): kl(right[m, b], ours[m, b]) for m, b in places}
    other_way = [kl(ours[m, b], right[m, b]) for m, b in places]
    assert found.mean_kl == pytest.approx(sum(each.values()) / 40, rel=1e-9)
    assert found.median_kl == pytest.approx(middle(list(each.values())), rel=1e-9)
    assert abs(sum(each.values()) - sum(other_way)) > 0.1  # so the direction shows
    excess = {place: each[place] / float(usual[place]) for place in places}
    late = middle([excess[m, b] for m, b in places if m >= 4])  # the last 16 steps
    assert found.excess == pytest.approx(max(middle(list(excess.values())) / 3, late / 4))
    far = {place for place in places if each[place] > 0.5}
    assert (3, 1) in far and found.outliers == len(far) - 1
    assert found.max_logit_difference == float((ours - right).abs().max())
    same = (ours.argmax(-1) == right.argmax(-1)).sum().item()
    assert 0 < same < 40 and found.top1_agreement == same / 40
    bounds = (found.positions, found.bound, found.mean_bound, found.outliers_bound)
    assert bounds == (40, 0.25, 0.5, 2)


def test_the_worse_of_all_steps_and_the_late_ones_counts() -> None:
    """128 steps, of which 32 are late: a distance there, or before them."""
    for far in (slice(96, 128), slice(0, 96)):
        right = some(128, 1, W)
        ours = right.clone()
        ours[far, :, 0] += 1
        found = parity.compare(list(ours), right, dataclasses.replace(ANY, late_excess=1e-3))
        assert (found.excess > 1) is (far.start == 96)
        found = parity.compare(list(ours), right, dataclasses.replace(ANY, excess=1e-3))
        assert (found.excess > 1) is (far.start == 0)


def test_compare_wants_each_position() -> None:
    right = some(5, 2, W)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        parity.compare(list(right[:4]), right, ANY)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 40, 63])
def test_one_value_that_is_no_number_fails(value: float, place: int) -> None:
    right = some(64, 1, W)
    ours = right.clone()
    ours[place, 0, 3] = value
    found = parity.compare(list(ours), right, ANY)
    assert not found.passes and found.max_logit_difference > 1e30


@pytest.mark.parametrize(
    ("median", "mean", "excess", "outliers", "passes"),
    [
        (1.0, 2.0, 1.0, 3, True),
        (1.0 + 1e-9, 2.0, 1.0, 3, False),
        (1.0, 2.0 + 1e-9, 1.0, 3, False),
        (1.0, 2.0, 1.0 + 1e-9, 3, False),
        (1.0, 2.0, 1.0, 4, False),
        (math.nan, 0.0, 0.0, 0, False),
        (0.0, math.nan, 0.0, 0, False),
        (0.0, 0.0, math.nan, 0, False),
    ],
)
def test_all_bounds_hold(
    median: float, mean: float, excess: float, outliers: int, passes: bool
) -> None:
    found = Parity(
        mean, median, excess, 0.0, 1.0, 1, outliers, bound=1.0, mean_bound=2.0, outliers_bound=3
    )
    assert found.passes is passes


def test_fp32_has_fixed_bounds() -> None:
    found = parity.bound(Backend(dtype="fp32"), {})
    assert found == Bound(1e-9, 1e-9, 1e-9, 1.0, 1.0, math.inf, 1e-3)


@pytest.mark.parametrize(
    ("backend", "switch"),
    [
        (Backend(dtype="bf16"), "dtype=bf16"),
        (Backend(dtype="fp32", amp="bf16"), "amp=bf16"),
        (Backend(dtype="fp16"), "dtype=fp16"),
    ],
)
def test_bounds_are_the_runs(backend: Backend, switch: str) -> None:
    """3 runs of 40 steps of 1 row, of this switch and not of the others."""
    runs = 1e-3 * some(3, 40, 1, seed=5).double().abs()
    runs[2, 39] = 1.0  # one jump
    others = dict.fromkeys(("dtype=bf16", "amp=bf16", "dtype=fp16"), Rounding(runs * 0, 0.0))
    found = parity.bound(backend, others | {switch: Rounding(runs, 0.25)})
    lists = [run.flatten().tolist() for run in runs]
    by_place = list(zip(*lists, strict=True))
    assert found.median_kl == pytest.approx(1e-9 + 2 * max(map(middle, lists)))
    assert found.mean_kl == pytest.approx(1e-9 + 4 * max(sum(each) / 40 for each in lists))
    usual = [math.prod(k + 1e-12 for k in each) ** (1 / 3) for each in by_place]
    assert isinstance(found.usual_kl, Tensor) and isinstance(found.outlier_kl, Tensor)
    assert found.usual_kl.flatten().tolist() == pytest.approx(usual)
    excess = [[k / u for k, u in zip(each, usual, strict=True)] for each in lists]
    assert found.excess == pytest.approx(1.25 * (1 + 4 / 40) * max(map(middle, excess)))
    late = [middle(each[-16:]) for each in excess]
    assert found.late_excess == pytest.approx(1.25 * (1 + 4 / 16) * max(late))
    assert max(late) != max(map(middle, excess))
    largest = [max(each) for each in by_place]
    wanted = [1e-9 + 4 * max(k, middle(largest)) for k in largest]
    assert found.outlier_kl.flatten().tolist() == pytest.approx(wanted)
    assert found.tie == pytest.approx(0.251)


def test_a_run_that_is_no_number_lets_nothing_pass() -> None:
    """fp16 may end before this model's values do, in one run and not in the next."""
    runs = torch.ones(3, 40, 1, dtype=torch.float64)
    runs[1, 7] = math.nan
    allowed = parity.bound(Backend(dtype="fp16"), {"dtype=fp16": Rounding(runs, 0.0)})
    right = some(40, 1, W)
    assert not parity.compare(list(right), right, allowed).passes


@pytest.mark.parametrize(
    ("positions", "wanted"),
    [(1, 1), (31, 1), (32, 2), (64, 4), (128, 4), (199, 4), (200, 5), (1024, 9)],
)
def test_how_many_outliers_pass(positions: int, wanted: int) -> None:
    assert parity.outliers_bound(positions) == wanted


def test_a_jump_that_a_run_makes_too_is_no_error() -> None:
    """Experts flipped by a near tie. Other jumps are outliers, of which a few may pass."""
    right = some(128, 1, W)

    def disturbed(seed: int, *jumps: int) -> Tensor:
        size = torch.full((128, 1, 1), 0.01)
        size[list(jumps)] = 0.5
        return right + size * some(128, 1, W, seed=seed)

    jumps = (10, 50, 90)
    runs = [disturbed(9), disturbed(1, *jumps), *map(disturbed, range(2, 9))]
    made = Rounding(torch.stack([parity.divergence(right, run) for run in runs]), 0.0)
    allowed = parity.bound(Backend(dtype="bf16"), {"dtype=bf16": made})
    few, many = (11, 31, 51, 71), (11, 31, 51, 71, 91)
    arms = {places: list(disturbed(20, *places)) for places in (jumps, few, many)}
    found = {places: parity.compare(arm, right, allowed) for places, arm in arms.items()}
    assert [(each.outliers, each.passes) for each in found.values()] == [
        (0, True), (4, True), (5, False)
    ]  # fmt: skip
    last = found[many]
    assert last.excess <= 1 and last.mean_kl <= last.mean_bound
    strict = parity.bound(Backend(dtype="fp32"), {})
    assert parity.compare(list(right), right, strict).passes
    assert not parity.compare(list(disturbed(20)), right, strict).passes  # no rounding of fp32


# ---------------------------- which positions
@pytest.mark.parametrize(
    ("batch", "new", "vocab_size", "rows", "early", "last"),
    [
        (1, 128, 163840, 1, 128, 0),
        (1, 63, 163840, 1, 63, 0),
        (1, 1000, 163840, 1, 96, 32),
        (32, 128, 163840, 6, 128, 0),  # 0.503 of 0.512 GB
        (32, 2, 163840, 32, 2, 0),
        (4, 1000, 100, 4, 96, 32),
        (1, 129, 100, 1, 96, 32),
        (1, 64, 10**7, 1, 9, 3),
        (1, 1, 100, 1, 1, 0),
        (1, 5, 2 * 10**8, 1, 1, 0),
    ],
)
def test_steps(batch: int, new: int, vocab_size: int, rows: int, early: int, last: int) -> None:
    wanted = [*range(early), *range(new - last, new)]
    assert parity.rows_and_steps(batch, new, vocab_size) == (rows, wanted)
    nbytes = 4 * vocab_size * rows * len(wanted)
    assert nbytes <= parity.LOGITS_BYTES or len(wanted) == 1


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_every_position_is_read(width: int, rows: int, monkeypatch: Patch) -> None:
    """64 steps of 2 rows, of which `rows` and the first 20 and last 12 are compared: one wrong
    logit at each place in turn, which the arm's own steps give, shows.

    The arm reads the reference's text in order, `width` tokens a step.
    """
    truth, text = some(70, 2, W), torch.arange(128).view(64, 2)
    compared = [*range(20), *range(52, 64)]
    read: list[Tensor] = []
    wrong: list[int] = []  # the positions at which the arm is wrong

    def at(position: int) -> Tensor:
        found = truth[position].clone()  # (2, W)
        if position in wrong:
            found[rows - 1, 0] += 1
        return found

    def decode(_subject: Any, tokens: Tensor) -> Tensor:
        assert tokens.shape == (2, width)
        start = sum(each.shape[1] for each in read) + 1
        read.append(tokens)
        return torch.stack([at(start + i) for i in range(width)], dim=1)

    monkeypatch.setattr(steps, "prefill", lambda _subject: at(0))
    monkeypatch.setattr(steps, "decode", decode)
    subject: Any = SimpleNamespace(
        device="cpu", engine=SimpleNamespace(backend=SimpleNamespace(step_tokens=width))
    )
    reference = {
        "tokens": text, "steps": torch.tensor(compared), "logits": truth[compared][:, :rows]
    }  # fmt: skip
    found = reading.compare_text(subject, reference, ANY)
    assert found.mean_kl < 1e-15 and found.positions == 32 * rows
    assert torch.equal(torch.cat(read, dim=1)[:, :63], text[:63].T)
    for position in range(64):
        wrong[:] = [position]
        read.clear()
        off = reading.compare_text(subject, reference, ANY)
        assert (off.mean_kl > 1e-6) is (position in compared)
        if position in compared:
            assert off.max_logit_difference == pytest.approx(1, abs=1e-5)


def test_wrong_tokens_by_definition(monkeypatch: Patch) -> None:
    """A token is wrong if another one's logit is larger by more than a tie, or is no number."""
    best = torch.tensor([[3, 1], [0, 0], [6, 2], [5, 5]])  # (N, B)
    logits = nn.functional.one_hot(best, W).float()  # leads of 1
    text = best.clone()
    monkeypatch.setattr(reading, "read", lambda _subject, _text: iter(logits))
    subject: Any = None
    assert reading.wrong_tokens(subject, text, 0.5) == 0
    text[1, 1], text[3, 0] = 4, 4
    assert reading.wrong_tokens(subject, text, 0.5) == 2
    assert reading.wrong_tokens(subject, text, 1.0) == 0  # a near tie
    logits[0, 0, 6] = math.nan
    assert reading.wrong_tokens(subject, text, 1.0) == 1


# ---------------------------- the reference's runs
@pytest.mark.parametrize("together", [parity.RUNS, 5, 1])
def test_runs_differ_and_leave_no_noise_behind(
    together: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Each run has its own noise, and reads the rows that are compared. Afterwards the model is as
    it was, with these rows once for each run of a batch.
    """
    monkeypatch.setattr(rounding, "BATCH_TOKENS", together * 2 * (6 + 20 + 4))
    work = Workload(None, "tiny", 2, 3, 6, 20, 4, 0)
    subject = Subject(Backend(device="cpu", dtype="fp32", **TEXTBOOK), work, tmp_path)
    subject.build()
    COMMANDS["reference"](subject, [])
    before = steps.prefill(subject).clone()
    reference = reading.load_file(tmp_path / reading.REFERENCE)
    reference["logits"] = reference["logits"][:, :2]  # as if more did not fit
    found = {each: rounding.measure_rounding(subject, f"{each}=bf16", reference) for each in
             ("amp", "dtype")}  # fmt: skip
    again = steps.prefill(subject).unflatten(0, (-1, 2))
    assert len(again) == together
    assert torch.allclose(again, before[:2].expand_as(again), atol=1e-5)
    for each in found.values():
        assert each.kl.shape == (parity.RUNS, 20, 2) and each.kl.dtype == torch.float64
        assert each.kl[:, 5].unique(dim=0).shape[0] == parity.RUNS
        assert 1e-9 < each.kl.median() < 1e-3 and 0 <= each.tie < 1
    assert found["amp"].kl.median() < found["dtype"].kl.median()


# ---------------------------- mistakes
ROUNDED: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "amp": {"dtype": "fp32", "amp": "bf16"},
    "bf16": {"dtype": "bf16"},
}
ROUNDS = ["amp=bf16", "dtype=bf16"]
Plant = Callable[[Subject], object]
Hook = Callable[..., Any]


def hook(subject: Subject, kind: type[nn.Module], change: Hook) -> None:
    """Put `change(module, inputs, output)` in place of the output of every module of a kind."""
    for module in subject.engine.model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(change)


def off_scale(subject: Subject) -> None:
    """The softmax scale is 5% too large."""
    for module in subject.engine.model.modules():
        if isinstance(module, MLA):
            module.scale *= 1.05


def no_shared_expert(subject: Subject) -> None:
    for module in subject.engine.model.modules():
        if isinstance(module, MoE):
            module.shared_experts = None


def late_attention(subject: Subject) -> None:
    """From the 65th new token on, a tenth of what attention gives is missing."""
    start = subject.workload.prompt + 64

    def change(_module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.where((inputs[1].positions >= start)[..., None], 0.9 * output, output)

    hook(subject, MLA, change)


def rarely_wrong_experts(subject: Subject) -> None:
    """In 1% of the calls each chosen expert is the one after the right one."""
    calls = itertools.count(1)
    experts = subject.engine.config.experts.n_routed_experts

    def change(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> Any:
        indices, weights = output
        return ((indices + 1) % experts, weights) if next(calls) % 97 == 0 else None

    hook(subject, Router, change)


MISTAKES: list[Plant] = [off_scale, no_shared_expert, late_attention, rarely_wrong_experts]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference of `LONG` and what rounding does to it."""
    folder = tmp_path_factory.mktemp("reference")
    COMMANDS["reference"](built(LONG, folder, dtype="fp32", **TEXTBOOK), ROUNDS)
    return folder


TINY = str(ROOT / "weights" / "tiny-r1")
LONG = Workload(TINY, None, None, 3, 24, 80, 0, 0)
"""Longer than 64 steps."""


def built(work: Workload, folder: Path, **switches: Any) -> Subject:
    subject = Subject(Backend(device="cpu", **switches), work, folder)
    subject.build()
    return subject


@pytest.mark.parametrize("how", ROUNDED)
def test_what_is_right_passes(how: str, texts: Path) -> None:
    found = COMMANDS["parity"](built(LONG, texts, **ROUNDED[how]))
    assert found["passes"] and found["positions"] == 240 and found["wrong_tokens"] is None


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("how", ROUNDED)
def test_a_mistake_fails(how: str, mistake: Plant, texts: Path) -> None:
    subject = built(LONG, texts, **ROUNDED[how])
    mistake(subject)
    assert not COMMANDS["parity"](subject)["passes"]


# ---------------------------- mistakes of speculation
Judge = Callable[..., tuple[Tensor, Tensor]]
RIGHT: Judge = speculate.judge


def accept_all(p: Tensor, q: Tensor, drafts: Tensor, uniform: Tensor, *_: Any) -> Any:
    """Accept every draft, whatever the model says."""
    return RIGHT(p, q, drafts, uniform, 2.0)


def accept_seldom(p: Tensor, q: Tensor, drafts: Tensor, uniform: Tensor, *_: Any) -> Any:
    """Accept wrong drafts in one turn of eight."""
    turn = next(TURNS)
    return RIGHT(p, q, drafts, uniform, 2.0 if turn % 8 == 0 else None)


def token_7(p: Tensor, *others: Any) -> Any:
    """Write token 7 behind the accepted drafts."""
    accepted, rest = RIGHT(p, *others)
    return accepted, nn.functional.one_hot(torch.full((len(p),), 7), p.shape[2]).to(rest.dtype)


def one_fewer(p: Tensor, *others: Any) -> Any:
    """Write the token after the drafts one place too early, over a draft that was right."""
    accepted, rest = RIGHT(p, *others)
    return (accepted - 1).clamp(min=0), rest


TURNS: Iterator[int] = itertools.count(1)
SHORT = dataclasses.replace(LONG, batch=2, new=32)


@pytest.fixture(scope="module")
def short_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    COMMANDS["reference"](built(SHORT, folder, dtype="fp32", **TEXTBOOK), ROUNDS)
    return folder


def judged(how: str, folder: Path, assumed: float | None = None) -> Answer:
    """The verdict on an arm with two drafts a step."""
    work = dataclasses.replace(SHORT, assumed=assumed)
    drafts = {"speculate": "mtp", "draft_tokens": 2}
    return COMMANDS["parity"](built(work, folder, **ROUNDED[how], **drafts))


@pytest.mark.parametrize("assumed", [None, 0.5])
@pytest.mark.parametrize("how", ["fp32", "bf16"])
def test_drafts_accepted_by_the_model_pass(
    how: str, assumed: float | None, short_texts: Path
) -> None:
    """Also where the timed text is written with a coin: the text that is checked is not."""
    found = judged(how, short_texts, assumed)
    assert found["passes"] and found["wrong_tokens"] == 0


@pytest.mark.parametrize("mistake", [accept_all, accept_seldom, token_7, one_fewer])
@pytest.mark.parametrize("how", ["fp32", "bf16"])
def test_a_mistake_of_speculation_fails(
    how: str, mistake: Judge, short_texts: Path, monkeypatch: Patch
) -> None:
    """The logits of a text that is given say nothing of it."""
    monkeypatch.setattr(speculate, "judge", mistake)
    found = judged(how, short_texts, assumed=0.5 if mistake is token_7 else None)
    assert not found["passes"] and found["wrong_tokens"] > 0
    assert found["excess"] <= 1 and found["outliers"] <= found["outliers_bound"]
