"""Time captured decode steps alone, without a reference: a quick look while kernels are tuned.

    # one process and one model for each storage, in which all batches are timed
    python tools/measure/bench_steps.py --shape moonlight-16b --quant none,fp8,int4 --batch 1,8,32
    # what each kernel adds to a step
    python tools/measure/bench_steps.py --quant int4 --profile

A step is that of bench.py with `--cuda-graphs --kernels triton`, on random weights, in bf16. Its
logits are compared with nothing: bench.py does that, and only its speeds belong in a table. On a
CPU steps are called as they are, without kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared

from r1 import InputError, streams
from r1.bench import timeline
from r1.bench.process import Process, answer_commands, end_with_parent
from r1.bench.worker import profiling
from r1.bench.worker.subject import Subject
from r1.bench.workload import Workload
from r1.device import synchronize
from r1.run.sampler import Sampler
from r1.storage.kinds import KINDS
from r1.switches.backend import Backend
from r1.switches.machine import Machine

PROMPT, STEPS = 128, 16
"""Tokens that a row holds before the first step, and steps of a repetition."""

Found = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    p = shared.parser(__doc__)
    shared.add_shapes_and_batches(p, "moonlight-16b", "1")
    p.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    kinds = f"of none, {', '.join(KINDS)} (default none)"
    p.add_argument("--quant", default="none", metavar="KIND,..", help=kinds)
    p.add_argument("--kernels", choices=("triton", "torch"), default="triton")
    p.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="default 5")
    p.add_argument("--profile", action="store_true", help="print what each kernel adds")
    shared.add_output(p, "write the figures as JSON")
    return p


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return shared.run(__file__, work, parser().parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    shared.check_output(arguments.output)
    quants = shared.names("--quant", arguments.quant, ["none", *KINDS])
    batches = shared.numbers("--batch", arguments.batch)
    if arguments.repetitions < 1:
        raise InputError("-r takes 1 or more")
    rows: list[Found] = []
    for name in shared.shapes(arguments.shape):
        for quant in quants:
            rows += timed(name, quant, batches, arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def timed(name: str, quant: str, batches: list[int], arguments: argparse.Namespace) -> list[Found]:
    """The rows of one model, made and printed in a process of its own. Raises InputError."""
    rows: list[Found] = []
    with Process(serve, name, quant, arguments) as process:
        for batch in batches:
            row = process.ask("time", batch)
            if "refused" in row:
                raise InputError(row["refused"])
            rows.append(row)
            streams.write(line(row))
    return rows


def line(row: Found) -> str:
    """A row in words, and its kernels if they were profiled."""
    us, rows = row["us"], row["batch"]
    stored = "" if row["quant"] == "none" else f" {row['quant']}"
    head = (
        f"{row['shape']}{stored}, batch {rows}: {us:.1f} us a step "
        f"({row['least']:.1f}-{row['most']:.1f}), {rows / us * 1e6:,.0f} tokens/s"
    )
    return "\n".join([head, *timeline.table(row["parts"])]) if row["parts"] else head


def serve(pipe: Connection, name: str, quant: str, arguments: argparse.Namespace) -> None:
    """The main function of a model's process, which answers one command: "time", with a batch."""
    end_with_parent()
    answer_commands(pipe, {"time": partial(one, name, quant, arguments)})


def one(name: str, quant: str, arguments: argparse.Namespace, batch: int) -> Found:
    """Time the steps of one batch. They choose their tokens, as bench.py's do."""
    gpu = Machine.here().device != "cpu"
    kernels = arguments.kernels if gpu else "torch"
    backend = Backend(dtype="bf16", quant=quant, kernels=kernels, cuda_graphs=gpu)
    workload = Workload(None, name, arguments.layers, batch, PROMPT, STEPS, depth=0, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(backend, workload, Path(folder))
        subject.build()
        times = [1e6 * seconds(subject) for _ in range(1 + arguments.repetitions)][1:]
        parts = profiling.kernels(subject)["parts"] if arguments.profile else None
    found = {"shape": name, "quant": quant, "batch": batch, "us": statistics.median(times)}
    return found | {"least": min(times), "most": max(times), "parts": parts}


def seconds(subject: Subject) -> float:
    """Seconds of a step, from the time of STEPS of them in a row."""
    runner, cache, greedy = subject.engine.runner, subject.cache, Sampler(0.0)
    subject.fill()
    tokens, _ = greedy(runner.prefill(subject.prompts, cache)[:, None])
    tokens, _ = runner.next_tokens(tokens, cache, greedy)  # a step is captured by now
    synchronize(subject.device)
    start = time.perf_counter()
    for _ in range(STEPS - 1):
        tokens, _ = runner.next_tokens(tokens, cache, greedy)
    synchronize(subject.device)
    return (time.perf_counter() - start) / (STEPS - 1)


if __name__ == "__main__":
    sys.exit(main())
