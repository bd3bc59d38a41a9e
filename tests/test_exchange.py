"""The sums over devices in bench.py: their arms, and what a row says of them.

Holds to account: r1/bench/exchange.py, and the switch `allreduce` in r1/bench/arms.py and
r1/bench/ablation.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding import PROMPTS
from ranks import Ranks
from test_parallel import H100, SPREAD, engine_of, saved
from torch import Tensor

from r1 import Backend
from r1.bench import ablation, arms, exchange, timeline
from r1.bench.report import table
from r1.bench.worker import profiling
from r1.bench.workload import Workload
from r1.placement.collectives import Gather, Sum
from r1.placement.ranks import Crew
from r1.switches.resolve import resolve


# ---------------------------- bench.py
def test_arms_have_the_devices_that_add_up() -> None:
    given = {"tp": 2, "join": "off", "allreduce": "symm"}
    made = {arm.name: arm.backend for arm in arms.from_switches(given, arms.KINDS)}
    assert made["tp=2 + allreduce=symm"].tp == 2
    assert made["all but tp=2"].allreduce == "auto" and made["all but tp=2"].join == "off"
    assert made["all but allreduce=symm"] == Backend(tp=2, join="off", quant="none")
    assert (made["all but join=off"].tp, made["all but join=off"].allreduce) == (2, "symm")
    both = {"tp": 2, "ep": 2, "allreduce": "symm", "join": "off"}
    made = {arm.name: arm.backend for arm in arms.from_switches(both, arms.KINDS)}
    assert (made["all but tp=2"].tp, made["all but tp=2"].allreduce) == (1, "symm")


@pytest.mark.parametrize("given", [{}, {"allreduce": "nccl"}, {"allreduce": "symm"}])
def test_the_ladder_ends_with_it(given: dict[str, Any]) -> None:
    """Every arm can run, or torchrun started no processes to add up."""
    kind = given.get("allreduce", "triton")
    made = ablation.ablation({"tp": 2, **given}, H100, 1, config=SPREAD)
    for arm in made:
        assert arm.backend.allreduce == "auto" or arm.backend.tp == 2, arm.name
        resolve(arm.backend, SPREAD, H100)
    assert [a for a in made if a.kind == "ladder"][-1].backend.allreduce == kind
    assert any(arm.name == f"allreduce={kind} (with tp=2)" for arm in made)
    assert all(a.backend.allreduce == "auto" for a in ablation.ablation({}, H100, 1, config=SPREAD))


# ---------------------------- what a row says of it
def test_each_rank_writes_a_trace_of_its_own(tmp_path: Path) -> None:
    """All at the same time, and into one folder."""

    def rank(number: int) -> Path:
        subject = SimpleNamespace(folder=tmp_path, place=Crew(number, 2))
        profiled = SimpleNamespace(
            export_chrome_trace=lambda path: Path(path).write_text(f"{number}")
        )
        return profiling._export(subject, profiled)  # type: ignore[arg-type]

    assert [path.read_text() for path in [rank(0), rank(1)]] == ["0", "1"]


def test_time_of_what_devices_exchange() -> None:
    """The kernels' own time, and what of it no other kernel hides."""
    spans = [("gemv_kernel", 0, 6), ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(args)", 4, 5)]
    spans += [("void c10d::one_shot_all_reduce_kernel<T, 16>(T**)", 10, 2)]
    spans += [("all_reduce_kernel", 12, 4), ("sum_kernel", 16, 4)]
    events = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": length, "args": {}}
        for name, start, length in spans
    ]
    trace = {"traceEvents": [*events, {"ph": "X", "cat": "cpu_op", "name": "nccl", "dur": 9}]}
    assert exchange.busy_us(trace) == 5 + 2 + 4
    assert exchange.exposed(timeline.parts(trace)) == pytest.approx((3 + 2 + 4) / 20)
    work = Workload(None, "tiny", None, 2, 8, 8, 0, 0)
    backend = resolve(Backend(tp=2), SPREAD, H100)
    kernels = {"parts": timeline.parts(trace), "exchange_us": exchange.busy_us(trace)}
    made = exchange.fields(work, SPREAD, backend, kernels)
    assert made["exchange_ms"] == 0.011 and table.COLUMNS["exchange ms"].cell(made).startswith(
        "0.011 (45% exposed)"
    )
    assert exchange.fields(work, SPREAD, Backend(), kernels) == {}


def handed_over(folder: Path, switches: dict[str, Any]) -> tuple[int, int]:
    """The bytes that this rank hands to sums and gathers in a decode step, and the estimate."""
    engine, counted = engine_of(folder, switches), [0]

    def counting(method: Any) -> Any:
        def call(self: Any, x: Tensor) -> Tensor:
            counted[0] += x.nbytes
            return method(self, x)

        return call

    cache = engine.cache(len(PROMPTS), 64)
    engine.runner.prefill(PROMPTS, cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sum, "__call__", counting(Sum.__call__))
        patch.setattr(Gather, "rows", counting(Gather.rows))
        engine.runner.decode(torch.ones(len(PROMPTS), 1, dtype=torch.int64), cache)
    rows = len(PROMPTS)
    return counted[0], exchange.handed_bytes(engine.config, engine.backend, rows)


@pytest.mark.parametrize("switches", [{"tp": 2}, {"ep": 2}], ids=str)
def test_bytes_that_devices_exchange(
    ranks: Ranks, tmp_path: Path, switches: dict[str, Any]
) -> None:
    for counted, estimate in ranks.run(2, handed_over, saved(SPREAD, tmp_path / "m"), switches):
        assert counted == estimate
