"""Experts that the host multiplies where they lie (`experts=cpu`) give what all on the device give.

Holds r1/placement/host.py, and its part of streamed.py and r1/switches/offload.py, to account. On a
GPU where there is one; on a CPU the same code is a stand-in for a device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import PROMPTS, read
from models import TINY, drafting_engine, sharp_logits
from refusals import refused
from test_offload import GPU, check, even, fused, loaded, streamed_layers
from tolerances import atol

import r1
from r1 import Backend, build
from r1.files.save import save
from r1.model.dispatch import Loop
from r1.placement import host, link
from r1.placement.host import Landing, multiply
from r1.placement.offload import sparse, staging_bytes
from r1.run.engine import Engine
from r1.run.runner import Runner
from r1.storage.int4_cpu import CpuInt4
from r1.storage.rows import Rows
from r1.switches.resolve import resolve

torch.set_num_threads(1)  # the models are tiny

CPU: dict[str, Any] = {"experts": "cpu"}
EXPERTS = TINY.experts.n_routed_experts
WIDE = TINY.change(moe_intermediate_size=64, hidden_size=192)
"""Sizes that torch's int4 operator takes."""
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32", "quant": "none"}, "bf16": {"dtype": "bf16", "quant": "none"},
    "int8": {"dtype": "fp32", "quant": "int8"}, "int8 bf16": {"dtype": "bf16", "quant": "int8"},
    "int4": {"dtype": "bf16", "quant": "int4-g64"}, "padded": {"dtype": "bf16", "quant": "int4"},
    "int4 apart": {"dtype": "bf16", "quant": "int4-g32", "join": "off"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as R1's, in FP8, without near ties."""
    path = tmp_path_factory.mktemp("wide") / "model"
    save(sharp_logits(config=WIDE, dtype="bf16", device="cpu").model, path)
    return path


def wide(folder: Path, **switches: Any) -> Runner:
    """The checkpoint, quantized while it is read; on a GPU where there is one."""
    asked = {"device": "cuda" if GPU else "cpu", **switches}
    return r1.load(folder, Backend(**asked), quiet=True).runner


def counts(run: Runner, tokens: int) -> list[int]:
    """Visits, hits, visits that the host computed and copied bytes, in calls of so many tokens."""
    notes = [layer.traffic[tokens] for layer in streamed_layers(run.model)]
    names = ("visits", "hits", "computed", "copied")
    return [sum(getattr(note, name) for note in notes) for name in names]


# ---------------------------- the same numbers
@pytest.mark.parametrize("slots", [1, 4, 5, EXPERTS])
@pytest.mark.parametrize("kind", KINDS)
def test_every_storage(kind: str, slots: int, folder: Path) -> None:
    """Ragged prompts in one piece and in chunks, decode steps of 3 rows, and long prompts. In bf16
    with experts drawn: a GPU's sums are rounded otherwise, and would tip near ties.
    """
    ways = KINDS[kind]
    right = wide(folder, **ways)
    run = wide(folder, **ways, **CPU, expert_slots=slots)
    if ways["dtype"] == "bf16":
        right, run = even(right), even(run)
    row = "algebra fp32" if ways["dtype"] == "fp32" else "ranks bf16"
    for chunk in (200, 3):
        run.prefill_chunk = right.prefill_chunk = chunk
        text, logits = read(right)
        torch.testing.assert_close(read(run, text)[1], logits, atol=atol(row), rtol=0)
    for chunk in (200, 70):
        run.prefill_chunk = right.prefill_chunk = chunk
        long = [list(range(150))]
        ours, theirs = (each.prefill(long, each.cache(1, 256)) for each in (run, right))
        torch.testing.assert_close(ours, theirs, atol=atol(row), rtol=0)


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_long_prompts_are_copied(kind: str, folder: Path) -> None:
    """As with experts=host; the steps after them copy nothing, and the host computes the misses."""
    right = even(wide(folder, **KINDS[kind]))
    run = even(wide(folder, **KINDS[kind], **CPU, expert_slots=4))
    row = "algebra fp32" if kind == "fp32" else "ranks bf16"
    caches = [each.cache(1, 256) for each in (run, right)]
    for _ in range(2):
        ours, theirs = (
            each.prefill([list(range(100))], cache)
            for each, cache in zip((run, right), caches, strict=True)
        )
        torch.testing.assert_close(ours, theirs, atol=atol(row), rtol=0)
    visits, _hits, computed, copied = counts(run, 100)
    assert visits and copied and computed == 0
    for token in range(20):
        step = torch.tensor([[token]], device=run.device)
        ours, theirs = (
            each.decode(step, cache) for each, cache in zip((run, right), caches, strict=True)
        )
        torch.testing.assert_close(ours, theirs, atol=atol(row), rtol=0)
    visits, hits, computed, copied = counts(run, 1)
    assert copied == 0 and hits > 0 and computed == visits - hits > 0
    for layer in streamed_layers(run.model):
        note, width = layer.traffic[1], layer.source.rows.shape[1]
        assert note.multiplied == note.computed * width


def test_slots_fill_with_what_is_used_most() -> None:
    """A short first prompt fills the empty slots; then nothing is copied."""
    run = sharp_logits(**CPU, expert_slots=3)
    read(run)
    _, _, computed, copied = counts(run, len(PROMPTS))
    assert computed and copied == 0
    for layer in streamed_layers(run.model):
        assert layer.free == 0


def test_a_fused_step() -> None:
    """The kernels compute the hits, and the host's part is added to their sum."""
    kernels: dict[str, Any] = {"kernels": "triton"} if GPU else {}
    right, run = sharp_logits(**kernels), sharp_logits(**kernels, **CPU, expert_slots=2)
    torch.testing.assert_close(fused(run), fused(right), atol=atol("algebra fp32"), rtol=0)
    assert counts(run, len(PROMPTS))[2] > 0


@pytest.mark.parametrize("policy", ["last", "most"])
def test_the_same_text(policy: str) -> None:
    """The embedded model's greedy answers, word by word."""
    answers = []
    for switches in ({}, {**CPU, "expert_slots": 4, "expert_policy": policy}):
        engine: Engine = loaded(quant="none", **switches)
        prompts = [engine.encode(each) for each in ("17 * 23 = ?", "9 + 8", "1234 + 999 = ?")]
        answers.append([done.tokens for done in engine.generate(prompts, 30, temperature=0.0)])
    assert answers[0] == answers[1]


def test_drafts() -> None:
    plain = drafting_engine(TINY, 3, k=2)
    run = drafting_engine(TINY, 3, k=2, **CPU, expert_slots=2)
    texts = [
        [done.tokens for done in engine.generate(PROMPTS, 12, temperature=0.0)]
        for engine in (plain, run)
    ]
    assert texts[0] == texts[1]


def test_the_sum_of_some_choices(folder: Path) -> None:
    """Against each choice by itself; a token without a choice gets 0."""
    run = wide(folder, dtype="fp32", device="cpu")
    experts = sparse(run.model)[0].experts
    x = torch.randn(4, WIDE.hidden_size, generator=torch.Generator().manual_seed(0))
    token, chosen = torch.tensor([0, 0, 3]), torch.tensor([5, 1, 5])
    weights = torch.tensor([0.5, 2.0, -1.0])
    y = multiply(experts, x, token, chosen, weights)
    assert not y[1:3].any()
    for number in (0, 3):
        pairs = [(e, w) for t, e, w in zip(token, chosen, weights, strict=True) if t == number]
        parts = [Loop()(experts, x[number][None], e.view(1, 1), w.view(1, 1)) for e, w in pairs]
        torch.testing.assert_close(y[number], torch.cat(parts).sum(dim=0), atol=1e-5, rtol=0)


# ---------------------------- int4 in the host's order
def test_int4_lies_once_in_the_hosts_order(folder: Path, tmp_path: Path) -> None:
    """Packed for the operator in host memory; in a slot, and saved, byte for byte as without."""
    ways = KINDS["int4"]
    plain = wide(folder, device="cpu", **ways, experts="host", expert_slots=4)
    run = wide(folder, device="cpu", **ways, **CPU, expert_slots=4)
    run.prefill([list(range(100))], run.cache(1, 128))
    for layer, other in zip(streamed_layers(run.model), streamed_layers(plain.model), strict=True):
        kinds = {type(m) for m in layer.outside[0].modules() if hasattr(m, "spec") and m.spec}
        assert kinds == {CpuInt4}
        assert layer.slots.slot
        for expert, slot in layer.slots.slot.items():
            if expert in layer.landed:
                continue  # it is on its way
            right = Rows(other).views(other.source.rows[expert])
            for ours, theirs in zip(Rows(layer).views(layer.places[slot]), right, strict=True):
                assert torch.equal(ours, theirs)
        assert layer.source.rows.shape[1] == layer.places.shape[1] + host.order_bytes(
            other.outside[0]
        )
    save(run.model, tmp_path / "a")
    save(plain.model, tmp_path / "b")
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_lost_arrival_is_forgotten(folder: Path) -> None:
    """Where an expert lands that nobody has moved yet, another one may land: then it is fetched
    anew when it is wanted.
    """
    run = wide(folder, **KINDS["int4"], **CPU, expert_slots=4)
    layer = streamed_layers(run.model)[0]
    assert layer.landing
    landing = layer.landing[0]
    layer.fetch([3], ())
    assert layer.slots.slot == {3: 0} and layer.landed
    for _ in range(len(landing.rows)):
        landing.take_for(lambda: None)
    assert not layer.slots.slot and not layer.landed
    check_right = wide(folder, **KINDS["int4"])
    text, logits = read(check_right)
    torch.testing.assert_close(read(run, text)[1], logits, atol=atol("ranks bf16"), rtol=0)


def test_what_is_counted(folder: Path) -> None:
    """The host holds its order, and two layers of it while one is repacked; the device the places
    where experts land.
    """
    backend = resolve(Backend(device="cpu", **KINDS["int4"], **CPU, expert_slots=3), WIDE)
    placement = build.placement_of(WIDE, backend)
    made = build.sketch(WIDE, backend, placement=placement)
    found = placement.sizes(made, torch.device("cuda"))
    run = wide(folder, device="cpu", **KINDS["int4"], **CPU, expert_slots=3)
    layers = streamed_layers(run.model)
    rows = sum(layer.source.rows.nbytes for layer in layers)
    assert rows <= found["cpu"] <= rows * (len(layers) + 2) / len(layers) + 4096
    (landing,) = {layer.landing for layer in layers if layer.landing}
    without = build.placement_of(
        WIDE, resolve(Backend(device="cpu", **KINDS["int4"], experts="host", expert_slots=3), WIDE)
    ).sizes(made, torch.device("cuda"))
    assert isinstance(landing[0], Landing)
    assert found["cuda"] - without["cuda"] == landing[0].rows.nbytes
    assert staging_bytes(made, 3) and not found.keys() - {"cuda", "cpu"}


def test_nothing_of_the_process_changes() -> None:
    before = torch.get_num_threads(), torch.get_num_interop_threads()
    read(sharp_logits(**CPU, expert_slots=2))
    assert (torch.get_num_threads(), torch.get_num_interop_threads()) == before


# ---------------------------- refusals
@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"quant": "fp8"}, "not fp8, a scale for 128 x 128"),
        ({"quant": "int4", "dtype": "fp32"}, "not int4.* in fp32"),
        ({"quant": "int8", "dtype": "fp16"}, "not int8.* in fp16"),
        ({"guess_experts": True}, "copies nothing in a step that guess_experts could fetch"),
        ({"amp": "bf16", "dtype": "fp32"}, "multiplies in the dtype .* use dtype=bf16"),
        ({"tp": 2}, "is built for one device, and tp=2 asks for more: use experts=host"),
        ({"expert_cache_gb": 2.0}, "expert_cache_gb=2.0 is of no use without experts=disk"),
    ],
)
def test_what_is_refused(switches: dict[str, Any], said: str) -> None:
    asked = {"device": "cpu", "dtype": "bf16", **CPU, **switches}
    with refused(said):
        resolve(Backend(**asked), WIDE)


def test_int4_of_other_sizes_is_refused() -> None:
    with refused("not int4, a scale for 1 x 128 of 72 x 160"):
        resolve(
            Backend(device="cpu", dtype="bf16", quant="int4", **CPU),
            TINY.change(moe_intermediate_size=72, hidden_size=160),
        )


def test_the_link_is_given_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's misses go over no link: only rows and sums do."""
    run = sharp_logits(**CPU, expert_slots=2)
    cache = run.cache(1, 64)
    run.prefill([[1, 2, 3]], cache)
    with monkeypatch.context() as patch:
        patch.setattr(link.Link, "copy", lambda *_: pytest.fail("an expert is copied"))
        for token in range(5):
            run.decode(torch.tensor([[token]], device=run.device), cache)
    check(sharp_logits(), sharp_logits(**CPU, expert_slots=2))
