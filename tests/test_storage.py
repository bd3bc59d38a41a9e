"""Storage (r1/storage): a matrix object is all that whoever multiplies needs to know.

A storage of our own, int8 rows in 40 lines, runs with every strategy, speculation, amp and the
kernels' torch twins; joined matrices give what separate ones give. Holds r1/storage to account, and
that r1/model, r1/run and r1/kernels look into no matrix.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from decoding import PROMPTS, read
from models import TINY, V3, model, sharp_logits
from tolerances import atol
from torch import Tensor, nn

from r1.kernels.block import DecodeBlock
from r1.model.layers import Embedding, Linear
from r1.model.mla import MLA
from r1.model.moe import Experts
from r1.model.rope import rotate_each, rotate_jointly
from r1.model.transformer import Transformer
from r1.run.drafter import MTPDrafter
from r1.run.generate import speculated_steps, steps
from r1.run.runner import Runner
from r1.run.sampler import Sampler
from r1.storage.dense import Dense
from r1.storage.joined import Part, join, products
from r1.storage.matrix import Matrix
from r1.switches.strategies import ATTENTION, EXPERTS


class Int8Rows(Matrix):
    """Whole numbers from -127 to 127, with one scale for each row."""

    numbers: Tensor
    scale: Tensor

    def __init__(self, source: Matrix) -> None:
        super().__init__()
        weight = source.dense()
        scale = weight.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("numbers", (weight.float() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.shape, self.dtype = weight.shape, weight.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return (self.numbers * self.scale).to(dtype or self.dtype)

    def one(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        return (self.numbers[index] * self.scale[index]).to(dtype or self.dtype)

    def pick(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return (self.numbers[ids] * self.scale[ids]).to(dtype or self.dtype)

    def stored(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        return {"weight": self.numbers[..., rows, :], "weight_scale": self.scale[..., rows, :]}


def swap(model: Transformer, storage: type[Matrix] = Int8Rows) -> Transformer:
    """Change the storage of a finished model, from outside."""
    for module in model.modules():
        if isinstance(module, (Linear, Embedding)):
            module.matrix = storage(module.matrix)
        elif isinstance(module, Experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(module, name, storage(getattr(module, name)))
    return model


class Rounded(Dense):
    """The numbers that Int8Rows stands for, as a plain tensor."""

    def __init__(self, source: Matrix) -> None:
        super().__init__(nn.Parameter(Int8Rows(source).dense(), requires_grad=False))


SWITCHES = [
    {"attention": attention, "prefill_attention": prefill, "moe": moe, "prefill_moe": prefill_moe}
    for (attention, prefill), (moe, prefill_moe) in zip(
        [("naive", "naive"), ("absorbed", "expand"), ("expand", "absorbed"), ("absorbed",
        "absorbed")], [("loop", "gather"), ("gather", "grouped"), ("grouped", "loop"), ("gather",
        "grouped")], strict=True,
    )
]  # fmt: skip


def swapped(storage: type[Matrix], **switches: Any) -> Runner:
    run = sharp_logits(device="cpu", **switches)
    return Runner(swap(run.model, storage), run.backend)


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(s.values()))
def test_a_storage_of_ones_own(switches: dict[str, Any]) -> None:
    """Prompt and decode steps, in every strategy: what the same numbers give as a plain tensor."""
    right = swapped(Rounded, **switches)
    text, logits = read(right)
    _, ours = read(swapped(Int8Rows, **switches), text)
    torch.testing.assert_close(ours, logits, atol=atol("algebra fp32"), rtol=0)
    assert not torch.equal(logits, read(sharp_logits(device="cpu", **switches), text)[1]), (
        "rounding shows"
    )


def test_every_strategy_is_tried() -> None:
    tried = {slot: {s[slot] for s in SWITCHES} for slot in SWITCHES[0]}
    for slot, table in (("attention", ATTENTION), ("moe", EXPERTS)):
        assert tried[slot] | tried[f"prefill_{slot}"] | {"triton"} == set(table)


def test_with_amp() -> None:
    right = swapped(Rounded, amp="bf16")
    text, logits = read(right)
    _, ours = read(swapped(Int8Rows, amp="bf16"), text)
    torch.testing.assert_close(ours, logits, atol=atol("amp bf16"), rtol=0)


def test_with_speculation() -> None:
    """Greedy text with drafts is the text without, and drafts are made by the same storage."""
    run = swapped(Int8Rows, speculate="mtp", draft_tokens=2)
    drafter, sampler = MTPDrafter(run), Sampler(0.0)
    cache = drafter.cache(len(PROMPTS), 64)
    told = list(speculated_steps(drafter, PROMPTS, 8, sampler, cache))
    plain = list(steps(run, PROMPTS, 8, sampler, run.cache(len(PROMPTS), 64)))
    for row in range(len(PROMPTS)):
        text = list(itertools.chain.from_iterable(step[row] for step in told))[:8]
        assert text == [step[row][0] for step in plain]


def test_with_the_kernels_torch_twins() -> None:
    """Fused decode blocks without a chip: the twins ask matrix objects, too."""
    right, ours = swapped(Rounded), swapped(Int8Rows)
    results = []
    for run in (right, ours):
        cache = run.cache(len(PROMPTS), 64)
        run.prefill(PROMPTS, cache)
        step = run.next_step(cache, 1)
        x = torch.randn(
            len(PROMPTS), 1, TINY.hidden_size, generator=torch.Generator().manual_seed(0)
        )
        for block, layer in zip(run.model.layers, cache.layers, strict=True):
            x = DecodeBlock(block, None)(x, step, layer)
        results.append(x)
    torch.testing.assert_close(*results, atol=atol("algebra fp32"), rtol=0)


def test_bytes_are_those_that_are_stored() -> None:
    dense = Dense(torch.randn(6, 5, 4))
    assert dense.nbytes == 6 * 5 * 4 * 4
    assert Int8Rows(dense).nbytes == 6 * 5 * 4 + 6 * 5 * 4
    assert [part.nbytes for part in join(Dense.empty(3, 8), Dense.empty(5, 8))] == [96, 160]


@pytest.mark.parametrize("stacked", [False, True])
def test_joined_parts(stacked: bool) -> None:
    """A part is its own matrix; a product of the whole is split; others' products stay apart."""
    shape = (3,) if stacked else ()
    one, two, other = (Dense(torch.randn(*shape, rows, 4)) for rows in (2, 5, 2))
    first, second = join(one, two)
    for part, matrix in ((first, one), (second, two)):
        assert torch.equal(part.dense(), matrix.dense()) and part.shape == matrix.shape
        assert torch.equal(part.stored(slice(1, 2))["weight"], matrix.dense()[..., 1:2, :])
        x = torch.randn(7, 4)
        if stacked:
            assert torch.equal(part.one(1), matrix.one(1))
            ids = torch.tensor([2, 0])
            assert torch.equal(part.pick(ids), matrix.pick(ids))
            ends = torch.tensor([2, 2, 7], dtype=torch.int32)
            torch.testing.assert_close(part.grouped(x, ends), matrix.grouped(x, ends))
        else:
            torch.testing.assert_close(part.matmul(x), matrix.matmul(x))
    asked: list[Matrix] = []

    def product(matrix: Matrix) -> Tensor:
        asked.append(matrix)
        return matrix.dense().mT

    both = products(product, first, second)
    assert asked == [first.whole] and [t.shape[-1] for t in both] == [2, 5]
    asked.clear()
    apart = products(product, first, other)
    assert asked == [first, other] and [t.shape[-1] for t in apart] == [2, 2]


def test_joining_changes_no_text() -> None:
    """The switch: the same weights, joined or not; q_a with kv_a, gate with up, experts' too."""
    joined, apart = sharp_logits(device="cpu", join="on"), sharp_logits(device="cpu", join="off")
    parts = [m for m in joined.model.modules() if isinstance(m, Part)]
    assert len(parts) >= 4 * len(joined.model.layers)
    assert not any(isinstance(m, Part) for m in apart.model.modules())
    text, logits = read(apart)
    torch.testing.assert_close(read(joined, text)[1], logits, atol=atol("algebra fp32"), rtol=0)


@pytest.mark.parametrize(("asked", "rotate"), [("on", rotate_jointly), ("off", rotate_each)])
def test_join_decides_how_queries_and_key_are_rotated(asked: str, rotate: Any) -> None:
    made = model(V3, join=asked)
    assert all(m.rotate is rotate for m in made.modules() if isinstance(m, MLA))
