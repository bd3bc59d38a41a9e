"""The estimate of memory, against the peaks that GPUs had, and its place in the loader.

Holds to account: r1/footprint.py, and `scratch` of the strategies.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import TINY
from refusals import refused

from r1 import build
from r1.files.config_json import parse_config
from r1.footprint import HEADROOM, Sizes, footprint, least, module_bytes
from r1.model.shapes import SHAPES
from r1.roofline import model_of
from r1.switches.backend import Backend
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

RESULTS = Path(__file__).parents[1] / "tools" / "measure" / "results"
OLDER = ("h100/qwen-7b-int4.json", "h100/qwen-32b-int4.json")
"""Measured when torch made the packed weights of a prompt dense, which took more memory."""
LEAST_GB = 1.0
"""Of a smaller model the libraries' memory is most, and nobody needs to know it to 3%."""
H100 = Machine(cuda=True, name="H100", capability=(9, 0))


def measured() -> list[Any]:
    """Each committed row of a GPU: its config, its switches, and the row."""
    cases = []
    for path in sorted(RESULTS.rglob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if path.relative_to(RESULTS).as_posix() in OLDER:
            continue
        for row in found["rows"] if "schema" in found else []:
            if not row.get("refused") and (row.get("allocated_gb") or 0) >= LEAST_GB:
                name = f"{path.stem}: {row['arm']}, batch {row['batch']}"
                cases.append(pytest.param(found["config"], row, id=name))
    return cases


@pytest.mark.parametrize(("config", "row"), measured())
def test_the_peak_within_three_percent(config: dict[str, Any], row: dict[str, Any]) -> None:
    """Of every row of bf16 within 1%."""
    known = {name: value for name, value in row["backend"].items() if hasattr(Backend, name)}
    backend = Backend(**known)
    mtp = backend.speculate == "mtp"
    model = model_of(parse_config(config), backend, mtp)
    sizes = Sizes(row["batch"], row["prompt"], row["new"], row["depth"])
    placed = replace(backend, expert_slots=row.get("expert_slots") or 0)
    weights = build.weight_bytes(parse_config(config), placed, mtp=mtp)
    estimate = footprint(model, backend, sizes, weights)
    bound = 0.01 if backend.quant == "none" else 0.03
    assert estimate.total / 1e9 == pytest.approx(row["allocated_gb"], rel=bound)


def test_the_committed_rows_need_more_than_weights_and_cache() -> None:
    """Else the test above would pass without any activations."""
    worst = 0.0
    for config, row in (case.values for case in measured()):
        backend = Backend(**{n: v for n, v in row["backend"].items() if hasattr(Backend, n)})
        model = model_of(parse_config(config), backend, backend.speculate == "mtp")
        sizes = Sizes(row["batch"], row["prompt"], row["new"], row["depth"])
        rest = footprint(model, backend, sizes).beside / 1e9
        worst = max(worst, rest / row["allocated_gb"])
    assert worst > 0.03


def test_the_loader_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1's experts, copied beside each token, need more than HEADROOM: so the loader says."""
    config = SHAPES["r1"].change(num_hidden_layers=4)
    backend = resolve(Backend(dtype="bf16"), config, H100)
    backend = replace(backend, device="cpu")
    model = build.sketch(config, backend)
    beside = least(model, backend)
    assert beside > 1.5 * HEADROOM
    free = module_bytes(model) + beside
    monkeypatch.setattr(build, "available_bytes", lambda _: free - 1)
    with refused(rf"needs {free / 1e9:.1f} GB"):
        build.allocate(config, backend, mtp=False)


def test_more_of_anything_needs_more() -> None:
    backend = resolve(Backend(device="cpu"), TINY)
    model = model_of(TINY, backend, False)
    small = footprint(model, backend, Sizes(2, 300, 20))
    assert small.weights == module_bytes(model)
    assert small.total == small.weights + small.cache + small.activations, "no GPU, no libraries"
    for larger in (
        Sizes(4, 300, 20),
        Sizes(2, 600, 20),
        Sizes(2, 300, 400),
        Sizes(2, 300, 20, 900),
    ):
        assert footprint(model, backend, larger).total > small.total


def test_a_captured_step_keeps_its_memory() -> None:
    config = SHAPES["moonlight-16b"]
    plain = resolve(Backend(), config, H100)
    captured = replace(plain, cuda_graphs=True)
    model = model_of(config, plain, False)
    needs = [footprint(model, each, Sizes(8, 512, 64)) for each in (plain, captured)]
    assert needs[0].graphs == 0 < needs[1].graphs
    assert needs[0].total < needs[1].total


def test_packed_numbers_need_room_to_be_unpacked() -> None:
    """A prompt's grouped product makes a layer's experts dense; the kernels read them packed."""
    config = SHAPES["moonlight-16b"]
    asked = Backend(quant="fp8", kernels="triton")
    grouped, kernels = (
        resolve(replace(asked, prefill_moe=moe), config, H100) for moe in ("grouped", "triton")
    )
    model = model_of(config, grouped, False)
    stack = 64 * 2 * 1408 * 2048 * 2
    needs = [footprint(model, each, Sizes()).activations for each in (grouped, kernels)]
    assert needs[0] > 2 * stack > 2 * needs[1]
