"""The guide's data, its predictions against committed rows, and its arithmetic.

Holds to account: r1/guide, tools/measure/make_guide.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import make_guide
import pytest
from refusals import refused

from r1.bench.rates import Rates
from r1.footprint import Sizes
from r1.guide import calibrate, cost, fit, gpus, measured, predict, ranking
from r1.guide.answer import Answer, Question, power_share, within
from r1.guide.cost import Terms
from r1.guide.layouts import setups
from r1.guide.links import exchange_seconds
from r1.guide.measured import Measured
from r1.guide.predict import Like, Predictor
from r1.guide.setup import ON_DEVICE, Setup, find_model, precisions
from r1.guide.steps import UNPACK_PS, Packed, packed
from r1.model.shapes import SHAPES
from r1.roofline import expected_experts, step_work

BEST = measured.best(measured.committed())
TERMS = Terms(0.15)
PREDICTOR = Predictor(measured.committed())
QUESTION = Question(Sizes(1, 128, 128), None, None, TERMS, PREDICTOR)


def answer(model: str, gpu: str, question: Question = QUESTION) -> Answer:
    return question.ask(*find_model(model), gpus.gpu(gpu))


def setup(model: str, gpu: str, quant: str = "none", count: int = 1) -> Setup:
    return next(setups(*find_model(model), gpus.gpu(gpu), quant, count))


# ---------------------------- data
def test_every_figure_has_a_source_and_a_date() -> None:
    """And a unit in its name; a source that nothing uses is not there."""
    dated = re.compile(r"(read )?20\d\d(-\d\d){0,2}")
    used = {gpus.electricity()[1], gpus.drive()[1]}
    for gpu in gpus.all_gpus().values():
        assert set(gpu.figures) == set(gpu.sources)
        assert {"memory_gb", "bandwidth_gb_s", "board_w"} <= set(gpu.figures), gpu.name
        used |= set(gpu.sources.values())
    for source in used:
        assert dated.fullmatch(source.date), source
        assert source.url.startswith("http") or (Path(__file__).parents[1] / source.url).exists()
    assert used == {gpus.source(name) for name in gpus.read()["sources"]}
    units = r"_(gb|gb_s|tflop_s|top_s|w|us|usd|usd_per_hour)$"
    assert all(re.search(units, name) for name in gpus.FIGURES)


def test_the_machines_that_people_have_are_there() -> None:
    names = "3060 3090 4090 5090 7900xtx a40 a100 l40s h100 h200 b200 mi300x mi355x orin spark"
    assert set(gpus.all_gpus()) == {*names.split(), "m3-ultra", "epyc", "laptop"}
    with refused("--gpu 9999: give all, or one of 3060"):
        gpus.gpu("9999")


def test_measured_rows_are_those_of_the_committed_results() -> None:
    text = measured.FILE.read_text(encoding="utf-8")
    assert measured.dump(make_guide.rows()) == text, "run python tools/measure/make_guide.py"


# ---------------------------- time
CHECKED = [row for row in BEST if calibrate.check(row, BEST)]
"""A row that is the first of its kind can't be predicted from others."""


def test_rows_of_every_storage_are_checked() -> None:
    assert len(CHECKED) >= 9 and {row.quant for row in CHECKED} >= {"none", "fp8", "int4"}
    assert {row.batch for row in CHECKED} >= {1, 8, 32}


@pytest.mark.parametrize("row", CHECKED, ids=Measured.describe)
def test_a_row_is_predicted_from_the_others(row: Measured) -> None:
    """Within 15%, from rows of other work: the batch, the model, the storage or the kernels."""
    found = calibrate.check(row, BEST)
    assert found and found.start.work != row.work
    assert abs(found.error) < 0.15, found


PROMPTS = measured.best_prompts(measured.committed())


def other_prompts(row: Measured) -> list[Measured]:
    """Of the same kind, and of other work."""
    others = [each for each in PROMPTS if (each.work, each.prompt) != (row.work, row.prompt)]
    return [each for each in others if each.kind == row.kind]


@pytest.mark.parametrize(
    "row", [r for r in PROMPTS if other_prompts(r)], ids=lambda r: f"{r.describe()} {r.prompt}"
)
def test_a_prompt_is_predicted_roughly(row: Measured) -> None:
    """Within 2.2 times, from rows of other work: a host's speed changes by two in itself."""
    others, like, tokens = other_prompts(row), Like.of_row(row), row.batch * row.prompt
    predicted, start = predict.prompt_ms(
        row.prompt_floor_ms, others, like, tokens, row.step_gb * 1e9
    )
    assert start in others and 1 / 2.2 < predicted / row.ttft_ms < 2.2


def test_the_floor_is_not_the_expected_time() -> None:
    """Else the test above would pass for anything close to the floor."""
    assert any(row.floor_ms / (row.tpot_ms or 1) - 1 < -0.2 for row in BEST)


def test_the_floor_is_bench_pys() -> None:
    """With the rates of the row, bench.py's own floor_ms comes out, for uniform routing."""
    row = next(r for r in BEST if r.model.startswith("r1, 4 layers") and r.fused)
    config = SHAPES["r1"].change(num_hidden_layers=4)
    found = Setup("r1", config, gpus.gpu("h100"), setup("r1", "h100").backend)
    rates = Rates(row.copy_gb_s * 1e9, row.matmul_tflop_s * 1e12, 0.0, 0.0)
    hit = expected_experts(config, 1)
    work = step_work(config, found.backend, 1, 1, row.prompt + row.new / 2, hit)
    assert 1e3 * rates.seconds(work) == pytest.approx(row.floor_ms, rel=1e-4)


def test_a_measured_machine_has_its_measured_rates() -> None:
    h100, a100 = gpus.gpu("h100"), gpus.gpu("a100")
    rates = PREDICTOR.rates(h100)
    copies = [row.copy_gb_s for row in measured.committed()]
    assert min(copies) <= rates.copy / 1e9 <= max(copies)
    share = rates.copy / 1e9 / h100.figures["bandwidth_gb_s"]
    other = PREDICTOR.rates(a100)
    assert other.copy / 1e9 == pytest.approx(a100.figures["bandwidth_gb_s"] * share, rel=0.01)
    assert PREDICTOR.rates(gpus.gpu("3090")).matmul == float("inf"), "no source for its rate"


def test_the_nearest_row_is_of_like_kernels_and_storage() -> None:
    """Attention first, then fused kernels, sums, packed or not, the processors. Of rows that are as
    near, that of the more similar size, then of the more similar batch.
    """
    row = next(r for r in BEST if r.fused and r.latent and r.quant == "int4" and r.batch == 1)
    like, size = Like.of_row(row), row.step_gb * 1e9
    worse = [
        replace(row, copy_gb_s=row.copy_gb_s + 1),
        replace(row, machine="NVIDIA H200"),
        replace(row, quant="fp8"),
        replace(row, machine="another"),
        replace(row, quant="none"),
        replace(row, ranks=2),
        replace(row, fused=False),
        replace(row, latent=False),
    ]
    for number, nearest in enumerate(worse):
        assert predict.nearest(worse[number:][::-1], like, 1, size) is nearest, nearest
    larger = [replace(row, step_gb=row.step_gb * each) for each in (3, 1.5)]
    assert predict.nearest(larger, like, 1, size) is larger[1]
    several = [replace(row, batch=batch) for batch in (32, 8)]
    assert predict.nearest(several, like, 16, size) is several[0]
    assert predict.nearest([*several, row], like, 2, size) is several[1], "one token is unlike two"
    assert predict.nearest([], like, 1, 1e9) is None


def test_a_step_is_bytes_unpacking_and_layers() -> None:
    """A row gives its own time again; of an int4 step from an FP8 row the bytes halve, the numbers
    take longer each, and the layers as long.
    """
    row = next(r for r in BEST if r.quant == "fp8" and r.batch == 1 and r.ranks == 1)
    like, read = Like.of_row(row), row.read
    assert predict.step_ms(row.floor_ms, read, row, like) == pytest.approx(row.tpot_ms)
    halved = Packed(read.packed.nbytes / 2, read.packed.elements)
    half = replace(read, nbytes=read.nbytes - halved.nbytes, packed=halved, quant="int4")
    saved = 1e3 * halved.nbytes / read.copy
    more = (UNPACK_PS["int4"][0] - UNPACK_PS["fp8"][0]) * read.packed.elements / 1e9
    found = predict.step_ms(row.floor_ms / 2, half, row, like)
    assert found == pytest.approx((row.tpot_ms or 0) - saved + more)
    deeper = predict.step_ms(row.floor_ms, read, row, replace(like, layers=2 * row.layers))
    assert deeper - (row.tpot_ms or 0) == pytest.approx(row.layers * row.layer_ms)
    assert predict.step_ms(100.0, half, row, like) == 100.0, "never below the floor"
    assert replace(row, tpot_ms=0.1).layer_ms == 0.0, "faster than its bytes"


def test_packed_weights_are_counted() -> None:
    """Of Moonlight's shape all but the head, kv_b_proj and the router are packed."""
    config = SHAPES["moonlight-16b"]
    found = packed(config, setup("moonlight-16b", "h100", "int4").backend, 6)
    plain = packed(config, setup("moonlight-16b", "h100").backend, 6)
    assert 2.1 < found.elements / 1e9 < 2.3 and plain == Packed()
    assert 0.5 < found.nbytes / found.elements < 0.6


def test_nothing_is_expected_where_nothing_was_measured() -> None:
    found = answer("moonlight-16b", "epyc")
    assert found.first.times.floor_tpot_ms > 0 and found.first.tokens_per_s is None
    assert found.first.cost is None


def test_devices_that_share_a_model_exchange_sums() -> None:
    """By our own kernel on NVIDIA's GPUs, and a large sum by NCCL."""
    one, two = setup("moonlight-16b", "h100"), setup("moonlight-16b", "h100", count=2)
    assert exchange_seconds(one.config, one.backend, one.gpu, 1) == 0
    assert (one.backend.allreduce, two.backend.allreduce) == ("off", "triton")
    kernel, nccl = replace(two.backend), replace(two.backend, allreduce="nccl")
    for backend, tokens, figure in (
        (kernel, 1, "link_kernel_latency_us"),
        (nccl, 1, "link_latency_us"),
        (kernel, 1000, "link_latency_us"),
    ):
        latency = gpus.gpu("h100").figures[figure] * 1e-6
        moved = tokens * 2048 * 2 / 450e9
        found = exchange_seconds(two.config, backend, two.gpu, tokens)
        assert found == pytest.approx(2 * 27 * (latency + moved))
    amd = setup("moonlight-16b", "mi300x", count=2).backend
    assert (amd.kernels, amd.allreduce) == ("triton", "nccl")
    floor = [PREDICTOR.times(each, Sizes()).floor_tpot_ms for each in (one, two)]
    assert floor[1] < floor[0]


# ---------------------------- memory
def test_what_fits_and_what_does_not() -> None:
    """Published weights: 32 GB in bf16, half in FP8; R1 has 671 billion numbers."""
    h100, small = answer("moonlight-16b", "h100"), answer("moonlight-16b", "4090")
    assert h100.setup and small.setup and h100.memory and small.memory
    assert (h100.setup.stored, small.setup.stored) == ("bf16", "fp8")
    assert 31.9 < h100.memory.weights / 1e9 < 32 and small.memory.total < small.gpu.capacity
    r1 = answer("r1", "h200", replace(QUESTION, quant="fp8"))
    assert r1.setup and (r1.setup.count, r1.setup.stored) == (8, "fp8")
    here = replace(QUESTION, places=(ON_DEVICE,))
    assert answer("r1", "3060", replace(here, count=16)).setup is None
    assert answer("r1", "4090", replace(here, count=1)).setup is None


def test_the_most_rows_and_the_longest_row_fit_and_one_more_does_not() -> None:
    found = setup("r1-distill-qwen-32b", "4090", "int4")
    sizes = Sizes(1, 128, 128)
    rows, tokens = fit.most_rows(found, sizes), fit.longest(found, 1)
    assert 1 <= rows < fit.MOST_ROWS and 128 < tokens < found.config.max_position_embeddings
    assert found.fits(replace(sizes, rows=rows)) and not found.fits(replace(sizes, rows=rows + 1))
    assert found.fits(Sizes(1, tokens)) and not found.fits(Sizes(1, tokens + 1))


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 100])
def test_the_largest_number(limit: int) -> None:
    assert fit.largest(lambda n: n <= limit, 100) == limit
    assert fit.largest(lambda n: n <= limit, 8) == min(limit, 8)


def test_precisions() -> None:
    """What is published as FP8 is never widened; Ampere has no FP8, a CPU neither."""
    names = {name: gpus.gpu(name) for name in ("h100", "3090", "epyc", "7900xtx")}
    r1, moon = SHAPES["r1"], SHAPES["moonlight-16b"]
    assert precisions(r1, names["h100"]) == ["fp8", "int8", "int4"]
    assert precisions(moon, names["h100"]) == ["none", "fp8", "int8", "int4"]
    for name in ("3090", "epyc", "7900xtx"):
        assert precisions(r1, names[name]) == ["int8", "int4"]
    assert answer("moonlight-16b", "3090", replace(QUESTION, quant="fp8")).setup is None
    assert answer("moonlight-16b", "3090", replace(QUESTION, quant="int8")).setup


def test_a_prompt_is_shortened_to_the_context() -> None:
    short = within(Sizes(1, 8192, 8192), SHAPES["moonlight-16b"])
    assert (short.prompt, short.new) == (4096, 4096)


# ---------------------------- money
def test_the_arithmetic_of_cost() -> None:
    """Numbers that one can work out: 3.6 USD an hour, 1,000 tokens a second: 1 USD a million."""
    assert cost.rent_usd_per_million_tokens(3.6, 1000) == pytest.approx(1.0)
    year = cost.HOURS_PER_YEAR
    terms = Terms(usd_per_kwh=0.5, years=2, busy_share=0.5)
    # 1 USD an hour for the purchase, and 2 kW of power: 1 USD an hour.
    found = cost.own_usd_per_million_tokens(year, 2000, 1000, terms)
    assert found == pytest.approx(2 / 3.6)
    h100 = gpus.gpu("h100")
    both = cost.cost(h100, 2, 1000, terms)
    hourly = 2 * h100.figures["rent_usd_per_hour"]
    assert both.rent_usd_per_million_tokens == pytest.approx(hourly / 3.6)
    assert both.joules_per_token == pytest.approx(1.4), "two boards of 700 W"
    price = 2 * h100.figures["purchase_usd"]
    own = cost.own_usd_per_million_tokens(price, 1400, 1000, terms)
    assert both.own_usd_per_million_tokens == own
    nothing = cost.cost(gpus.gpu("orin"), 1, 1000, terms)
    assert nothing.rent_usd_per_million_tokens is nothing.own_usd_per_million_tokens is None
    assert nothing.least_usd_per_million_tokens is None


def test_the_power_of_a_measured_row() -> None:
    """350 W of an H100's 700: half of another board's power is expected too."""
    row = replace(next(r for r in BEST if r.fused), mean_power_w=350.0)
    assert power_share(row) == 0.5
    assert power_share(replace(row, mean_power_w=None)) is power_share(None) is None
    assert power_share(replace(row, machine="unknown")) is None
    half = cost.cost(gpus.gpu("4090"), 1, 100, TERMS, 0.5)
    assert (half.joules_per_token, half.expected_joules_per_token) == (4.5, 2.25)


def test_rankings_and_limits() -> None:
    one = replace(QUESTION, count=1, places=(ON_DEVICE,))
    answers = [answer("moonlight-16b", name, one) for name in ("h100", "3060", "epyc", "4090")]
    r1 = answer("r1", "4090", one)
    placed = ranking.ordered([r1, *answers])
    assert placed[-1] is r1 and placed[-2].gpu.name == "epyc"
    prices = [a.best.cost and a.best.cost.least_usd_per_million_tokens for a in placed[:3]]
    assert prices == sorted(price for price in prices if price)
    cheap = ranking.enough(placed, budget_usd=2000, min_tokens_per_s=None)
    assert {a.gpu.name for a in cheap} == {"3060", "4090"}
    fast = ranking.enough(placed, budget_usd=None, min_tokens_per_s=300)
    assert [a.gpu.name for a in fast] == ["h100"]
