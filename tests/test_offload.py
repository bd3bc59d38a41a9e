"""Experts in host memory (r1/placement/offload.py and its parts) give what all on the device give.

On a GPU where there is one. On a CPU the same code copies without streams: a stand-in for a device.
Holds r1/placement's offload, streamed, slots and link, r1/storage/rows.py and
r1/switches/offload.py to account.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import PROMPTS, read
from models import TINY, drafting_engine, model, sharp_logits
from refusals import refused
from tolerances import atol
from torch import Tensor

import r1
from r1 import Backend, build
from r1.bench.routing import make_fresh
from r1.device import torch_device
from r1.files.embedded import EMBEDDED
from r1.files.names import places
from r1.files.save import save
from r1.kernels.block import DecodeBlock
from r1.model.cache import Cache
from r1.model.dispatch import Gather
from r1.model.moe import EXPERT_MATRICES, Experts, MoE
from r1.model.router import Router
from r1.model.transformer import Transformer
from r1.placement import link
from r1.placement.offload import Offloaded, Slotted, rest_bytes, sparse, staging_bytes
from r1.placement.placement import Placement
from r1.placement.slots import MostUsed, Slots
from r1.placement.streamed import StreamedExperts
from r1.placement.traffic import Traffic
from r1.run.engine import Engine
from r1.run.graphs import Step
from r1.run.runner import Runner
from r1.storage.rows import Rows
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

torch.set_num_threads(1)  # the models are tiny

EXPERTS = TINY.experts.n_routed_experts
GPU = torch.cuda.is_available()
HOST: dict[str, Any] = {"experts": "host"}


def loaded(**switches: Any) -> Engine:
    """The embedded model, in fp32 unless `switches` say otherwise."""
    asked = {"device": "cuda" if GPU else "cpu", "dtype": "fp32", **switches}
    return r1.load(EMBEDDED, Backend(**asked), quiet=True)


def streamed_layers(made: Transformer) -> list[StreamedExperts]:
    found = [layer.experts for layer in sparse(made)]
    assert found and all(isinstance(each, StreamedExperts) for each in found)
    return [each for each in found if isinstance(each, StreamedExperts)]


def traffic(made: Transformer) -> Traffic:
    """That of all layers and calls, added up."""
    total = Traffic()
    for layer in streamed_layers(made):
        for note in layer.traffic.values():
            for name, value in vars(note).items():
                setattr(total, name, getattr(total, name) + value)
    return total


def check(right: Runner, run: Runner) -> None:
    """The same logits for ragged prompts and a text."""
    text, logits = read(right)
    ours = read(run, text)[1]
    torch.testing.assert_close(ours, logits, atol=atol("algebra fp32"), rtol=0)


# ---------------------------- the same numbers
@pytest.mark.parametrize("slots", [1, 4, 5, EXPERTS])
@pytest.mark.parametrize("moe", ["loop", "gather", "grouped"])
def test_every_strategy(moe: str, slots: int) -> None:
    """Ragged prompts, in one piece and in chunks of 3 tokens; decode steps of 3 rows."""
    if GPU and moe == "grouped":
        pytest.skip("torch's grouped_mm has no fp32 on a GPU")
    ways: dict[str, Any] = {"moe": moe, "prefill_moe": moe}
    right, run = sharp_logits(**ways), sharp_logits(**ways, **HOST, expert_slots=slots)
    check(right, run)
    run.prefill_chunk = right.prefill_chunk = 3
    check(right, run)


@pytest.mark.parametrize("quant", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("join", ["on", "off"])
def test_every_storage(quant: str, join: str) -> None:
    """Packed numbers travel as they are stored, with their scales, in one row."""
    switches = {"quant": quant, "join": join}
    right, run = loaded(**switches), loaded(**switches, **HOST, expert_slots=5)
    check(right.runner, run.runner)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_other_dtypes(dtype: str) -> None:
    """Each choice is rounded by itself where there are passes: one step of 2^-8 or 2^-11 more."""
    right, run = sharp_logits(dtype=dtype), sharp_logits(dtype=dtype, **HOST, expert_slots=5)
    text, logits = read(right)
    torch.testing.assert_close(read(run, text)[1], logits, atol=atol("ranks bf16"), rtol=0)


def test_rows_keep_the_order_of_int4() -> None:
    """On a CPU in bf16 other int4 matrices are repacked for its operator; rows of bytes are not."""
    switches: dict[str, Any] = {"device": "cpu", "quant": "int4", "dtype": "bf16"}
    wide = TINY.change(moe_intermediate_size=64, hidden_size=192)
    backend = resolve(Backend(**switches, **HOST, expert_slots=5), wide)
    kinds = Counter(type(m).__name__ for m in build.from_shape(wide, backend).modules())
    assert kinds["CpuInt4"] > 0 and kinds["Int4"] >= 2 * (wide.num_hidden_layers - 1)


@pytest.mark.parametrize("policy", ["last", "most"])
@pytest.mark.parametrize("guess", [False, True])
def test_policies_and_guesses_change_no_number(policy: str, guess: bool) -> None:
    switches: dict[str, Any] = {"expert_slots": 6, "expert_policy": policy, "guess_experts": guess}
    check(sharp_logits(), sharp_logits(**HOST, **switches))


def test_a_fused_step() -> None:
    """The kernels read slots as they read stacks: the twins, and on a GPU the kernels."""
    kernels: dict[str, Any] = {"kernels": "triton"} if GPU else {}
    right, run = sharp_logits(**kernels), sharp_logits(**kernels, **HOST, expert_slots=5)
    torch.testing.assert_close(fused(run), fused(right), atol=atol("algebra fp32"), rtol=0)


def fused(run: Runner) -> Tensor:
    """A decode step through fused blocks."""
    cache = run.cache(len(PROMPTS), 64)
    run.prefill(PROMPTS, cache)
    step = run.next_step(cache, 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(PROMPTS), 1, TINY.hidden_size, generator=generator).to(run.device)
    with run.context():
        for block, ready, layer in zip(
            run.model.layers, run.blocks["decode"], cache.layers, strict=True
        ):
            x = (ready if GPU else DecodeBlock(block, None))(x, step, layer)
    return x.clone()


def test_evictions_at_every_step() -> None:
    """With one slot every expert but a repeated one is copied anew, and nothing else is."""
    run = sharp_logits(**HOST, expert_slots=1)
    check(sharp_logits(), run)
    for layer in streamed_layers(run.model):
        note = layer.traffic[len(PROMPTS)]  # of the steps
        assert note.calls and note.copied == (note.visits - note.hits) * layer.places.shape[1]
        assert note.hits < note.visits / 2


@pytest.mark.parametrize("quant", ["none", "int4", "fp8"])
def test_the_same_text(quant: str) -> None:
    """The embedded model's greedy answers, word by word; loaded, not made."""
    questions = ["17 * 23 = ?", "9 + 8", "1234 + 999 = ?"]
    answers = []
    ways: list[dict[str, Any]] = [{}, {**HOST, "expert_slots": 4}, {**HOST, "guess_experts": True}]
    for switches in ways:
        engine = loaded(quant=quant, **switches)
        prompts = [engine.encode(each) for each in questions]
        answers.append([done.tokens for done in engine.generate(prompts, 40, temperature=0.0)])
    assert answers[1] == answers[0] and answers[2] == answers[0]


def test_drafts() -> None:
    """The MTP layer's experts stream too, and a step over drafts visits more of them."""
    plain = drafting_engine(TINY, 3, k=2)
    assert isinstance(plain.model, Transformer)
    run = drafting_engine(TINY, 3, k=2, **HOST, expert_slots=4)
    texts = [
        [done.tokens for done in engine.generate(PROMPTS, 12, temperature=0.0)]
        for engine in (plain, run)
    ]
    assert texts[0] == texts[1]
    assert len(streamed_layers(run.model)) == len(sparse(plain.model))


def test_a_rank_that_has_none_of_the_choices() -> None:
    """Its fused step still needs one pass, for the residual and the sum."""
    layer = streamed_layers(sharp_logits(**HOST, expert_slots=4).model)[0]
    device = layer.places.device
    elsewhere = torch.full((1, 3), len(layer.ids), device=device)  # as a rank's `here` says it
    ((slots, _weights),) = layer.here(elsewhere, torch.ones(1, 3, device=device))
    assert slots.tolist() == [[layer.count] * 3]
    assert not layer.slots.slot


# ---------------------------- steps in pieces
def in_pieces(run: Runner) -> Runner:
    """Its steps are cut, and on a GPU recorded."""
    return run if GPU else cut(run)


def cut(run: Runner) -> Runner:
    """Its steps are cut, and not recorded: the host's part is done at once."""
    plain = run.callers["decode"]

    def call(
        key: tuple[Any, ...], step: Step, inputs: tuple[Tensor, ...], cache: Cache
    ) -> tuple[Tensor, ...]:
        assert run.link is not None
        run.link.cut = lambda stop: stop()
        try:
            return plain(key, step, inputs, cache)
        finally:
            run.link.cut = None

    run.callers["decode"] = call
    return run


PIECES: dict[str, Any] = {**HOST, "cuda_graphs": GPU}


def give_up(run: Runner) -> None:
    """No slot that may be given away holds an expert any more: the next step has to fetch all."""
    for layer in streamed_layers(run.model):
        for expert, slot in list(layer.slots.slot.items()):
            if slot >= layer.slots.first:
                layer.slots.forget(expert)


@pytest.mark.parametrize("policy", ["last", "resident"])
@pytest.mark.parametrize("guess", [False, True])
def test_steps_in_pieces(policy: str, guess: bool) -> None:
    """Three ragged rows may choose all experts, so all have slots; one row has to fetch them."""
    switches: dict[str, Any] = {**PIECES, "expert_policy": policy, "guess_experts": guess}
    check(sharp_logits(), in_pieces(sharp_logits(**switches, expert_slots=EXPERTS)))
    slots = 4 if policy == "last" else 8
    right, run = sharp_logits(), in_pieces(sharp_logits(**switches, expert_slots=slots))
    tokens = torch.tensor([[7], [3], [11], [250], [8], [40]], device=run.device)
    both = []
    for each in (right, run):
        cache = each.cache(1, 64)
        logits = [each.prefill(PROMPTS[:1], cache).clone()]
        for token in tokens:
            if each is run:
                give_up(run)
            logits.append(each.decode(token[None], cache)[:, -1].clone())
        both.append(torch.stack(logits))
    torch.testing.assert_close(both[1], both[0], atol=atol("algebra fp32"), rtol=0)
    steps = [layer.traffic[1] for layer in streamed_layers(run.model)]
    if guess:
        assert sum(note.guessed for note in steps) > 0
    else:
        width = streamed_layers(run.model)[0].places.shape[1]
        assert all(note.copied > 0 for note in steps)
        assert all(note.copied == (note.visits - note.hits) * width for note in steps)


def test_the_last_expert_has_a_piece_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer has already, and what comes before the last one, is computed under that copy. No
    copy but the first one waits for the host's other work: the pieces' places are sent after it.
    """
    layer = streamed_layers(sharp_logits(device="cpu", **HOST, expert_slots=8).model)[0]
    none, events = layer.count, itertools.count()
    waited: list[object] = []
    placed: list[bool] = []
    copy = link.Link.copy

    def copied(self: link.Link, target: Tensor, source: Tensor, after: link.Event | None) -> None:
        placed.append(int(layer.place.ne(none).sum()) == 3)
        copy(self, target, source, after)

    monkeypatch.setattr(link.Link, "copy", copied)
    monkeypatch.setattr(link.Link, "arrival", lambda _: next(events))
    monkeypatch.setattr(link.Link, "wait", lambda _, event: waited.append(event))
    layer.link.cut = lambda stop: stop()

    def passes(*experts: int) -> list[tuple[list[int], set[object]]]:
        found = []
        for slots, _ in layer.here(torch.tensor([experts]), torch.ones(1, 3)):
            found.append((slots.flatten().tolist(), {each for each in waited if each is not None}))
            waited.clear()
        return found

    assert passes(9, 3, 5) == [([none, 0, 1], {0, 1}), ([2, none, none], {2})]
    assert placed == [False, True, True]
    assert passes(3, 12, 9) == [([0, none, 2], set()), ([none, 3, none], {3})]
    assert passes(3, 9, 5) == [([0, 2, 1], set()), ([none, none, none], set())]
    assert layer.traffic[1].hits == 5 and layer.traffic[1].visits == 9


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("pieces", [False, True])
def test_copies_come_as_late_as_they_may(
    pieces: bool, guess: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are made only when the device waits for them, in order: no pass forgets to wait."""
    asked: list[tuple[Tensor, Tensor]] = []
    made: list[Tensor] = []

    def wait(_: link.Link, event: int | None) -> None:
        while event is not None and len(made) < event:
            target, source = asked[len(made)]
            made.append(target.copy_(source))

    switches: dict[str, Any] = {**HOST, "expert_slots": 13, "guess_experts": guess}
    right, run = (even(sharp_logits(device="cpu", **each)) for each in ({}, switches))
    if pieces:
        run = cut(run)
    monkeypatch.setattr(link.Link, "copy", lambda _, to, row, __: asked.append((to, row)))
    monkeypatch.setattr(link.Link, "arrival", lambda _: len(asked))
    monkeypatch.setattr(link.Link, "wait", wait)
    check(right, run)
    assert made


def test_text_and_drafts_in_pieces() -> None:
    """Greedy answers of the embedded model; drafts, whose steps choose for several tokens."""
    question, answers = "17 * 23 = ?", []
    for switches in ({}, {**PIECES, "expert_slots": 4}):
        engine = loaded(**switches)
        if switches:
            in_pieces(engine.runner)
        (done,) = engine.generate([engine.encode(question)], 40, temperature=0.0)
        answers.append(done.tokens)
    assert answers[0] == answers[1]
    device: dict[str, Any] = {"device": "cuda" if GPU else "cpu"}
    drafts = drafting_engine(TINY, 3, k=2, **device, **PIECES, expert_slots=EXPERTS)
    in_pieces(drafts.runner)
    texts = [
        [done.tokens for done in engine.generate(PROMPTS, 12, temperature=0.0)]
        for engine in (drafting_engine(TINY, 3, k=2, **device), drafts)
    ]
    assert texts[0] == texts[1]


def test_a_piece_needs_slots_for_all_that_is_chosen() -> None:
    run = in_pieces(sharp_logits(**PIECES, expert_slots=5))
    cache = run.cache(len(PROMPTS), 64)
    run.prefill(PROMPTS, cache)
    most = 16 if GPU else 12  # a captured step has a power of two of rows
    with refused(f"up to {most} have to come, and there are slots for 5: give expert_slots or"):
        run.decode(torch.tensor([[1], [2], [3]], device=run.device), cache)


# ---------------------------- what is copied
def test_a_prompt_copies_each_expert_once() -> None:
    """60 tokens choose more than the four slots hold; four of them lie there afterwards."""
    run = sharp_logits(**HOST, expert_slots=4)
    run.prefill([list(range(60))], run.cache(1, 64))
    for layer in streamed_layers(run.model):
        (note,) = layer.traffic.values()
        assert note.copied == note.visits * layer.places.shape[1]
        assert note.visits <= EXPERTS and note.hits == 0
        assert len(layer.slots.slot) == 4


def even(run: Runner) -> Runner:
    """Experts drawn anew for each token: random weights crowd on a few."""
    make_fresh(run.model, 0)
    for gate in run.model.modules():
        if isinstance(gate, Router):
            gate.e_score_correction_bias.zero_()
    return run


@pytest.mark.parametrize("slots", [1, 4, EXPERTS])
@pytest.mark.parametrize("moe", ["loop", "gather", "grouped"])
def test_what_came_early_changes_no_number(moe: str, slots: int) -> None:
    """Prompts that need all experts: cold, warm, in chunks, and ragged."""
    if GPU and moe == "grouped":
        pytest.skip("torch's grouped_mm has no fp32 on a GPU")
    ways: dict[str, Any] = {"moe": moe, "prefill_moe": moe}
    right, run = (
        even(sharp_logits(**ways, **more)) for more in ({}, {**HOST, "expert_slots": slots})
    )
    prompts = [list(range(60)), list(range(100, 140))]
    for chunk in (60, 60, 24):
        run.prefill_chunk = right.prefill_chunk = chunk
        ours, theirs = (each.prefill(prompts, each.cache(2, 64)) for each in (run, right))
        torch.testing.assert_close(ours, theirs, atol=atol("algebra fp32"), rtol=0)
        check(right, run)
    assert not any(layer.staged for layer in streamed_layers(run.model))


@pytest.mark.parametrize("slots", [2, 6])
def test_a_prompts_copies_run_ahead(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer n + 1's first experts are copied before layer n's last ones are computed, and so before
    its router has chosen. Also where all slots hold experts that are needed: these stay there.
    """
    run = even(sharp_logits(**HOST, expert_slots=slots))
    events: list[tuple[Any, Any]] = []
    layers = streamed_layers(run.model)
    owner = {
        memory.untyped_storage().data_ptr(): (number, kind)
        for number, layer in enumerate(layers)
        for kind, memory in (("host", layer.outside[1].rows), ("slots", layer.places))
    }
    copy, compute = link.Link.copy, Gather.__call__

    def copied(self: link.Link, target: Tensor, source: Tensor, after: link.Event | None) -> None:
        number = owner[source.untyped_storage().data_ptr()][0]
        place = owner.get(target.untyped_storage().data_ptr(), (number, "staging"))
        events.append((number, place[1]))
        copy(self, target, source, after)

    def computed(self: Gather, experts: Experts, *rest: Any) -> Tensor:
        events.append(("compute", experts.count))
        return compute(self, experts, *rest)

    monkeypatch.setattr(link.Link, "copy", copied)
    monkeypatch.setattr(Gather, "__call__", computed)
    for number, module in enumerate(sparse(run.model)):
        module.dispatch["prefill"] = Gather()
        module.gate.register_forward_hook(lambda *_, n=number: events.append(("route", n)))
    for cold in (True, False):
        events.clear()
        held = [set(layer.slots.slot) for layer in layers]
        run.prefill([list(range(60))], run.cache(1, 64))
        for n in range(len(layers)):
            copies = [i for i, each in enumerate(events) if each[0] == n]
            assert len(copies) == EXPERTS - (0 if cold else slots), "each once"
            early = [i for i in copies if i < events.index(("route", n))]
            assert len(early) == (0 if n == 0 else 2 * slots if cold else slots)
            assert all(events[i][1] == "staging" for i in early[-slots:])
            kinds = [each[0] for each in events[early[-1] if early else 0 :]]
            assert not early or kinds.index("compute") < kinds.index("route")
        assert cold or [set(layer.slots.slot) for layer in layers] == held


def test_a_prompt_leaves_its_most_used_in_slots() -> None:
    """Under "most", whether it is read at once or in chunks; slots that hold better are left."""
    for chunk in (200, 50):
        run = even(sharp_logits(**HOST, expert_slots=4, expert_policy="most"))
        run.prefill_chunk = chunk
        run.prefill([list(range(200))], run.cache(1, 256))
        for layer in streamed_layers(run.model):
            held = sorted(layer.slots.counts[expert] for expert in layer.slots.slot)
            assert held == sorted(layer.slots.counts)[-4:]


def test_what_lies_in_a_slot_is_not_copied() -> None:
    """With a slot for each expert, a second call copies only what the first one did not use."""
    run = sharp_logits(**HOST, expert_slots=EXPERTS)
    run.prefill([list(range(60))], run.cache(1, 64))
    before = traffic(run.model).copied
    run.prefill([list(range(60))], run.cache(1, 64))
    assert traffic(run.model).copied == before


def test_a_guess_helps() -> None:
    """On the embedded model the next layer's router is often right about this layer's state."""
    rates = []
    for guess in (False, True):
        engine = loaded(**HOST, expert_slots=8, guess_experts=guess)
        engine.generate([engine.encode("17 * 23 = ?")], 40, temperature=0.0)
        notes = [layer.traffic[1] for layer in streamed_layers(engine.model)]
        hits, visits, right, guessed = (
            sum(getattr(note, name) for note in notes)
            for name in ("hits", "visits", "right", "guessed")
        )
        rates.append(hits / visits)
        assert right <= guessed and bool(guessed) == guess
    assert rates[1] > rates[0] + 0.05


def test_an_expert_is_one_row() -> None:
    """Its matrices and scales lie side by side: a slot's bytes are the host's row, whole."""
    run = loaded(**HOST, expert_slots=4, quant="int4").runner
    run.prefill([[1, 2, 3]], run.cache(1, 8))
    for layer in streamed_layers(run.model):
        for expert, slot in layer.slots.slot.items():
            assert torch.equal(layer.places[slot].cpu(), layer.outside[1].rows[expert])
        stored = [getattr(layer.outside[0], name).stored() for name in EXPERT_MATRICES]
        row = sum(tensor[0].nbytes for each in stored for tensor in each.values())
        assert row <= layer.places.shape[1] < row + 256 * 6


def test_a_slot_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to it comes after the arithmetic that used it; the next copy comes after that one."""
    layer = streamed_layers(sharp_logits(device="cpu", **HOST, expert_slots=1).model)[0]
    afters: list[object] = []
    monkeypatch.setattr(link.Link, "copy", lambda *each: afters.append(each[3]))
    done: Any = object()
    layer.used[0] = done
    for expert in (3, 5):
        assert layer.fetch([expert], ()) == {expert: 0}
    assert afters == [done, None]


# ---------------------------- policies
def test_the_oldest_goes_first() -> None:
    slots = Slots(3, 8)
    assert [slots.take(expert, ()) for expert in (5, 6, 7)] == [0, 1, 2]
    slots.use([0])
    assert slots.take(1, ()) == 1, "6 is the oldest now"
    assert slots.take(2, keep=(2,)) == 0, "7 is older than 5, but it is kept"
    assert slots.slot == {7: 2, 1: 1, 2: 0}


def test_the_least_chosen_goes_first() -> None:
    slots = MostUsed(2, 8)
    slots.count([1, 2, 3], [5, 1, 4])
    assert slots.order([1, 2, 3]) == [2, 3, 1], "the most chosen are fetched last, and stay"
    slots.take(2, ()), slots.take(1, ())
    assert slots.take(3, ()) == 0 and set(slots.slot) == {1, 3}


# ---------------------------- memory
def sketched(**switches: Any) -> tuple[Transformer, Placement, Backend]:
    backend = resolve(Backend(device="cpu", dtype="fp32", **switches), TINY)
    placement = build.placement_of(TINY, backend)
    return build.sketch(TINY, backend, placement=placement), placement, backend


def test_what_lies_where() -> None:
    """The device has everything else and the slots; the host has every expert."""
    made, placement, _ = sketched(**HOST, expert_slots=3)
    width = Rows(sparse(made)[0].experts).width
    layers = len(sparse(made))
    found = placement.sizes(made, torch.device("cuda"))
    ahead = 2 * 3 * width  # a prompt's experts of the next layer: as many as slots, twice
    assert staging_bytes(made, 3) == ahead
    assert found["cuda"] == rest_bytes(made) + 3 * layers * width + ahead
    assert found["cpu"] == EXPERTS * layers * width
    run = sharp_logits(**HOST, expert_slots=3)
    assert sum(layer.places.nbytes for layer in streamed_layers(run.model)) == 3 * layers * width
    (staging,) = {layer.staging for layer in streamed_layers(run.model)[1:]}
    assert staging is not None and staging[0].rows.nbytes == ahead
    for tensor in (*run.model.parameters(), *run.model.buffers()):
        assert tensor.device.type == run.device.type
    for layer in streamed_layers(run.model):
        rows = layer.outside[1].rows
        assert rows.device.type == "cpu" and rows.is_pinned() == GPU


def test_slots_take_what_is_free() -> None:
    made, placement, _ = sketched(**HOST)
    assert isinstance(placement, Offloaded)
    layers = len(sparse(made))
    each = layers * Rows(sparse(made)[0].experts).width
    rest, left = rest_bytes(made), 2**30
    free = 5 * each + staging_bytes(made, 5)
    assert placement.slots(made, rest + left + free) == 5
    assert placement.slots(made, rest + left + free - 1) == 4
    assert placement.slots(made, rest + left) == 1, "then a call with one slot is tried"
    assert placement.slots(made, 2**40) == EXPERTS
    assert Offloaded(Placement(), Slotted(99)).slots(made, 0) == EXPERTS


def test_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device and the host are counted, before any memory is taken."""
    made, placement, backend = sketched(**HOST, expert_slots=2)
    needed = placement.sizes(made, torch.device("cpu"))["cpu"]
    monkeypatch.setattr(build, "available_bytes", lambda _: needed + build.HEADROOM - 1)
    with refused("needs .* in fp32 and cpu has"):
        build.from_shape(TINY, backend)
    monkeypatch.setattr(build, "available_bytes", lambda _: needed + build.HEADROOM)
    build.from_shape(TINY, backend)


def test_advice_to_keep_experts_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all experts do not fit the GPU, and one slot of each layer does."""
    ways = {"attention": "naive", "prefill_attention": "naive", "moe": "loop"}
    storage = {"dtype": "fp32", "quant": "none", "join": "on"}
    asked: dict[str, Any] = {"device": "cuda", **storage, **ways}
    backend = Backend(**asked, prefill_moe="loop")
    needed = build.weight_bytes(TINY, backend)
    monkeypatch.setattr(build, "HEADROOM", 1)
    monkeypatch.setattr(build, "available_bytes", lambda _: needed)
    with refused("use .*experts=host or a larger machine"):
        build.allocate(TINY, backend, mtp=False)


def test_host_memory_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model; and it is no file that a killed process could leave."""
    made: list[weakref.ref[link.Pinned]] = []

    class Watched(link.Pinned):
        def __init__(self, *_: Any, **__: Any) -> None:
            made.append(weakref.ref(self))

    monkeypatch.setattr(link, "Pinned", Watched)
    run = sharp_logits(**HOST, expert_slots=2)
    read(run)
    gc.collect()
    assert len(made) == len(sparse(run.model)) and all(each() is not None for each in made)
    del run
    gc.collect()
    assert all(each() is None for each in made)


@pytest.mark.parametrize(
    "how", [{"expert_slots": 2}, {"expert_slots": 4, "expert_policy": "resident"}], ids=str
)
def test_saving(tmp_path: Path, how: dict[str, Any]) -> None:
    """The files have every expert, not those of the slots; resident ones lie nowhere else."""
    plain = model(TINY.change(fp8_block=None), dtype="fp32")
    made = model(TINY.change(fp8_block=None), dtype="fp32", **HOST, **how)
    theirs = places(plain)
    for key, tensor in places(made).items():
        assert torch.equal(tensor, theirs[key]), key
    save(made, tmp_path / "model")
    again = r1.load(tmp_path / "model", Backend(device="cpu", dtype="fp32"), quiet=True)
    for key, tensor in places(again.model).items():
        assert torch.equal(tensor, theirs[key]), key


# ---------------------------- refusals
@pytest.mark.parametrize(
    ("experts", "name"), [("host", "compile"), ("disk", "prefill_graphs"), ("cpu", "cuda_graphs")]
)
def test_switches_that_can_not_wait(experts: str, name: str) -> None:
    machine = Machine(cuda=True, name="H100", capability=(9, 0))
    with refused(f"experts={experts} has to know", f"{name} has no place"):
        asked: dict[str, Any] = {"experts": experts, name: True}
        resolve(Backend(**asked), TINY, machine)


@pytest.mark.parametrize("experts", ["host", "disk"])
def test_graphs_in_pieces_go_with_experts_elsewhere(experts: str) -> None:
    machine = Machine(cuda=True, name="H100", capability=(9, 0))
    found = resolve(Backend(experts=experts, cuda_graphs=True), TINY, machine)
    assert found.cuda_graphs and found.experts == experts


@pytest.mark.parametrize(
    "switches", [{"expert_slots": 4}, {"expert_policy": "most"}, {"guess_experts": True}]
)
def test_its_switches_need_it(switches: dict[str, Any]) -> None:
    with refused("is of no use without experts=host"):
        resolve(Backend(device="cpu", **switches), TINY)


def test_stages_keep_no_experts_elsewhere() -> None:
    with refused("experts=host keeps experts of all layers, and pp=2 splits these"):
        resolve(Backend(device="cpu", pp=2, **HOST), TINY)


def test_a_model_without_experts() -> None:
    with refused("experts=host: this model has no routed experts"):
        resolve(Backend(device="cpu", **HOST), TINY.change(n_routed_experts=0))


@pytest.mark.parametrize("slots", [-1, True, "4"])
def test_slots_are_a_number(slots: Any) -> None:
    with refused("expert_slots=.*give a whole number"):
        Backend(expert_slots=slots)


@pytest.mark.parametrize(("grid", "own"), [({}, EXPERTS), ({"tp": 2, "ep": 2}, EXPERTS // 2)])
def test_no_more_slots_than_experts(grid: dict[str, int], own: int) -> None:
    asked: dict[str, Any] = {**HOST, **grid}
    resolve(Backend(expert_slots=own, **asked), TINY)
    with refused(f"expert_slots={own + 1}: a device has {own} experts of a layer: give at most"):
        resolve(Backend(expert_slots=own + 1, **asked), TINY)


def test_no_memory_for_rows() -> None:
    with refused("GB of host memory can't be had"):
        link.host_rows(2**20, 2**40, torch_device("cpu"))


def test_layers_are_chained() -> None:
    """Each sparse layer but the last guesses for the next one."""
    run = sharp_logits(**HOST, guess_experts=True)
    layers = [each for each in run.model.modules() if isinstance(each, MoE)]
    for layer, following in itertools.pairwise(layers):
        experts = layer.experts
        assert isinstance(experts, StreamedExperts) and experts.next is not None
        assert experts.next[0] is following.gate and experts.next[1] is following.experts
