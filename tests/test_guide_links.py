"""What the guide says of experts in host memory or on disk, of stages, and of links.

Holds to account: r1/guide/links.py, setup.py, layouts.py, notes.py.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r1 import build
from r1.footprint import Sizes
from r1.guide import fit, gpus, links, measured
from r1.guide.answer import Answer, Question
from r1.guide.cost import Terms
from r1.guide.layouts import setups
from r1.guide.notes import notes
from r1.guide.predict import Predictor
from r1.guide.setup import ON_DEVICE, Places, Setup
from r1.model.shapes import SHAPES
from r1.roofline import Work, step_work

RESULTS = Path(__file__).parents[1] / "tools" / "measure" / "results" / "h100"
SIZES = Sizes(1, 128, 128)
HOST, DISK = Places("host"), Places("disk")
PREDICTOR = Predictor(measured.committed(), drive_gb_s=5.0)
QUESTION = Question(SIZES, None, None, Terms(0.15), PREDICTOR)
NUMBERS = 3 * 2048 * 1408
"""Of one expert of Moonlight's shape; 26 layers have 64 of them, and a token visits 6."""


def layouts(
    model: str, gpu: str, quant: str, count: int = 1, places: Places = ON_DEVICE
) -> Iterator[Setup]:
    return setups(model, SHAPES[model], gpus.gpu(gpu), quant, count, places)


def ask(model: str, gpu: str, **changes: Any) -> Answer:
    return replace(QUESTION, **changes).ask(model, SHAPES[model], gpus.gpu(gpu))


# ---------------------------- experts elsewhere
def test_missed_experts_come_over_the_link() -> None:
    """6 visits of 26 layers, of which 16 of 64 slots lack three quarters, at a measured rate."""
    (setup,) = layouts("moonlight-16b", "h100", "none", places=HOST)
    assert setup.expert_bytes == 26 * NUMBERS * 2
    work = links.with_fetches(setup, Work(1e9, 0, 0), 6, 16)
    assert work.link_bytes == 6 * 0.75 * 26 * NUMBERS * 2 and work.disk_bytes == 0
    rates = PREDICTOR.rates(setup.gpu)
    assert rates.link == pytest.approx(55e9, rel=0.03)
    parts = links.parts_ms(setup, work, rates, 1)
    assert parts["host link"] == pytest.approx(1e3 * work.link_bytes / rates.link)
    assert 1e3 * rates.seconds(work) == parts["host link"] > parts["memory"]
    assert links.with_fetches(setup, work, 6, 64).link_bytes == 0
    other = PREDICTOR.rates(gpus.gpu("4090")).link
    assert other == pytest.approx(rates.link / 2, rel=0.03), (
        "half the lanes' rate, the same share of it"
    )


def test_experts_of_each_rank_have_their_own_slots() -> None:
    """Two ranks with half of the experts each visit half as many, and hold twice the share."""
    two = next(s for s in layouts("moonlight-16b", "h100", "none", 2, HOST) if s.backend.ep == 2)
    work = links.with_fetches(two, Work(1e9, 0, 0), 6, 16)
    assert work.link_bytes == 3 * 0.5 * 26 * NUMBERS * 2


def test_files_are_read_as_they_are_published() -> None:
    """In 4 bit the link moves a quarter of what the drive reads of bf16 files, less the cache."""
    (setup,) = layouts("moonlight-16b", "4090", "int4", places=DISK)
    work = links.with_fetches(setup, Work(1e9, 0, 0), 6, 16)
    assert setup.file_bytes == 26 * NUMBERS * 2 and setup.cached() == 1
    assert work.disk_bytes == pytest.approx(6 * 0.75 * setup.file_bytes * (1 - 1 / 48))
    half = replace(setup, places=Places("disk", 24 * setup.expert_bytes))
    assert half.cached() == 24
    found = links.with_fetches(half, Work(1e9, 0, 0), 6, 16).disk_bytes
    assert found == pytest.approx(6 * 0.75 * setup.file_bytes / 2)
    rates = PREDICTOR.rates(setup.gpu)
    parts = links.parts_ms(setup, work, rates, 1)
    assert parts["drive"] == pytest.approx(1e3 * work.disk_bytes / 5e9)
    assert 1e3 * rates.seconds(work) == parts["drive"] > parts["host link"]


@pytest.mark.parametrize(("model", "gpu"), [("r1", "4090"), ("moonlight-16b", "3060")])
def test_slots_are_as_many_as_fit_and_cost_what_the_loader_counts(model: str, gpu: str) -> None:
    (setup,) = layouts(model, gpu, "int8" if gpu == "3060" else "int4", places=HOST)
    slots, memory = setup.slots(SIZES), setup.memory(SIZES)
    assert 0 < slots < setup.config.experts.n_routed_experts
    assert memory.total <= setup.gpu.capacity < setup.with_slots(SIZES, slots + 1).total
    asked = replace(setup.backend, expert_slots=slots)
    assert memory.weights == build.weight_bytes(setup.config, asked)
    long = replace(SIZES, prompt=4096)
    more = replace(long, rows=fit.most_rows(setup, long))
    assert 0 < setup.slots(more) < slots, "more rows leave fewer slots"
    assert not setup.fits(replace(more, rows=more.rows + 1))


def test_host_memory_has_to_hold_them() -> None:
    enough = ask("r1", "4090", places=(Places("host", 400e9),))
    assert enough.setup and enough.setup.place == "in 337 GB of RAM"
    assert ask("r1", "4090", places=(Places("host", 300e9),)).setup is None
    disk = ask("r1", "4090", places=(Places("disk", 200e9),))
    assert disk.setup and disk.first.times.floor_tpot_ms > enough.first.times.floor_tpot_ms


@pytest.mark.parametrize(
    ("model", "gpu", "why"),
    [
        ("r1-distill-qwen-7b", "h100", "no routed experts"),
        ("moonlight-16b", "spark", "no RAM beside"),
        ("moonlight-16b", "epyc", "no RAM beside"),
    ],
)
def test_where_experts_can_not_lie_in_ram(model: str, gpu: str, why: str) -> None:
    found = ask(model, gpu, places=(HOST,))
    assert found.setup is None and why in found.why_not
    assert ask(model, gpu).setup, "on the device they can"


def test_experts_in_ram_are_the_last_resort() -> None:
    """Only where no number of GPUs is enough."""
    one = ask("r1", "4090", count=1)
    assert one.setup and one.setup.places == HOST and one.setup.stored == "int4"
    assert one.first.times.slowest == "host link"
    small = ask("moonlight-16b", "3060", places=(HOST,))
    assert small.setup and small.setup.stored == "int4", "the smallest, for the link is slow"
    assert ask("r1", "5090", count=1).first.times.floor_ttft_ms, "its copies bound a prompt"
    many = ask("r1", "4090")
    assert many.setup and many.setup.places == ON_DEVICE and many.setup.count == 16


def test_a_time_is_expected_from_rows_of_the_same_kind() -> None:
    """10 ms more than the copies were measured with experts in RAM: so much is expected of as many
    layers.
    """
    here = [each for each in measured.committed() if each.experts == "device"]
    row = next(r for r in here if r.fused and r.tpot_ms)
    streamed = replace(row, experts="host", captured=False, model="r1", floor_ms=10.0, tpot_ms=20.0)
    before = ask("r1", "4090", count=1, predictor=Predictor(here)).first.times
    assert before.expected_tpot_ms is before.expected_ttft_ms is before.step_row is None
    predictor = Predictor((*here, streamed))
    after = ask("r1", "4090", count=1, predictor=predictor).first.times
    assert after.step_row == streamed
    more = 10 / row.layers * SHAPES["r1"].num_hidden_layers
    assert after.expected_tpot_ms == pytest.approx(after.floor_tpot_ms + more)
    device = ask("moonlight-16b", "4090", predictor=predictor).first.times
    assert device.step_row and device.step_row.experts == "device"
    first = after.floor_ttft_ms or 0.0
    share = streamed.prompt_floor_ms / streamed.ttft_ms
    assert after.expected_ttft_ms == pytest.approx(first / share)
    assert streamed.decodes and not replace(streamed, experts="device").decodes


# ---------------------------- stages and hosts
def test_stages_take_turns() -> None:
    """Two stages move the bytes of one device that had room for both, and hold about half each."""
    config, h200 = SHAPES["moonlight-16b"], gpus.gpu("h200")
    (one,) = layouts("moonlight-16b", "h200", "none")
    two = replace(one, backend=replace(one.backend, pp=2, cuda_graphs=False))
    both = [PREDICTOR.times(each, replace(SIZES, rows=8)) for each in (one, two)]
    assert both[0].floor_tpot_ms == both[1].floor_tpot_ms
    assert both[1].floor_ttft_ms == pytest.approx((both[0].floor_ttft_ms or 0) / 2)
    assert both[1].expected_tpot_ms is None and both[0].expected_tpot_ms
    half = step_work(config, one.backend, 4, 1, 192, 64 * (1 - (1 - 6 / 64) ** 4))
    staged = 1e3 * PREDICTOR.rates(h200).seconds(half)
    assert both[0].staged_floor_ms is None and both[1].staged_floor_ms == pytest.approx(staged)
    assert 0.5 < staged / both[1].floor_tpot_ms < 1
    weights = [each.memory(SIZES).weights for each in (one, two)]
    assert 0.5 <= weights[1] / weights[0] < 0.55
    three = replace(one, backend=replace(two.backend, pp=3))
    stages = [three.memory(SIZES).weights, build.weight_bytes(config, three.backend)]
    assert stages[0] == stages[1] > 11e9, "the second stage is larger than the first, by 1 GB"


def test_layers_are_shared_in_a_host_and_stages_join_hosts() -> None:
    many = ask("r1", "4090")
    assert many.setup and many.setup.layout == "TP 8 x PP 2" and many.setup.hosts == 2
    assert many.first.tokens_per_s is None and many.first.cost is None
    assert "2 hosts are needed" in (many.first.times.only_floor or "")
    spark = ask("r1", "spark")
    assert spark.setup and spark.setup.layout == "PP 4" and spark.setup.hosts == 4
    heads = ask("r1-distill-qwen-7b", "h100", count=8)
    assert heads.setup and heads.setup.layout == "TP 4 x PP 2", "four heads of keys can't be eight"


def test_sums_that_were_not_measured_are_not_expected() -> None:
    """NVLink's latency stands in for NVLink; cards that talk through the host have the floor."""
    assert ask("r1", "h200").first.tokens_per_s
    cards = ask("r1-distill-llama-70b", "4090")
    assert cards.setup and cards.setup.count == 2
    assert "through the host" in (cards.first.times.only_floor or "")
    a40 = gpus.gpu("a40")
    pair, four = (next(layouts("moonlight-16b", "a40", "none", n)) for n in (2, 4))
    seconds = [links.exchange_seconds(s.config, s.backend, a40, 1) for s in (pair, four)]
    assert seconds[0] and seconds[1] is None, "its bridge joins two"


def test_a_small_step_waits_for_launches() -> None:
    tiny = ask("tiny", "h100").first.times
    assert tiny.expected_tpot_ms is None and "waits for launches" in (tiny.only_floor or "")


def test_a_row_of_several_devices_has_its_sums_taken_off() -> None:
    """So its share is that of one device, and sums are not counted twice."""
    row = next(r for r in measured.committed() if r.fused and r.tpot_ms)
    assert row.tpot_ms
    shared = replace(row, ranks=2, tpot_ms=row.tpot_ms + 1.5, exchange_ms=1.5)
    assert shared.share == pytest.approx(row.share) and shared.work != row.work


def test_a_result_tells_its_link(tmp_path: Path) -> None:
    """110 MB a step at half the link's rate; a prompt that copies for most of its time."""
    found = json.loads((RESULTS / "kernels" / "batch-8.json").read_text(encoding="utf-8"))
    for row in found["rows"]:
        row["backend"] |= {"experts": "host", "cuda_graphs": False}
        row |= {"link_share": 0.5, "link_mb": 110.0, "prompt_link_share": 0.75}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(found))
    rows = measured.rows_of(file)
    for row, given in zip(rows, found["rows"], strict=True):
        assert row.kind == (False, "host", False) and row.decodes and row.tpot_ms
        assert row.link_gb_s == pytest.approx(110 / row.tpot_ms / 0.5, rel=0.01)
        assert row.prompt_share * row.ttft_ms == pytest.approx(0.75 * given["ttft_ms"], rel=1e-4)
        assert "experts on host" in row.describe()
    link = statistics.median(row.link_gb_s or 0.0 for row in rows) * 1e9
    assert Predictor(rows).rates(gpus.gpu("h100")).link == pytest.approx(link)
    assert Predictor(rows).rates(gpus.gpu("h200")).link == pytest.approx(55e9)


def test_every_card_has_a_link_and_no_computer_has() -> None:
    for gpu in gpus.all_gpus().values():
        assert gpu.get("host_link_gb_s") in ({None} if gpu.computer else {32, 64}), gpu.name
    assert [g.name for g in gpus.all_gpus().values() if g.linked == 2] == ["a40"]


# ---------------------------- what is said
def said(answer: Answer, smaller: Answer | None = None) -> str:
    return "\n".join(notes(answer, PREDICTOR, smaller))


def test_the_slowest_part_is_named() -> None:
    one = ask("r1", "4090", count=1)
    text = said(one)
    assert "The slowest is: host link." in text and "host link 28 GB/s" in text
    slots = one.first.times.slots
    assert f"slots for {slots} of 256" in text and f"--expert-slots {slots}" in text
    assert (
        f"{1 - slots / 256:.0%} of the experts" in text
        and "a layer beside its experts' copies" in text
    )
    disk = said(ask("r1", "4090", places=(Places("disk", 64e9),)))
    assert "The slowest is: drive." in disk and "drive 5 GB/s" in disk
    assert "654 GB of files" in disk, "R1's are FP8"
    assert "sums between GPUs 0.312 ms" in said(ask("r1", "h100"))


def test_stages_and_the_smaller_way_are_told() -> None:
    many, one = ask("r1", "4090"), ask("r1", "4090", count=1)
    text = said(many, one)
    assert "a token waits for all 2" in text and "Floor only: 2 hosts" in text
    rate = f"{one.first.floor_tokens_per_s:.3g} tokens/s"
    assert f"Or one RTX 4090, int4, experts in 337 GB of RAM: at most {rate}" in text
    assert "Or one" not in said(many)
