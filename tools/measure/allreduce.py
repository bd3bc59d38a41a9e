"""Time the sum over GPUs that share a layer: each way that `--allreduce` knows, in a CUDA graph.

    torchrun --nproc-per-node 2 tools/measure/allreduce.py -o allreduce.json
    torchrun --nproc-per-node 2 tools/measure/allreduce.py --bytes 4096,65536 --only nccl,triton

A graph holds 50 sums of different data, one after the other, as a decode step holds two a layer.
Each sum is compared with one by NCCL in fp32: the numbers are whole and small, so it has to be
equal. Times are those of the slowest rank; the range is that of all replays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
import torch
import torch.distributed as dist
from torch import Tensor

from r1 import InputError
from r1.bench.report.aligned import aligned
from r1.placement import ranks
from r1.placement.collectives import Sum
from r1.placement.mesh import Mesh
from r1.placement.symmetric import MappedSum, SymmetricSum
from r1.run.graphs import record
from r1.switches.allreduce import ALLREDUCE

CALLS = 50
"""Sums in a graph."""
REPLAYS = 50
CHECKS = 20
"""Replays whose sums are compared, each of other data."""
KINDS = ("nccl", "one-shot", "two-shot", "triton")
"""The two in the middle are those of `--allreduce symm`."""
BYTES = "4096,16384,65536,262144,1048576,4194304,16777216"


def make(kind: str, mesh: Mesh) -> Sum:
    """What adds up. Every rank calls it alike. Raises InputError."""
    if kind in ("nccl", "triton"):
        return ALLREDUCE[kind].sum(mesh, mesh.group)
    sums = ALLREDUCE["symm"].sum(mesh, mesh.group)
    assert isinstance(sums, SymmetricSum)
    sums.one_shot = sums.most if kind == "one-shot" else 0
    return sums


def numbers(like: Tensor, seed: int) -> Tensor:
    """Whole numbers of this shape and dtype, other ones on each rank: their sums are exact."""
    generator = torch.Generator(like.device).manual_seed(seed * 64 + dist.get_rank())
    values = torch.randint(-16, 16, like.shape, generator=generator, device=like.device)
    return values.to(like.dtype)


def measure(adds: Sum, nbytes: int) -> dict[str, Any]:
    """Microseconds of a sum of `nbytes` in bf16, and how many were wrong, on the worst rank."""
    x = torch.zeros(CALLS, nbytes // 2, dtype=torch.bfloat16, device="cuda")
    sums: list[Tensor] = []

    def once() -> None:
        sums[:] = [adds(each) for each in x]

    graph, wrong = record(once), 0
    for check in range(CHECKS):
        x.copy_(numbers(x, check))
        graph.replay()
        right = x.float()
        dist.all_reduce(right)
        wrong += sum(not torch.equal(y.float(), r) for y, r in zip(sums, right, strict=True))
    worst = torch.tensor([wrong, *replay_times(graph)], device="cuda")
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    us = (worst[1:] / CALLS).tolist()
    counted = int(worst[0].item())
    return {"us": statistics.median(us), "least": min(us), "most": max(us), "wrong": counted}


def replay_times(graph: torch.cuda.CUDAGraph) -> list[float]:
    """Microseconds of each replay. All ranks begin together: a sum ends on all at about a time."""
    times, one = [], torch.zeros(1, device="cuda")
    for replay in range(3 + REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.all_reduce(one)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(1e3 * start.elapsed_time(end))
    return times


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each size, a column for each way: microseconds, and their range."""
    sizes = list(dict.fromkeys(row["bytes"] for row in rows))
    columns = {"KB": [f"{size / 1024:g}" for size in sizes]}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = {row["bytes"]: cell(row) for row in rows if row["kind"] == kind}
        columns[f"{kind}, us"] = [cells.get(size, "") for size in sizes]
    return aligned(columns)


def cell(row: dict[str, Any]) -> str:
    if row["wrong"]:
        return f"WRONG: {row['wrong']} of {CALLS * CHECKS} sums"
    return f"{row['us']:.1f} ({row['least']:.1f}-{row['most']:.1f})"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a sum was wrong, 2 for bad input."""
    parser = shared.parser(__doc__)
    text = f"bytes of each rank's part, multiples of 1024 (default {BYTES})"
    parser.add_argument("--bytes", default=BYTES, metavar="N,..", help=text)
    text = f"of {', '.join(KINDS)} (default: all)"
    parser.add_argument("--only", default=",".join(KINDS), metavar="KIND,..", help=text)
    shared.add_output(parser, "write the times as JSON")
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    kinds = shared.names("--only", arguments.only, KINDS)
    words = arguments.bytes.split(",")
    if not all(word.isdecimal() and int(word) and int(word) % 1024 == 0 for word in words):
        raise InputError(f"--bytes {arguments.bytes}: give multiples of 1024, such as 4096,65536")
    shared.check_output(arguments.output)
    crew = ranks.crew()
    if crew.count == 1 or not torch.cuda.is_available():
        few = "the sum over GPUs needs two of them"
        raise InputError(f"{few}: start it with torchrun --nproc-per-node 2")
    with crew.connected("cuda"):
        rows = measure_all(kinds, list(map(int, words)))
    if crew.leads:
        result = {
            "command": shared.command(__file__), "gpu": torch.cuda.get_device_name(),
            "ranks": crew.count, "torch": torch.__version__, "calls": CALLS, "rows": rows,
        }  # fmt: skip
        print("\n".join(table(rows)))
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 1 if any(row["wrong"] for row in rows) else 0


def measure_all(kinds: list[str], sizes: list[int]) -> list[dict[str, Any]]:
    """A row for each kind and each size that it takes."""
    mesh = Mesh.here(dist.get_world_size(), 1, "cuda")
    rows = []
    for kind in kinds:
        adds = make(kind, mesh)
        for nbytes in sizes:
            if not isinstance(adds, MappedSum) or nbytes <= adds.most:
                rows.append({"kind": kind, "bytes": nbytes, **measure(adds, nbytes)})
                if not dist.get_rank():
                    print(f"{kind} {nbytes}: {cell(rows[-1])}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    sys.exit(main())
