"""Tests what only several GPUs can show: sums over memory that they map of each other.

Holds to account: r1/kernels/allreduce.py, r1/placement/symmetric.py and r1/switches/allreduce.py.

Skipped as a whole where there are fewer than two GPUs. On a machine that has them:
`python -m pytest tests/test_gpus.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from decoding import read
from ranks import Ranks, Refused
from test_parallel import SPREAD, saved
from torch import Tensor

import r1
from r1 import Backend
from r1.placement.collectives import Sum
from r1.placement.mesh import Mesh
from r1.placement.symmetric import MappedSum
from r1.run.graphs import record
from r1.switches.allreduce import ALLREDUCE

if torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)

CALLS, REPLAYS, GRAPH = 400, 200, 12
"""Sums one after the other, replays of a graph, and sums in it."""
SIZES = (8, 2048, 1000, 65536, 40, 300000, 2048, 4 * 2**20)
"""Elements of a part, the last ones beyond the one-shot kernels."""
DTYPES = {
    "symm": (torch.bfloat16, torch.float32),
    "triton": (torch.bfloat16, torch.float32, torch.float16),
}


def part(size: int, dtype: torch.dtype, seed: int, rank: int) -> Tensor:
    """Whole numbers, so that sums are exact, zeros of both signs among them."""
    generator = torch.Generator("cuda").manual_seed(seed * 64 + rank)
    numbers = torch.randint(-16, 16, (size,), generator=generator, device="cuda").float()
    numbers[::5] = -0.0
    return numbers.to(dtype)


def right(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """The sum of all ranks' parts."""
    parts = [part(size, dtype, seed, rank).float() for rank in range(dist.get_world_size())]
    return torch.stack(parts).sum(dim=0).to(dtype)


def late(seed: int) -> None:
    """One rank after another lets the others wait for a while."""
    if seed % 3 == 0 and seed // 3 % dist.get_world_size() == dist.get_rank():
        torch.cuda._sleep(200_000)


def wrong_sums(kind: str) -> dict[str, Any]:
    """On each rank: which sums differ from the plain ones, one by one and in a graph."""
    mesh = Mesh.here(dist.get_world_size(), 1, "cuda")
    adds = ALLREDUCE[kind].sum(mesh, mesh.group)
    assert isinstance(adds, MappedSum)
    rank, wrong = dist.get_rank(), []
    for dtype in DTYPES[kind]:
        for seed in range(CALLS):
            size = SIZES[seed % len(SIZES)]
            late(seed)
            if not torch.equal(adds(part(size, dtype, seed, rank)), right(size, dtype, seed)):
                wrong.append((dtype, seed))
    return {"one by one": wrong, "in a graph": wrong_replays(adds, rank)}


def wrong_replays(adds: Sum, rank: int) -> list[tuple[int, int]]:
    """A graph of sums of several sizes, replayed with other data each time."""
    sizes = [SIZES[call % len(SIZES)] for call in range(GRAPH)]
    x = [torch.zeros(size, dtype=torch.bfloat16, device="cuda") for size in sizes]
    sums: list[Tensor] = []

    def once() -> None:
        sums[:] = [adds(each) for each in x]

    graph, wrong = record(once), []
    for replay in range(REPLAYS):
        seeds = [1000 + replay * GRAPH + call for call in range(GRAPH)]
        for each, seed in zip(x, seeds, strict=True):
            each.copy_(part(len(each), each.dtype, seed, rank))
        late(replay)
        graph.replay()
        for call, (y, seed) in enumerate(zip(sums, seeds, strict=True)):
            if not torch.equal(y, right(len(y), y.dtype, seed)):
                wrong.append((replay, call))
    return wrong


@pytest.mark.parametrize("kind", ["symm", "triton"])
def test_every_sum_is_right(tmp_path: Path, kind: str) -> None:
    """Many times with other data, and with ranks that come late: a race would show."""
    with Ranks(tmp_path, gpus=True) as running:
        for found in running.run(2, wrong_sums, kind):
            assert found == {"one by one": [], "in a graph": []}


def decoded(folder: Path, ways: list[dict[str, Any]]) -> list[Tensor]:
    """The logits of each way to run the model; all decode the same text."""
    text, logits = None, []
    for switches in ways:
        backend = Backend(device="cuda", dtype="fp32", tp=2, **switches)
        text, found = read(r1.load(folder, backend, quiet=True).runner, text)
        logits.append(found.cpu())
    return logits


def test_a_model_of_two_gpus(tmp_path: Path) -> None:
    """The same logits whoever adds up: eager, compiled, captured and fused."""
    folder = saved(SPREAD, tmp_path / "model")
    kinds = ("nccl", "symm", "triton")
    how: list[dict[str, Any]] = [{}, {"cuda_graphs": True, "kernels": "triton"}]
    ways = [{"allreduce": kind, **each} for each in how for kind in kinds]
    ways.append({"allreduce": "triton", "compile": True, "moe": "gather", "cuda_graphs": True})
    with Ranks(tmp_path, gpus=True, patience=400) as running:
        found = running.run(2, decoded, folder, ways)
    assert not any(isinstance(each, Refused) for each in found), found
    for way, one, two in zip(ways, *found, strict=True):
        assert torch.equal(one, two), f"all ranks have the same bits: {way}"
        off = (one - found[0][0]).abs().max()
        assert off < 2e-4, f"{way} is off by {off}"
