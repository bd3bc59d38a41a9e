"""Experts in host memory in bench.py: arms, routing, rows, and the floor that the link makes.

Holds r1/bench and r1/roofline.py to account.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_rows import REFERENCE, WORK, findings
from models import TINY
from refusals import refused

import bench
from r1 import Backend, build
from r1.bench import arms, plan, rates
from r1.bench import measure as bench_measure
from r1.bench.arms import Arm
from r1.bench.flags import parser
from r1.bench.process import Answer
from r1.bench.rates import Rates, bottleneck, disk_rate, link_rate, ram_rate
from r1.bench.report.rows import row
from r1.bench.report.table import COLUMNS
from r1.bench.routing import make_fresh
from r1.bench.team import Lead
from r1.bench.worker import fetching, timing
from r1.bench.worker.serve import COMMANDS
from r1.bench.worker.subject import Subject
from r1.bench.workload import Workload
from r1.errors import InputError
from r1.files import draw
from r1.files.direct import Files, Range
from r1.files.embedded import EMBEDDED
from r1.model.router import Router
from r1.model.shapes import shape
from r1.placement import offload
from r1.placement.offload import sparse
from r1.placement.profile import Profile
from r1.placement.sources import THREADS, InFiles, Logged
from r1.placement.streamed import StreamedExperts
from r1.roofline import Work, fetched_bytes
from r1.run.runner import Runner
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

torch.set_num_threads(1)  # the models are tiny

HOST: dict[str, Any] = {"experts": "host", "expert_slots": 4}


def drawn(seed: int, **switches: Any) -> Runner:
    """Random weights whose experts are drawn; the router's bias is 0."""
    backend = resolve(Backend(dtype="fp32", **switches), TINY)
    made = build.from_shape(TINY, backend)
    make_fresh(made, seed)
    return Runner(made, backend)


def test_its_switches_go_with_it() -> None:
    """expert_slots alone does nothing; a guess is measured with and without."""
    given = {**HOST, "guess_experts": True, "join": "off"}
    found = arms.from_switches(given, ("alone", "together", "all-but-one"))
    assert [arm.name for arm in found] == [
        "baseline",
        "experts=host + expert_slots=4",
        "experts=host + expert_slots=4 + guess_experts",
        "join=off",
        "experts=host + expert_slots=4 + guess_experts + join=off",
        "all but experts=host + expert_slots=4",
        "all but experts=host + expert_slots=4 + guess_experts",
        "all but join=off",
    ]
    assert found[5].backend.experts == "device" and found[6].backend.experts == "host"


def test_a_profile_goes_with_its_policy() -> None:
    """One optimization, two switches; a row names the file, and no folder."""
    given = {**HOST, "expert_policy": "pinned", "expert_profile": "/data/skew.json"}
    found = arms.from_switches(given, ("alone", "together"))
    pinned = "experts=host + expert_slots=4 + expert_policy=pinned + expert_profile=skew.json"
    assert [arm.name for arm in found] == ["baseline", "experts=host + expert_slots=4", pinned]
    assert found[2].backend.expert_profile == "/data/skew.json"


def test_resident_experts_say_where_experts_lie() -> None:
    """So the policy goes into every arm that streams, as the number of slots does."""
    resident = {"expert_policy": "resident", "expert_profile": "/data/skew.json"}
    given = {**HOST, **resident, "guess_experts": True, "join": "off"}
    found = arms.from_switches(given, ("alone", "all-but-one"))
    own = "experts=host + expert_slots=4 + expert_policy=resident + expert_profile=skew.json"
    guess = f"{own} + guess_experts"
    three = [own, guess, "join=off"]
    names = ["baseline", *three, *(f"all but {name}" for name in three)]
    assert [arm.name for arm in found] == names
    assert [arm.backend.experts for arm in found[4:]] == ["device", "host", "host"]
    assert arms.places({**HOST, "expert_policy": "most"}) == HOST


def test_a_baseline_that_does_not_fit_streams_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As devices share it: in all arms and in the reference."""
    given = {"device": "cpu", **HOST, "guess_experts": True}
    monkeypatch.setattr(plan, "available_bytes", lambda _: 0)
    shared = plan.shared_by_all(given, Machine(), WORK)
    assert shared == HOST
    assert arms.from_switches(given, shared=shared)[0].backend.experts == "host"
    shared = plan.shared_by_all({**given, "experts": "cpu"}, Machine(), WORK)
    assert shared == HOST, "the host multiplies some storages only"
    monkeypatch.setattr(plan, "available_bytes", lambda _: 10**12)
    assert plan.shared_by_all(given, Machine(), WORK) == {}


def test_routing_that_repeats_is_refused() -> None:
    """Every step of a row would choose what the one before chose."""
    asked = ["--shape", "tiny", "--experts", "host", "--routing", "uniform"]
    with refused("use --routing fresh"):
        plan.check(parser(EMBEDDED).parse_args(asked))
    asked[-1] = "fresh"
    plan.check(parser(EMBEDDED).parse_args(asked))


def test_a_shape_has_no_files() -> None:
    with refused("a --shape has none: give --model DIR"):
        asked = "--shape tiny --experts disk --routing fresh"
        plan.check(parser(EMBEDDED).parse_args(asked.split()))


def test_fresh_routing_is_even_and_the_same_in_every_call() -> None:
    """A token of a row has the same experts in one long call and in many short ones."""
    chosen: dict[int, list[list[list[int]]]] = {}
    run = drawn(0)
    gate = next(module for module in run.model.modules() if isinstance(module, Router))
    calls: list[torch.Tensor] = []
    gate.register_forward_hook(lambda _module, _inputs, output: calls.append(output[0].sort()[0]))
    prompts = [list(range(40)), list(range(40, 80))]
    for chunk in (40, 7):
        run.prefill_chunk = chunk
        calls.clear()
        run.prefill(prompts, run.cache(2, 64))
        rows = torch.cat([call.unflatten(0, (2, -1)) for call in calls], dim=1)  # (B, S, K)
        chosen[chunk] = rows.tolist()
    assert chosen[40] == chosen[7]
    tokens = [tuple(each) for each in (*chosen[7][0], *chosen[7][1])]
    assert len(set(tokens)) > 60, "tokens and rows differ"
    counts = torch.tensor(tokens).flatten().bincount(minlength=TINY.experts.n_routed_experts)
    assert counts.min() > 0


def test_slots_hold_their_share_of_fresh_choices() -> None:
    """What roofline predicts: the share of hits is slots / experts, whatever the policy."""
    experts = TINY.experts.n_routed_experts
    for policy in ("last", "most"):
        run = drawn(1, **{**HOST, "expert_slots": 8, "expert_policy": policy})
        cache = run.cache(1, 400)
        run.prefill([[1]], cache)
        layers = [m for m in run.model.modules() if isinstance(m, StreamedExperts)]
        for layer in layers:
            layer.traffic.clear()
        for token in range(200):
            run.decode(torch.tensor([[token]], device=run.device), cache)
        hits = sum(layer.traffic[1].hits for layer in layers)
        visits = sum(layer.traffic[1].visits for layer in layers)
        copied = sum(layer.traffic[1].copied for layer in layers)
        assert abs(hits / visits - 8 / experts) < 0.03
        predicted = fetched_bytes(TINY, run.backend, visits / 200 / len(layers), 8)
        assert abs(copied / 200 / predicted - 1) < 0.06


def test_the_roof_counts_what_is_found() -> None:
    config = shape("moonlight-16b")
    backend = resolve(Backend(device="cpu", dtype="bf16", **HOST), config)
    expert = 3 * 2048 * 1408 * 2 * 26
    assert fetched_bytes(config, backend, 6, 16) == 6 * 0.75 * expert
    assert fetched_bytes(config, backend, 6, 16, found=0.5) == 3 * expert
    assert fetched_bytes(config, backend, 6, 64) == 0


def test_a_row() -> None:
    """The link is the floor of a step that copies much, and what it waits for."""
    answers = findings([0.02, 0.02, 0.02])
    fetched = {
        "visits": 100, "hits": 25, "copied": 3 * 10**7, "guessed": 8, "right": 6, "calls": 3,
        "prompt": 5 * 10**7, "slots": 4, "read": 6 * 10**6, "prompt_read": 10**7, "computed": 20,
        "multiplied": 12 * 10**6,
    }  # fmt: skip
    for repetition in answers["measure"]:
        repetition["fetched"] = fetched
    rates = {"fp32": {**REFERENCE["rates"]["fp32"], "link": 1e9, "disk": 2e8, "ram": 1e9}}
    made = row(Arm("a", "alone", Backend()), WORK, answers, {**REFERENCE, "rates": rates}, TINY)
    assert made["expert_hits"] == 0.25 and made["guesses_right"] == 0.75
    assert made["expert_hits_even"] == 4 / 16 and made["expert_slots"] == 4
    assert made["link_mb"] == 10 and made["link_share"] == pytest.approx(0.5)
    assert made["prompt_link_share"] == pytest.approx(0.5)
    assert made["floor_ms"] == pytest.approx(10) and made["bottleneck"] == "link"
    assert made["disk_mb"] == 2 and made["disk_share"] == pytest.approx(0.5)
    assert made["host_computed"] == 0.2 and made["host_mb"] == 4
    assert made["host_share"] == pytest.approx(0.2)
    assert made["expert_hits_recorded"] is None
    names = ("in slots", "link MB/step", "of the link", "disk MB/step", "of the disk")
    cells = [COLUMNS[name].cell(made) for name in names]
    assert cells == ["25%", "10.0", "50%", "2.00", "50%"]
    columns = [COLUMNS[name] for name in ("on the host", "host MB/step", "of the RAM")]
    assert [column.cell(made) for column in columns] == ["20%", "4.00", "20%"]


def test_the_drive_is_held_against_its_rate_at_the_time() -> None:
    """Not against that of the start: of all repetitions together, whose drive was now slow."""
    answers = findings([0.01, 0.03, 0.02])
    for repetition, rate in zip(answers["measure"], (2e8, 2e8, 5e7), strict=True):
        repetition["fetched"] = {
            "visits": 100, "hits": 25, "copied": 0, "guessed": 0, "right": 0, "calls": 3,
            "prompt": 0, "slots": 4, "read": 3 * 10**6, "prompt_read": 2 * 10**6, "disk_rate": rate,
        }  # fmt: skip
    rates = {"fp32": {**REFERENCE["rates"]["fp32"], "link": 1e9, "disk": 2e8}}

    def made() -> dict[str, Any]:
        return row(Arm("a", "alone", Backend()), WORK, answers, {**REFERENCE, "rates": rates}, TINY)

    found = made()
    # 9 MB took 90 ms in the repeated reads, and 180 ms in 9 steps.
    assert found["disk_mb"] == 1 and found["disk_share"] == pytest.approx(0.5)
    assert found["prompt_disk_share"] == pytest.approx(0.2)
    assert found["floor_ms"] == pytest.approx(10) and found["bottleneck"] == "disk"
    for repetition in answers["measure"]:
        repetition["fetched"] |= {"read": 0, "disk_rate": None}
    found = made()
    assert found["disk_share"] == 0 and found["bottleneck"] != "disk"
    assert found["prompt_disk_share"] == pytest.approx(0.1), "by the rate of the start"


def from_files(folder: Path, batch: int = 1, **switches: Any) -> Subject:
    """The embedded model with experts in its files, few of them in memory, or as `switches` say."""
    work = Workload(str(EMBEDDED), None, None, batch, 20, 8, 0, 0, "fresh")
    asked = {"experts": "disk", "expert_slots": 5, "expert_cache_gb": 0.003, **switches}
    subject = Subject(Backend(device="cpu", dtype="fp32", **asked), work, folder)
    subject.build()
    return subject


def files_of(subject: Subject) -> list[InFiles]:
    layers = [m for m in subject.engine.model.modules() if isinstance(m, StreamedExperts)]
    found = [layer.outside[1] for layer in layers]
    return [each for each in found if isinstance(each, InFiles)]


@pytest.mark.parametrize("batch", [1, 2])
def test_the_reads_of_steps_are_repeated(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ranges in the same order, over all layers; none of the prompt's; once.

    One thread reads, so that there is an order.
    """
    monkeypatch.setattr(offload, "THREADS", 1)
    subject = from_files(tmp_path, batch)
    seen: list[list[Range]] = []
    marks: list[int] = []

    def read(files: Files, ranges: list[Range], old: Any = Files.read) -> Any:
        seen.append(ranges)
        return old(files, ranges)

    def prefill(run: Runner, *arguments: Any, old: Any = Runner.prefill) -> Any:
        logits = old(run, *arguments)
        marks.append(len(seen))
        return logits

    monkeypatch.setattr(Files, "read", read)
    monkeypatch.setattr(Runner, "prefill", prefill)
    for _ in range(2):
        seen.clear()
        marks.clear()
        found = timing.measure(subject)["fetched"]
        (mark,) = marks
        steps, again = seen[mark : (mark + len(seen)) // 2], seen[(mark + len(seen)) // 2 :]
        assert mark > 0 and found["prompt_read"] > 0 and steps == again
        (nbytes,) = {source.nbytes for source in files_of(subject)}
        assert 3 * found["read"] == len(again) * nbytes > 0 and found["disk_rate"] > 0


def test_repeated_reads_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the cache, not in its bytes; and nobody keeps a list any more."""
    subject = from_files(tmp_path)
    sources, kept = files_of(subject), []

    def state() -> list[Any]:
        return [(dict(s.cache.slot), s.rows.tolist(), [*s.queue], [*s.started]) for s in sources]

    def watched(*arguments: Any, old: Any = fetching.disk_rate) -> float | None:
        assert all(source.log is None for source in sources)
        before = state()
        kept.append(old(*arguments))
        assert state() == before
        return kept[-1]

    monkeypatch.setattr(fetching, "disk_rate", watched)
    assert timing.measure(subject)["fetched"]["disk_rate"] == kept[0] > 0
    monkeypatch.setattr(subject.engine, "steps", lambda *_: refuse())
    with refused("the drive has gone"):
        timing.measure(subject)
    assert all(source.log is None for source in sources) and len(kept) == 1


def refuse() -> None:
    raise InputError("the drive has gone: plug it in")


def test_no_reads_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts lie in memory after the first repetition; or in no files at all."""
    calls: list[object] = []

    def counted_read(*arguments: Any, old: Any = Files.read) -> Any:
        calls.append(arguments)
        return old(*arguments)

    monkeypatch.setattr(Files, "read", counted_read)
    held = from_files(tmp_path, expert_cache_gb=1.0)
    timing.warm(held)
    for subject in (held, from_files(tmp_path, experts="host", expert_cache_gb=0.0)):
        calls.clear()
        found = timing.measure(subject)["fetched"]
        assert found["read"] == 0 and found["disk_rate"] is None and not calls


def test_the_warm_up_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number of it is held against the drive's rate."""
    monkeypatch.setattr(fetching, "disk_rate", lambda *_: pytest.fail("it repeats the reads"))
    subject = from_files(tmp_path)
    timing.warm(subject)
    assert all(source.log is None for source in files_of(subject))


def test_all_threads_read_at_a_time() -> None:
    """They wait for one another here, so fewer would wait in vain. Earlier reads are over by then.

    Of calls of other sizes than a step's nothing is read.
    """
    together, done = threading.Barrier(THREADS), threading.Event()

    def read(expert: int, matrix: str) -> None:
        assert done.is_set() and expert < 8
        together.wait(timeout=20)

    guess = Future[None]()

    def finish() -> None:
        done.set()
        guess.set_result(None)

    threading.Timer(0.1, finish).start()
    with ThreadPoolExecutor(THREADS) as pool:
        source: Any = InFiles.__new__(InFiles)
        source.pool, source.read, source.nbytes, source.reading = pool, read, 1000, {0: [guess]}
        reads = [*(Logged(1, source, expert) for expert in range(8)), Logged(20, source, 9)]
        layer = StreamedExperts.__new__(StreamedExperts)
        torch.nn.Module.__init__(layer)
        layer.outside = (None, source)  # type: ignore[assignment]
        subject: Any = SimpleNamespace(
            workload=WORK,
            engine=SimpleNamespace(model=layer, backend=SimpleNamespace(step_tokens=1)),
        )
        rate = fetching.disk_rate(subject, reads)
    assert rate is not None and 8000 / 20 < rate < 8000 / 1e-5


def test_the_link_is_a_bound() -> None:
    rates = Rates(copy=1e12, matmul=1e14, launch=1e-5, replay=1e-6, link=5e10)
    work = Work(1e9, 0, 1e9, link_bytes=1e9)
    drive = dataclasses.replace(rates, disk=1e9)
    slow = dataclasses.replace(work, disk_bytes=1e9)
    assert drive.seconds(slow) == 1 and bottleneck(slow, drive, 10, False, 1) == "disk"
    host = dataclasses.replace(rates, ram=1e9)
    slow = dataclasses.replace(work, host_bytes=1e9)
    assert host.seconds(slow) == 1 and bottleneck(slow, host, 10, False, 1) == "host"
    assert (slow + slow).host_bytes == 2e9 and (slow - slow).host_bytes == 0
    assert disk_rate(EMBEDDED) > 1e6 and ram_rate(2**22) > 1e8
    assert rates.seconds(work) == 0.02
    assert bottleneck(work, rates, 10, False, 0.02) == "link"
    assert link_rate(torch.device("cpu")) > 1e8


class Here:
    """An arm's process, in this one: it runs each command when its answer is asked for."""

    def __init__(self, *arguments: Any) -> None:
        _ranks, _target, backend, workload, folder, _compiled, _setup = arguments
        self.subject, self.busy = Subject(backend, workload, folder), False

    def ask(self, command: str, *arguments: Any) -> Answer:
        return COMMANDS[command](self.subject, *arguments)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def quit(self) -> None:
        pass


@pytest.mark.parametrize("where", ["host", "disk", "cpu"])
def test_the_command(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights made in host memory, or a checkpoint; a row with its traffic; parity."""
    monkeypatch.setattr(Lead, "start", lambda _, *arguments: Here(*arguments))
    monkeypatch.setattr(rates, "_best", partial(rates._best, repeats=3))
    out = tmp_path / "result.json"
    model = "--expert-cache-gb 0.003" if where == "disk" else "--shape tiny --layers 2"
    recorded = tmp_path / "made.json"
    counts = [float(expert + 1) for expert in range(16)]
    Profile(1000, 4, {layer: counts for layer in (1, 2, 3, 4)}).write(recorded)
    routing = str(recorded) if where == "cpu" else "fresh"
    asked = f"{model} --device cpu --experts {where} --expert-slots 5"
    sizes = f"--routing {routing} --prompt 20 --new 8 -r 1 --batch 2 --output-file"
    assert bench.main([*asked.split(), *sizes.split(), str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["machine"]["link_gb_s"] > 0
    assert ("disk_gb_s" in result["machine"]) == (where == "disk")
    baseline, made = result["rows"]
    assert baseline["expert_hits"] is None
    assert made["parity"] and 0 < made["expert_hits"] < 1
    assert bool(made["link_mb"]) == (where != "cpu")
    assert bool(made["host_mb"]) == bool(made["host_share"]) == (where == "cpu")
    assert ("ram_gb_s" in result["machine"]) == (where == "cpu")
    if where == "cpu":
        assert made["host_computed"] == pytest.approx(1 - made["expert_hits"])
        assert made["expert_hits_recorded"] > made["expert_hits_even"] == 5 / 16
        assert result["command"].count("made.json") == 1 and str(tmp_path) not in out.read_text()
    assert bool(made["disk_mb"]) == bool(made["disk_share"]) == (where == "disk")
    assert made["expert_slots"] == 5 and made["model"].endswith(f"routing {Path(routing).name}")
    assert made["floor_ms"] > 0 and made["backend"]["experts"] == where


def test_the_command_without_a_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row, whose numbers are held against the same numbers in fp32. It is shown like others."""
    monkeypatch.setattr(Lead, "start", lambda _, *arguments: Here(*arguments))
    monkeypatch.setattr(rates, "_best", partial(rates._best, repeats=3))
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(draw, "_draw_packed", lambda *a, f=draw._draw_packed: made.append(f(*a)))
    asked = "--shape tiny --layers 3 --device cpu --dtype bf16 --quant int8 --routing fresh"
    where = "--experts host --expert-policy resident --expert-slots 6 --no-baseline"
    sizes = f"--prompt 20 --new 8 -r 1 --output-file {tmp_path / 'result.json'}"
    assert bench.main(f"{asked} {where} {sizes}".split()) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    (found,) = result["rows"]
    assert found["kind"] == "together" and found["parity"] and found["positions"] == 8
    assert found["arm"] == "quant=int8 + experts=host + expert_policy=resident + expert_slots=6"
    assert found["experts_hit"] == 4 and found["expert_slots"] == 6 and found["link_mb"] > 0
    assert found["quant_kl"] is None and found["speedup"] is None and found["same_text"] == 1
    assert len(made) > 2 * 3 * 16, "no plain number was made of an expert"
    assert "Nothing was measured beside it" in result["notes"][0]
    assert bench.main(["--show", str(tmp_path / "result.json")]) == 0
    assert found["arm"] in capsys.readouterr().out


def test_without_a_baseline_nothing_is_beside_it() -> None:
    for more in ("--only alone", "--ablate"):
        with refused("--no-baseline measures all switches", f"leave {more.split()[0]} out"):
            plan.check(parser(EMBEDDED).parse_args(["--no-baseline", *more.split()]))


def test_slots_that_take_all_leave_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms are then measured one after the other; else as many as both memories hold."""
    monkeypatch.setattr(bench_measure, "available_bytes", lambda _: 10**12)

    def fit(**switches: Any) -> int:
        base = Arm("baseline", "baseline", Backend(device="cpu", **switches))
        return bench_measure.how_many_fit([base], WORK, TINY)

    assert fit() > 1 and fit(**HOST) > 1 and fit(experts="host") == 1


def test_devices_copy_at_a_time() -> None:
    """The link's rate is that of all at once: they meet before each repetition."""
    met: list[None] = []
    assert link_rate(torch.device("cpu"), lambda: met.append(None)) > 1e8
    assert len(met) == 10


@pytest.mark.parametrize("quant", ["int4", "int8", "fp8"])
def test_packed_numbers_are_drawn(quant: str) -> None:
    """About as large as others, finite, no expert like another, and always the same.

    Their mean is 0: otherwise a router's tokens all choose the same few experts.
    """
    backend = resolve(Backend(device="cpu", dtype="fp32", quant=quant), TINY)
    models = [build.from_shape(TINY, backend, seed=seed, packed=True) for seed in (0, 0, 1)]
    experts, again, other = (sparse(each)[0].experts.gate_proj.dense() for each in models)
    assert experts.isfinite().all() and abs(experts.square().mean().sqrt() / 0.02 - 1) < 0.1
    assert experts.mean().abs() < 4 * 0.02 / experts.numel() ** 0.5
    assert torch.equal(experts, again) and not torch.equal(experts, other)
    assert not torch.equal(experts[0], experts[1])
    assert models[0].norm.weight.eq(1).all()


def test_a_workload_names_its_routing() -> None:
    work = Workload(None, "tiny", None, 1, 8, 4, 0, 0, routing="fresh")
    assert work.name == "tiny, random weights, routing fresh"
