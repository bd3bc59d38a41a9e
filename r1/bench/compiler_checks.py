"""Inductor's one-time test of the CPU's vector instructions, in a side process.

Inductor finds out by compiling small programs. Here it does so once for all arms, so that no arm's
start-up includes it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from r1.bench.arms import Arm
from r1.bench.process import deaf_children
from r1.device import torch_device
from r1.model.config import Config
from r1.switches.resolve import resolve

FOLDER = "compiler-checks"
"""The cache of compiled code that the side process fills, below the measurement's folder."""


class CompilerChecks:
    """The side process, which is needed only if an arm compiles for a CPU.

    It runs beside the reference and the baseline's warm-up, which are not timed, and is done before
    the first arm that compiles.
    """

    def __init__(self, compared: Sequence[Arm], config: Config, folder: Path) -> None:
        needed = (
            any(arm.backend.compile for arm in compared)
            and torch_device(resolve(compared[0].backend, config).device).type == "cpu"
        )
        context = multiprocessing.get_context("spawn")
        self.process = (
            context.Process(target=run_checks, args=(folder,), daemon=True) if needed else None
        )

    def start(self) -> None:
        """Start the process, deaf to signals."""
        if self.process:
            with deaf_children():
                self.process.start()

    def join(self) -> None:
        """Wait for the process's end."""
        if self.process:
            self.process.join()

    def __enter__(self) -> CompilerChecks:
        return self

    def __exit__(self, *_: object) -> None:
        # After an interrupt or an error it may be started and not joined.
        if self.process and self.process.pid is not None:
            self.process.kill()
            self.process.join()  # its folder is deleted next


def run_checks(folder: Path) -> None:
    """The side process's main: let Inductor test the CPU, and keep the results."""
    # The compiler takes seconds to import, so only this process does.
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / FOLDER)
    with contextlib.suppress(InvalidCxxCompiler):  # the arms will report it
        pick_vec_isa()


def copy(folder: Path, cache: Path) -> None:
    """Start an arm's cache of compiled code with the checks' results, if the cache is new."""
    if (folder / FOLDER).is_dir() and not cache.exists():
        shutil.copytree(folder / FOLDER, cache)
