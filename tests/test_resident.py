"""Resident experts (expert_policy=resident): on the device for good, without a copy in host memory.

The others pass through a few slots. On a GPU where there is one, else a CPU stands in for it.
Holds r1/placement's offload, slots, streamed and link, and the pre-flight check of r1/build.py to
account.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import PROMPTS, read
from models import TINY, sharp_logits
from ranks import Ranks, Refused
from refusals import refused
from test_offload import check, even, fused, loaded, sketched, streamed_layers
from test_parallel import check_logits, plain  # noqa: F401 (a fixture)
from tolerances import atol

from r1 import Backend, build
from r1.placement import link, offload
from r1.placement.offload import Offloaded, rest_bytes, sparse, staging_bytes
from r1.placement.profile import Profile
from r1.placement.slots import Resident, residents
from r1.storage.rows import Rows
from r1.switches.resolve import resolve

torch.set_num_threads(1)  # the models are tiny

EXPERTS = TINY.experts.n_routed_experts
GPU = torch.cuda.is_available()
RESIDENT: dict[str, Any] = {"experts": "host", "expert_policy": "resident"}


# ---------------------------- the same numbers
@pytest.mark.parametrize("slots", [1, 2, 5, EXPERTS - 1, EXPERTS])
@pytest.mark.parametrize("moe", ["loop", "gather"])
def test_every_strategy(moe: str, slots: int) -> None:
    """Ragged prompts, in one piece and in chunks; steps of 3 rows need more than what passes."""
    ways: dict[str, Any] = {"moe": moe, "prefill_moe": moe}
    right, run = sharp_logits(**ways), sharp_logits(**ways, **RESIDENT, expert_slots=slots)
    check(right, run)
    run.prefill_chunk = right.prefill_chunk = 3
    check(right, run)


def test_every_storage() -> None:
    """Loaded: resident experts are read into their slots, the others into rows of the host."""
    for quant in ("none", "int4", "int8", "fp8"):
        right, run = loaded(quant=quant), loaded(quant=quant, **RESIDENT, expert_slots=6)
        check(right.runner, run.runner)


@pytest.mark.parametrize("slots", [3, 12])
def test_prompts_of_all_experts(slots: int) -> None:
    """They pass through the staging, and what is resident is computed where it lies. Guesses."""
    for guess in (False, True):
        asked = {**RESIDENT, "expert_slots": slots, "guess_experts": guess}
        right, run = even(sharp_logits()), even(sharp_logits(**asked))
        prompts = [list(range(60)), list(range(100, 140))]
        for chunk in (60, 24):
            run.prefill_chunk = right.prefill_chunk = chunk
            ours, theirs = (each.prefill(prompts, each.cache(2, 64)) for each in (run, right))
            torch.testing.assert_close(ours, theirs, atol=atol("algebra fp32"), rtol=0)
        check(right, run)


def test_a_fused_step() -> None:
    kernels: dict[str, Any] = {"kernels": "triton"} if GPU else {}
    right, run = sharp_logits(**kernels), sharp_logits(**kernels, **RESIDENT, expert_slots=9)
    torch.testing.assert_close(fused(run), fused(right), atol=atol("algebra fp32"), rtol=0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Ranks(tmp_path_factory.mktemp("ranks")) as running:
        yield running


def test_devices_share_it(two: Ranks, plain: Path) -> None:  # noqa: F811
    """Each has its part of every expert, on the device or beside it."""
    for switches in ({"tp": 2, "expert_slots": 5}, {"ep": 2, "expert_slots": 3}):
        check_logits(two, plain, {**RESIDENT, **switches}, "algebra fp32")


# ---------------------------- what lies where, and what moves
def test_what_lies_where() -> None:
    """The sizes that are checked are the bytes that are taken: no expert has two places."""
    made, placement, _ = sketched(**RESIDENT, expert_slots=10)
    width, layers = Rows(sparse(made)[0].experts).width, len(sparse(made))
    stay = residents(10, EXPERTS, 4)
    assert stay == 5
    found = placement.sizes(made, torch.device("cuda"))
    assert found["cuda"] == rest_bytes(made) + 10 * layers * width + staging_bytes(made, 10)
    assert found["cpu"] == (EXPERTS - stay) * layers * width
    run = sharp_logits(**RESIDENT, expert_slots=10)
    for layer in streamed_layers(run.model):
        rows = layer.outside[1].rows
        assert len(rows) == EXPERTS - stay and rows.shape[1] == width
        assert rows.is_pinned() == GPU
        assert layer.places.nbytes == 10 * width and layer.slots.first == stay
        assert sorted(layer.slots.slot) == list(range(stay)), "without a recording the first ones"
    everything = sum(t.nbytes for t in (*run.model.parameters(), *run.model.buffers()))
    assert everything == rest_bytes(run.model) + 10 * layers * width


def test_evictions_at_every_step() -> None:
    """Residents stay, whatever passes; each other expert is copied anew, and nothing else is."""
    run = even(sharp_logits(**RESIDENT, expert_slots=3))
    layers = streamed_layers(run.model)
    before = [layer.places[: layer.slots.first].clone() for layer in layers]
    assert [layer.slots.first for layer in layers] == [1] * len(layers)
    check(even(sharp_logits()), run)
    for layer, held in zip(layers, before, strict=True):
        note = layer.traffic[len(PROMPTS)]  # of the steps
        assert note.calls and note.copied == (note.visits - note.hits) * layer.places.shape[1]
        assert 0 < note.hits < note.visits / 2
        assert torch.equal(layer.places[: layer.slots.first], held)
        assert layer.slots.expert[:1] == [0] and 0 not in layer.outside[1].place


def test_a_recording_says_which(tmp_path: Path) -> None:
    """Its most chosen experts are resident, and give the same logits."""
    file, counts = tmp_path / "routing.json", [float(e % 5) for e in range(EXPERTS)]
    Profile(100, 4, {layer: counts for layer in range(1, TINY.num_hidden_layers)}).write(file)
    run = sharp_logits(**RESIDENT, expert_slots=6, expert_profile=str(file))
    for layer in streamed_layers(run.model):
        assert layer.slots.expert[: layer.slots.first] == [4, 9, 14]
    check(sharp_logits(), run)


def test_few_slots_pass() -> None:
    """For two tokens, or half of the slots; none where all experts are resident."""
    assert [residents(slots, 256, 8) for slots in (1, 2, 3, 32, 100)] == [0, 1, 1, 16, 84]
    assert residents(255, 256, 8) == 239 and residents(256, 256, 8) == 256
    slots = Resident(4, 8)
    slots.settle([6, 7])
    assert slots.slot == {6: 0, 7: 1} and slots.room() == 2 and slots.room([0, 3]) == 1
    assert [slots.take(expert, ()) for expert in (1, 2, 3)] == [2, 3, 2]
    assert slots.stay([4, 5]) == [], "no slot is empty"


def test_slots_take_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is counted for what the device leaves over, with 16 experts and 4 chosen."""
    made, placement, _ = sketched(**RESIDENT)
    assert isinstance(placement, Offloaded)
    each = sum(Rows(layer.experts).width for layer in sparse(made))
    free = rest_bytes(made) + 2**30 + 8 * each + staging_bytes(made, 8)
    monkeypatch.setattr(offload, "available_bytes", lambda _: free)
    found = placement.sizes(made, torch.device("cuda"))
    assert found["cuda"] == free - 2**30 and found["cpu"] == (EXPERTS - 4) * each
    monkeypatch.setattr(offload, "available_bytes", lambda _: free + 9 * each)
    assert placement.sizes(made, torch.device("cuda"))["cpu"] == 0, "all are resident"


def test_processes_share_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two takes as much as this one: the check counts both."""
    made, placement, backend = sketched(**RESIDENT, expert_slots=3)
    needed = placement.sizes(made, torch.device("cpu"))["cpu"] + build.HEADROOM
    asked: dict[str, Any] = {"tp": 2, "device": "cpu", "dtype": "fp32", **RESIDENT}
    shared = resolve(Backend(**asked, expert_slots=3), TINY)
    sizes = {"cpu": needed - build.HEADROOM}
    monkeypatch.setattr(build, "available_bytes", lambda _: 2 * needed - 1)
    build.check_memory(sizes, made, shared, None)  # here runs one process
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name, value in zip(names, ("0", "2", "2", "here", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with refused("cpu has"):
        build.check_memory(sizes, made, shared, None)
    build.check_memory(sizes, made, backend, None)  # a model that one of the two has alone
    placement = build.placement_of(TINY, shared)
    assert isinstance(placement, Offloaded) and placement.how.sharers == 2


def test_all_ranks_look_before_one_takes(two: Ranks) -> None:
    """One that has too little refuses for all."""
    found = two.run(2, refuse_on_one)
    assert all(isinstance(each, Refused) and "rank 1: " in each.sentence for each in found)


def refuse_on_one() -> None:
    backend = resolve(Backend(device="cpu", dtype="fp32", tp=2, **RESIDENT, expert_slots=3), TINY)
    mesh = build.connected(backend)
    if mesh.rank:
        build.available_bytes = lambda _: 10**5  # type: ignore[assignment]
    build.from_shape(TINY, backend, placement=build.placement_of(TINY, backend, mesh))


def test_new_memory_is_touched_by_several_threads() -> None:
    rows = link.host_rows(5, 999, torch.device("cpu"))
    rows.fill_(7)
    link.touch(rows)
    assert not rows.any()
    assert link.host_rows(0, 999, torch.device("cpu")).shape == (0, 999)


def test_host_memory_is_freed() -> None:
    run = sharp_logits(**RESIDENT, expert_slots=4)
    read(run)
    rows = [layer.outside[1].rows.untyped_storage()._weak_ref() for layer in
            streamed_layers(run.model)]  # fmt: skip
    del run
    gc.collect()
    assert all(torch.UntypedStorage._expired(each) for each in rows)


# ---------------------------- refusals
def test_what_needs_a_copy_of_each_expert() -> None:
    for where, why in (("cpu", "to multiply"), ("disk", "its files have all")):
        with refused("leaves experts out of host memory", why, "expert_policy=most"):
            resolve(Backend(device="cpu", **{**RESIDENT, "experts": where}), TINY)
    with refused("expert_policy=resident is of no use without experts=host"):
        resolve(Backend(device="cpu", expert_policy="resident"), TINY)
