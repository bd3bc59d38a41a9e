"""Processes that stay, for tests of several devices: each test is a function that all of them run.

Starting a process takes seconds, most of them for imports. So each is forked from bench.py's server
of children, which has imported torch. A new process group takes milliseconds, so the same processes
serve as two ranks and as four, and in all test files.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1 import InputError
from r1.bench.process import IMPORTED

PATIENCE = 120
"""Seconds to wait for an answer: a rank that waits for another one must not hang the suite."""


@dataclass
class Refused:
    """The sentence of an InputError that a rank raised."""

    sentence: str


class Ranks:
    """A context with up to so many processes, which start when they are first needed."""

    def __init__(self, scratch: Path, *, gpus: bool = False, patience: float = PATIENCE) -> None:
        """`gpus`: each process has one, and sums over them are NCCL's."""
        self.scratch, self.gpus, self.patience, self.jobs = scratch, gpus, patience, 0
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def run(self, count: int, call: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `call(*arguments)` returns on each of `count` ranks. A defect on one is raised."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([IMPORTED])
        while len(self.pipes) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        self.jobs += 1
        store = self.scratch / f"store-{self.jobs}"
        for rank, pipe in enumerate(self.pipes[:count]):
            pipe.send((store, self.gpus, rank, count, call, arguments))
        answers = []
        for pipe in self.pipes[:count]:
            assert pipe.poll(self.patience), "a rank does not answer"
            answers.append(pipe.recv())
        for answer in answers:
            if isinstance(answer, str):
                raise AssertionError(f"a rank failed:\n{answer}")
        return [answer[0] for answer in answers]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        store, gpus, rank, count, call, arguments = pipe.recv()
        engine = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        if gpus:
            torch.cuda.set_device(rank)
        dist.init_process_group(engine, init_method=f"file://{store}", rank=rank, world_size=count)
        try:
            pipe.send((call(*arguments),))
        except InputError as error:
            pipe.send((Refused(str(error)),))
        except Exception:  # a defect: the test shows it
            pipe.send(traceback.format_exc())
        finally:
            dist.destroy_process_group()
