"""The main function of an arm's process, and its commands. The parent asks: see ../process.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from r1.bench import compiler_checks
from r1.bench.process import Answer, answer_commands, end_with_parent
from r1.bench.worker import energy, profiling, reading, reference, timing
from r1.bench.worker.accuracy import accuracy
from r1.bench.worker.subject import Subject
from r1.bench.workload import Workload
from r1.errors import flags_spelling
from r1.placement.ranks import Crew, disconnect
from r1.switches import own_files
from r1.switches.backend import Backend


@dataclass(frozen=True)
class Setup:
    """What an arm's process sets up before its first command."""

    threads: int | None = None
    """Threads of the CPU; None for torch's own number."""
    imports: tuple[Path, ...] = ()
    """Files of the user's own that register strategies (switches/own_files.py)."""


COMMANDS: dict[str, Callable[..., Answer]] = {
    "build": Subject.build,
    "build_reference": reference.build_reference,
    "reference": reference.write_reference,
    "rates": reference.rates,
    "warm": timing.warm,
    "measure": timing.measure,
    "parity": reading.check,
    "kernels": profiling.kernels,
    "moe_layer": timing.moe_layer,
    "energy": energy.energy,
    "trace": profiling.trace,
    "accuracy": accuracy,
}
"""The commands by name. Each gets the Subject, then the arguments that the parent sends."""


def serve(
    pipe: Connection,
    backend: Backend,
    workload: Workload,
    folder: Path,
    compiled: str,
    setup: Setup,
    place: Crew,
) -> None:
    """Answer commands until "quit".

    `folder` holds the reference. `compiled` names the arm's cache of compiled code in it: the first
    process that uses this cache starts with a cold one. `place`: this process among those that
    share the model.
    """
    end_with_parent()
    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
    compiled = f"{compiled}-{place.rank}" if place.count > 1 else compiled
    compiler_checks.copy(folder, folder / compiled)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / compiled)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or the profiler's library greets on stderr
    subject = Subject(backend, workload, folder, place)
    commands = {name: partial(command, subject) for name, command in COMMANDS.items()}
    with flags_spelling():
        answer_commands(pipe, commands, partial(own_files.run, setup.imports))
    disconnect()
