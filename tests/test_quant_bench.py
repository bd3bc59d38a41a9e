"""Quantized arms of the benchmark: their two parities, their bytes, and where they stand.

Holds to account: r1/bench/worker/dequantized.py, and what r1/bench/arms.py, ablation.py,
worker/reading.py, report and r1/roofline.py make of `quant`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from r1 import build
from r1.bench import arms
from r1.bench.ablation import ablation, ladder_steps
from r1.bench.arms import TEXTBOOK
from r1.bench.process import Answer
from r1.bench.report.fields import FIELDS
from r1.bench.report.table import COLUMNS
from r1.bench.worker import dequantized
from r1.bench.worker.serve import COMMANDS
from r1.bench.worker.subject import Subject
from r1.bench.workload import Workload
from r1.model.shapes import shape
from r1.roofline import step_work
from r1.storage.int4 import Int4
from r1.switches.backend import Backend
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

WORK = Workload(None, "tiny", None, 2, 8, 6, 0, 0)
TINY = shape("tiny")


def test_where_quantized_arms_stand() -> None:
    """A format is an effect like others; quant=auto keeps the checkpoint's in all arms."""
    base, int4 = arms.from_switches({"quant": "int4"})
    assert (base.backend.quant, int4.name, int4.backend.quant) == ("none", "quant=int4", "int4")
    kept = arms.from_switches({"quant": "auto", "compile": True})
    assert [a.backend.quant for a in kept] == ["auto", "auto"]
    assert ladder_steps({"quant": "int8"}, Machine(), 1)[-1] == {"quant": "int8"}
    assert not any("quant" in step for step in ladder_steps({}, Machine(), 1))
    assert ladder_steps({"quant_head": "fp8"}, Machine(), 1)[-1] == {"quant_head": "fp8"}
    assert not any("quant_head" in step for step in ladder_steps({"quant": "int8"}, Machine(), 1))
    rungs = ablation({"quant": "int8"}, Machine(), 1, ["ladder"])
    assert [a.backend.quant for a in rungs[-2:]] == ["none", "int8"]
    assert all(a.backend.quant == "auto" for a in ablation({"quant": "auto"}, Machine(), 1))


def arm(folder: Path, **switches: Any) -> Subject:
    """An arm's process, in this one, ready for the command "parity"."""
    plain = Subject(Backend(device="cpu", dtype="fp32", **TEXTBOOK), WORK, folder)
    COMMANDS["build_reference"](plain)
    COMMANDS["reference"](plain, [])
    subject = Subject(Backend(device="cpu", dtype="fp32", **switches), WORK, folder)
    subject.build()
    return subject


def parity(subject: Subject) -> Answer:
    return COMMANDS["parity"](subject)


@pytest.mark.parametrize(
    "switches", [{"quant": "fp8"}, {"quant": "int8"}, {"quant": "int4"}, {"quant_head": "int8"}]
)
def test_two_parities(switches: dict[str, str], tmp_path: Path) -> None:
    """Against its own numbers an arm is exact; against the original's it is not."""
    subject = arm(tmp_path, **switches)
    before = dict(subject.engine.model.named_modules())
    slots = {id(value) for _, _, value in dequantized._slots(subject.engine.model)}
    found = parity(subject)
    assert found["passes"] and found["mean_kl"] < 1e-9
    assert found["quantizing"]["mean_kl"] > 1e-6 > found["mean_kl"]
    assert 0 <= found["quantizing"]["top1_agreement"] <= 1
    # The model is as it was before, down to the objects.
    assert dict(subject.engine.model.named_modules()) == before
    assert {id(value) for _, _, value in dequantized._slots(subject.engine.model)} == slots
    assert parity(subject) == found


def test_wrong_arithmetic_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that forget a part of the numbers, while `dense` is right."""
    subject = arm(tmp_path, quant="int4")

    def wrong(self: Int4, x: torch.Tensor) -> torch.Tensor:
        weight = self.dense(x.dtype)
        return torch.nn.functional.linear(x[..., 1:], weight[:, 1:])

    monkeypatch.setattr(Int4, "matmul", wrong)
    assert not parity(subject)["passes"]


def test_an_arm_that_is_not_quantized_has_one_parity(tmp_path: Path) -> None:
    found = parity(arm(tmp_path))
    assert found["passes"] and found["quantizing"] is None


def test_the_row_tells_the_cost() -> None:
    cell = COLUMNS["quantizing: KL, top-1"].cell
    assert {"quant_kl", "quant_top1"} <= FIELDS.keys()
    assert cell({"quant_kl": 0.0121, "quant_top1": 0.9}) == "1.2e-02, 0.900"
    assert cell({"quant_kl": None, "quant_top1": None}) == "" == cell({})


def test_a_step_moves_the_bytes_that_are_stored() -> None:
    """int4 moves less than half of bf16's bytes; the head and kv_b_proj stay in bf16."""
    works = {}
    for kind in ("none", "int8", "int4"):
        backend = resolve(Backend(device="cpu", dtype="bf16", quant=kind), TINY)
        works[kind] = step_work(TINY, backend, 1, 1, 0, 4)
        model = build.sketch(TINY, backend)
        assert model.lm_head.matrix.nbytes == 320 * 160 * 2
    assert works["none"].flops == works["int8"].flops == works["int4"].flops
    layer = dataclasses.replace(works["none"]).weight_bytes
    assert 0.5 * layer < works["int8"].weight_bytes < 0.75 * layer
    assert works["int4"].weight_bytes < 0.5 * layer


def test_the_same_weights_in_every_arm(tmp_path: Path) -> None:
    """The quantized arm of a shape is the baseline's model, rounded."""
    subject = arm(tmp_path, quant="int8")
    cost = parity(subject)["quantizing"]["mean_kl"]
    other = Subject(subject.backend, dataclasses.replace(WORK, seed=5), tmp_path)
    other.build()
    assert parity(other)["quantizing"]["mean_kl"] > 10 * cost
