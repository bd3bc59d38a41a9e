"""The sum over devices as a kernel of ours, and the switch that chooses who adds up.

Holds to account: r1/kernels/allreduce.py, r1/placement/symmetric.py and r1/switches/allreduce.py.

On a CPU the kernel runs under the interpreter, in several processes at a time, whose buffers are
one file that all of them map. tests/test_gpus.py runs it, and torch's kernels, on several GPUs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import TINY
from ranks import Ranks
from torch import Tensor

from r1 import Backend, InputError
from r1.bench import ablation, arms
from r1.errors import flags_spelling
from r1.placement import symmetric
from r1.placement.symmetric import LIMITS, limit
from r1.switches.allreduce import ALLREDUCE
from r1.switches.flags import explanations
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

pytest.importorskip("triton")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs kernels")

H100 = Machine(cuda=True, name="H100", capability=(9, 0))
MI300X = Machine(cuda=True, hip="7.0", arch="gfx942", name="MI300X")
MOST = 4096
"""Bytes of a slot in these tests: four programs."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks")) as running:
        yield running


def part(rank: int, call: int, size: int, dtype: torch.dtype) -> Tensor:
    """A rank's part in a call: other numbers each time, zeros of both signs among them.

    They are whole and small, so that every sum is exact.
    """
    generator = torch.Generator().manual_seed(1000 * call + rank)
    numbers = torch.randint(-64, 64, (size,), generator=generator).float()
    numbers[::5] = -0.0
    numbers[1::7] = 0.0
    return numbers.to(dtype)


def summed(file: Path, turns: int, dtype: torch.dtype, calls: int, waits: bool) -> list[Any]:
    """The sums of many calls of several sizes on this rank, through a file that all ranks map.

    `waits`: some ranks stop for a moment before some calls, so that others are ahead.
    """
    import triton.language as tl

    from r1.kernels import allreduce
    from r1.kernels.chip import Chip

    # A name of the kernel's module, which the interpreter reads at each call.
    allreduce.TURNS = tl.constexpr(turns)
    rank, count = dist.get_rank(), dist.get_world_size()
    nbytes = turns * count * MOST
    shared = torch.from_file(str(file), shared=True, size=count * nbytes, dtype=torch.uint8)
    buffers = shared.view(count, nbytes)
    addresses = [buffer.data_ptr() for buffer in buffers]
    adds = allreduce.OneShotSum(
        dist.group.WORLD, Chip.of(torch.device("cpu")), rank, buffers[rank], addresses
    )
    assert adds.most == MOST
    dist.barrier()
    answers = []
    for call in range(calls):
        if waits and (call * 7 + rank * 3) % 5 == 0:
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
    found = ranks.run(count, summed, file, 3, dtype, calls, True)
    for call in range(calls):
        ours = [answers[call] for answers in found]
        assert all(torch.equal(each, ours[0]) for each in ours)
        assert torch.equal(ours[0], expected(count, call, len(ours[0]), dtype)), call
