"""The parity gate's arithmetic, each number by its definition, and that it looks at every position.

Holds r1/bench/parity.py and r1/bench/worker/reading.py to account. test_bench.py has it judge
models.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from r1 import Backend
from r1.bench import parity
from r1.bench.parity import Bound, Parity
from r1.bench.worker import reading

ANY = Bound(math.inf, math.inf)
W = 7


def kl(right: Tensor, ours: Tensor) -> float:
    """How surprised a reader of `right`'s tokens is who expects `ours`: sum of p log(p / q)."""
    p, q = right.double().softmax(-1).tolist(), ours.double().softmax(-1).tolist()
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def some(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_compare_by_definition() -> None:
    """5 positions of 2 rows: KL from the reference to us, over all ten."""
    right, ours = some(5, 2, W), some(5, 2, W, seed=1)
    found = parity.compare(list(ours), right, Bound(0.25, 0.5))
    each = [kl(right[m, b], ours[m, b]) for m in range(5) for b in range(2)]
    other_way = [kl(ours[m, b], right[m, b]) for m in range(5) for b in range(2)]
    middle = sorted(each)
    assert found.mean_kl == pytest.approx(sum(each) / 10, rel=1e-9)
    assert found.median_kl == pytest.approx((middle[4] + middle[5]) / 2, rel=1e-9)
    assert abs(sum(each) - sum(other_way)) > 0.1  # so the direction shows
    assert found.max_logit_difference == float((ours - right).abs().max())
    same = (ours.argmax(-1) == right.argmax(-1)).sum().item()
    assert 0 < same < 10 and found.top1_agreement == same / 10
    assert (found.positions, found.bound, found.mean_bound) == (10, 0.25, 0.5)


def test_compare_wants_each_position() -> None:
    right = some(5, 2, W)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        parity.compare(list(right[:4]), right, ANY)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_value_that_is_no_number_fails(value: float) -> None:
    right = some(64, 1, W)
    ours = right.clone()
    ours[40, 0, 3] = value
    found = parity.compare(list(ours), right, ANY)
    assert not found.passes and found.max_logit_difference > 1e30


@pytest.mark.parametrize(
    ("median", "mean", "passes"),
    [
        (1.0, 2.0, True),
        (1.0 + 1e-9, 2.0, False),
        (1.0, 2.0 + 1e-9, False),
        (math.nan, 0.0, False),
        (0.0, math.nan, False),
    ],
)
def test_both_bounds_hold(median: float, mean: float, passes: bool) -> None:
    assert Parity(mean, median, 0.0, 1.0, 1, bound=1.0, mean_bound=2.0).passes is passes


def test_bounds() -> None:
    """fp32 has a fixed one; other dtypes 4 and 100 times what rounding alone does to the model."""
    rounding = {"bf16": Bound(1e-3, 2e-3), "fp16": Bound(1e-5, 2e-5)}
    wanted = {
        Backend(dtype="fp32"): (1e-9, 1e-9),
        Backend(dtype="bf16"): (1e-9 + 4e-3, 1e-9 + 0.2),
        Backend(dtype="fp32", amp="bf16"): (1e-9 + 4e-3, 1e-9 + 0.2),
        Backend(dtype="fp16"): (1e-9 + 4e-5, 1e-9 + 2e-3),
    }
    for backend, (median, mean) in wanted.items():
        found = parity.bound(backend, rounding)
        assert (found.median_kl, found.mean_kl) == pytest.approx((median, mean), rel=1e-9)


@pytest.mark.parametrize(
    ("batch", "new", "vocab_size", "wanted"),
    [
        (1, 128, 163840, (1, 64)),
        (1, 63, 163840, (1, 63)),
        (32, 128, 163840, (12, 64)),  # 0.503 of 0.512 GB
        (32, 2, 163840, (32, 2)),
        (4, 1000, 100, (4, 64)),
        (1, 64, 10**7, (1, 12)),
    ],
)
def test_positions(batch: int, new: int, vocab_size: int, wanted: tuple[int, int]) -> None:
    assert parity.rows_and_positions(batch, new, vocab_size) == wanted


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_every_position_is_read(width: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 steps of 2 rows, of which `rows` are kept: one wrong logit at each place in turn, which
    the arm's own steps give, shows.

    The arm reads the reference's text in order, `width` tokens a step.
    """
    truth, text = some(70, 2, W), torch.arange(128).view(64, 2)
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

    monkeypatch.setattr(reading.steps, "prefill", lambda _subject: at(0))
    monkeypatch.setattr(reading.steps, "decode", decode)
    subject: Any = SimpleNamespace(
        device="cpu", engine=SimpleNamespace(backend=SimpleNamespace(step_tokens=width))
    )
    reference = {"tokens": text, "logits": truth[:64, :rows]}
    found = reading.read_text(subject, reference, ANY)
    assert found.mean_kl < 1e-15 and found.positions == 64 * rows
    assert torch.equal(torch.cat(read, dim=1)[:, :63], text[:63].T)
    for position in range(64):
        wrong[:] = [position]
        read.clear()
        off = reading.read_text(subject, reference, ANY)
        assert off.mean_kl > 1e-6 and off.max_logit_difference == pytest.approx(1, abs=1e-5)
