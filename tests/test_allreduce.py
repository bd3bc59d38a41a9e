"""The sum over devices as a kernel of ours, and the switch that chooses who adds up.

Holds to account: r1/kernels/allreduce.py, r1/placement/symmetric.py and r1/switches/allreduce.py.

On a CPU the kernel runs under the interpreter, in several processes at a time, whose buffers are
one file that all of them map. tests/test_gpus.py runs it, and torch's kernels, on several GPUs, and
tests/test_exchange.py has what bench.py makes of the switch.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_parallel import SPREAD
from torch import Tensor

from r1 import Backend, InputError, build
from r1.placement import symmetric
from r1.placement.collectives import Sum
from r1.placement.mesh import Mesh
from r1.placement.parallel import Parallel
from r1.placement.symmetric import LIMITS, MappedSum, connect, limit
from r1.switches.allreduce import ALLREDUCE
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

pytest.importorskip("triton")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs kernels")

H100 = Machine(cuda=True, name="H100", capability=(9, 0))
MI300X = Machine(cuda=True, hip="7.0", arch="gfx942", name="MI300X")
MOST = 4096
"""Bytes of a slot in these tests: four programs."""


def part(rank: int, call: int, size: int, dtype: torch.dtype) -> Tensor:
    """A rank's part in a call: other numbers each time, zeros of both signs among them.

    They are whole and small, so that every sum is exact.
    """
    generator = torch.Generator().manual_seed(1000 * call + rank)
    numbers = torch.randint(-64, 64, (size,), generator=generator).float()
    numbers[::5] = -0.0
    numbers[1::7] = 0.0
    return numbers.to(dtype)


def one_shot(file: Path, turns: int) -> Any:
    """The kernel's sum, through a file that all ranks map; with so many sets of slots."""
    import triton.language as tl

    from r1.kernels import allreduce
    from r1.kernels.chip import Chip

    allreduce.TURNS = tl.constexpr(turns)  # the interpreter reads it at each call
    rank, count = dist.get_rank(), dist.get_world_size()
    nbytes = turns * count * MOST
    shared = torch.from_file(str(file), shared=True, size=count * nbytes, dtype=torch.uint8)
    buffers = shared.view(count, nbytes)
    addresses = [buffer.data_ptr() for buffer in buffers]
    chip = Chip.of(torch.device("cpu"))
    adds = allreduce.OneShotSum(dist.group.WORLD, chip, rank, buffers[rank], addresses)
    assert adds.most == MOST
    dist.barrier()
    return adds


def summed(file: Path, turns: int, dtype: torch.dtype, calls: int) -> list[Tensor]:
    """The sums of many calls of several sizes; some ranks come late to some calls."""
    adds, rank, answers = one_shot(file, turns), dist.get_rank(), []
    for call in range(calls):
        if (call * 7 + rank * 3) % 5 == 0:
            time.sleep(0.02)
        size = (8, 1000, 2048, 1032)[call % 4]
        answers.append(adds(part(rank, call, size * 2 // dtype.itemsize, dtype)))
    return answers


def expected(count: int, call: int, size: int, dtype: torch.dtype) -> Tensor:
    parts = [part(rank, call, size, dtype).float() for rank in range(count)]
    return torch.stack(parts).sum(dim=0).to(dtype)


@on_cpu
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_processes_add_up(ranks: Ranks, tmp_path: Path, count: int, dtype: torch.dtype) -> None:
    """Many sums of several sizes, with ranks ahead of others: each right, and the same bits."""
    file, calls = tmp_path / "buffers", 24
    file.write_bytes(bytes(3 * count * count * MOST))
    found = ranks.run(count, summed, file, 3, dtype, calls)
    for call in range(calls):
        ours = [answers[call] for answers in found]
        assert all(torch.equal(each, ours[0]) for each in ours)
        assert torch.equal(ours[0], expected(count, call, len(ours[0]), dtype)), call


@on_cpu
def test_the_two_zeros_and_what_is_no_number(ranks: Ranks, tmp_path: Path) -> None:
    """-0.0 is the mark of an empty slot, and is sent as 0.0; infinities and NaN stay."""
    file = tmp_path / "buffers"
    file.write_bytes(bytes(3 * 2 * 2 * MOST))
    given = [-0.0, 0.0, float("inf"), float("-inf"), float("nan"), 2.0**-120, 3e38, 1.0]
    for found in ranks.run(2, sum_of, file, [given, [-0.0] * 8]):
        assert found.nan_to_num(7).tolist() == torch.tensor(given).bfloat16().nan_to_num(7).tolist()
        assert not found[:2].signbit().any()


def sum_of(file: Path, parts: list[list[float]]) -> Tensor:
    adds = one_shot(file, 3)
    return adds(torch.tensor(parts[dist.get_rank()], dtype=torch.bfloat16))


# ---------------------------- which sum by which kernel
class Doubled(MappedSum):
    """A sum over two ranks that have the same part."""

    most = 64

    def __init__(self) -> None:
        super().__init__(None)

    def small(self, y: Tensor) -> Tensor:
        return 2 * y


def test_large_sums_are_left_to_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sum, "__call__", lambda _, y: 0 * y)
    adds = Doubled()
    for size, small in ((4, True), (16, True), (20, False), (3, False)):
        y = torch.ones(1, size)
        assert torch.equal(adds(y), (2 if small else 0) * y), size


def test_compiled_code_holds_it_as_one_operator() -> None:
    adds, twice = Doubled(), Doubled()
    twice.most = 0

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def layer(x: Tensor) -> Tensor:
        return x + adds(x.mT)

    x = torch.randn(4, 4)
    assert torch.equal(layer(x), x + 2 * x.mT)


def test_limits_by_bytes_and_ranks() -> None:
    for kernel in LIMITS:
        sizes = [limit(kernel, ranks) for ranks in range(2, 9)]
        assert sizes == sorted(sizes, reverse=True) and min(sizes) > 0 and not limit(kernel, 9)
        assert all(size % 1024 == 0 for size in sizes), "whole pieces"
    assert limit("triton", 3) == limit("triton", 4) < limit("triton", 2)


# ---------------------------- the switch
@pytest.mark.parametrize(
    ("switches", "machine", "chosen"),
    [
        ({}, H100, "off"),
        ({"pp": 2}, H100, "off"),
        ({"allreduce": "off"}, Machine(), "off"),
        ({"tp": 2}, H100, "nccl"),
        ({"ep": 2}, MI300X, "nccl"),
        ({"tp": 2}, Machine(), "gloo"),
        ({"tp": 2, "allreduce": "gloo"}, Machine(), "gloo"),
        ({"tp": 2, "allreduce": "symm"}, H100, "symm"),
        ({"tp": 2, "ep": 2, "pp": 2, "allreduce": "triton"}, H100, "triton"),
        (
            {"tp": 2, "allreduce": "triton", "kernels": "triton", "cuda_graphs": True},
            H100,
            "triton",
        ),
        ({"tp": 2, "allreduce": "triton", "quant": "int8"}, H100, "triton"),
    ],
)
def test_what_adds_up(switches: dict[str, Any], machine: Machine, chosen: str) -> None:
    found = resolve(Backend(**switches), SPREAD, machine)
    assert found.allreduce == chosen
    assert resolve(found, SPREAD, machine) == found


REFUSALS: dict[str, tuple[dict[str, Any], Machine, str]] = {
    "alone": ({"allreduce": "triton"}, H100, "devices that share a layer made, and here none do"),
    "left undone": ({"allreduce": "off", "tp": 2}, Machine(), "what they made: leave it out"),
    "stages": ({"allreduce": "symm", "pp": 2}, H100, "none do: use tp=2 or more"),
    "a CPU": ({"allreduce": "triton", "tp": 2}, Machine(), "runs on a CPU: use allreduce=gloo"),
    "no NCCL": ({"allreduce": "nccl", "tp": 2}, Machine(), "runs on a CPU: use allreduce=gloo"),
    "a GPU": ({"allreduce": "gloo", "tp": 2}, H100, "runs on a GPU: use allreduce=nccl"),
    "fp16": ({"allreduce": "symm", "tp": 2, "dtype": "fp16"}, H100, "fp32 and bf16, not fp16"),
    "fp16 of amp": (
        {"allreduce": "symm", "tp": 2, "dtype": "fp32", "amp": "fp16"}, H100, "not fp16: use"
    ),
    "AMD": ({"allreduce": "triton", "tp": 2}, MI300X, "NVIDIA's GPUs.*use allreduce=nccl"),
    "no Triton": (
        {"allreduce": "triton", "tp": 2}, Machine(cuda=True, compiler=False), "the triton package"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str) -> None:
    switches, machine, sentence = REFUSALS[case]
    with pytest.raises(InputError, match=f"^allreduce={switches['allreduce']}: .*{sentence}"):
        resolve(Backend(**switches), SPREAD, machine)


def test_refused_for_so_many() -> None:
    for kind, count, sentence in (("symm", 3, "2, 4 or 8"), ("triton", 16, "up to 8 devices")):
        assert re.search(sentence, ALLREDUCE[kind].why_not(H100, count, "bf16") or "")


@pytest.mark.parametrize(
    ("others", "reaches", "sentence"),
    [
        ([("a", 0), ("a", 1)], True, None),
        ([("a", 0), ("b", 0)], True, r"on 2 hosts \(a, b\)"),
        ([("a", 0), ("a", 0)], True, "the same GPU"),
        ([("a", 0), ("a", 1)], False, "GPU 0 of a has no way to GPU 1"),
    ],
)
def test_memory_that_can_not_be_mapped(
    others: list[tuple[str, int]], reaches: bool, sentence: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every rank raises one sentence."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: others[0][1])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: reaches)
    monkeypatch.setattr(symmetric.socket, "gethostname", lambda: others[0][0])
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda _: [0, 1])
    monkeypatch.setattr(Mesh, "gather", lambda _, value: [value, *others[1:]])
    monkeypatch.setattr(Mesh, "together", lambda _, call: call())
    made = Doubled()
    if sentence is None:
        assert connect(Mesh(), None, "triton", lambda _: made) is made
        return
    with pytest.raises(InputError, match=f"^allreduce=symm maps .*{sentence}.*: use allreduce=nc"):
        connect(Mesh(), None, "symm", lambda _: made)


def test_what_torch_says_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> Sum:
        raise RuntimeError("no driver\nat some line")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda _: [0])
    with pytest.raises(InputError, match=r"can't be had \(no driver\): use allreduce=nccl$"):
        connect(Mesh(), None, "symm", fails)


def test_one_sum_for_all_layers() -> None:
    """Its memory is there once, and heads have their own where other ranks share them."""
    made: list[Any] = []

    def make(_: Mesh, group: Any) -> Sum:
        made.append(group.group_name)
        return Sum(None)

    grids: list[tuple[dict[str, Any], list[str]]] = [
        ({"tp": 2}, ["stage"]),
        ({"ep": 2}, ["stage"]),
        ({"tp": 2, "ep": 2}, ["stage", "tp"]),
    ]
    for grid, groups in grids:
        made.clear()
        tp, stage = (SimpleNamespace(group_name=name) for name in ("tp", "stage"))
        mesh = Mesh(**grid, tp_group=tp, stage_group=stage)
        placement = Parallel(SPREAD, mesh, [], make)
        backend = resolve(Backend(**grid), SPREAD, H100)
        model = build.sketch(SPREAD, backend, placement=placement)
        assert made == groups
        sums = {id(layer.sum_inner) for layer in model.layers}
        assert sums == {id(placement.sum_stage)} == {id(model.embed_tokens.matrix.sum)}
        if "tp" in grid:
            assert {id(layer.sum_heads) for layer in model.layers} == {id(placement.sum_heads)}
