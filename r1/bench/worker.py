"""One arm's process: builds the model, warms up, and measures when it is told to.

Each arm has a process of its own, so that no arm inherits another's allocator, caches or compiled code. The parent talks
to it through a pipe: a command goes in, a dictionary comes out; `{"refused": sentence}` where the arm can't be had.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import r1
from r1 import build
from r1.backend import Backend, resolve
from r1.bench import parity
from r1.bench.arms import Workload
from r1.config import shape
from r1.errors import InputError
from r1.generate import Engine, Sampler


def serve(pipe: Connection, backend: Backend, workload: Workload, folder: Path) -> None:
    """The process's main: answers commands until "quit". `folder` holds the reference, and takes this arm's files."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"inductor-{os.getpid()}")
    bench = Bench(backend, workload, folder)
    commands: dict[str, Callable[[], dict[str, Any]]] = {
        "build": bench.build,
        "warm": bench.warm,
        "measure": bench.measure,
        "reference": bench.reference,
        "parity": bench.parity,
        "memory": bench.memory,
    }
    while (command := pipe.recv()) != "quit":
        try:
            pipe.send(commands[command]())
        except InputError as error:
            pipe.send({"refused": str(error)})
        except torch.OutOfMemoryError:
            pipe.send({"refused": f"out of memory on {backend.device}: use a smaller batch, dtype or model"})


class Bench:
    """An engine and the workload it is measured on."""

    engine: Engine

    def __init__(self, backend: Backend, workload: Workload, folder: Path) -> None:
        self.backend, self.workload, self.folder = backend, workload, folder

    def build(self) -> dict[str, Any]:
        """Load or make the model; how long that took."""
        w = self.workload
        start = time.perf_counter()
        if w.model is not None:
            self.engine = r1.load(w.model, self.backend, batch=w.batch, quiet=True)
        else:
            config = shape(w.shape or "", w.layers)
            backend = resolve(self.backend, config, batch=w.batch)
            self.engine = Engine(build.from_shape(config, backend, seed=w.seed), backend)
        generator = torch.Generator().manual_seed(w.seed)
        tokens = torch.randint(self.engine.config.vocab_size, (w.batch, w.depth + w.prompt), generator=generator)
        self.before, self.prompts = tokens[:, : w.depth].tolist(), tokens[:, w.depth :].tolist()
        context = self.engine.config.max_position_embeddings
        if w.depth + w.prompt + w.new > context:
            raise InputError(f"depth + prompt + new is {w.depth + w.prompt + w.new}, more than the context of {context}")
        self.cache = self.engine.runner.cache(w.batch, w.depth + w.prompt + w.new)
        return {"load_seconds": time.perf_counter() - start, "backend": vars(self.engine.backend)}

    def fill(self) -> None:
        """Bring the cache to the workload's depth; never inside a timed region."""
        self.cache.lengths.zero_()
        if self.workload.depth:
            self.engine.runner.prefill(self.before, self.cache)
        self.synchronize()

    def warm(self) -> dict[str, Any]:
        """Run the whole workload twice, eager arms too; what the first call took over the second is start-up cost."""
        first, second = self.measure(), self.measure()
        start_up = [max(0.0, first[k] - second[k]) for k in ("ttft", "second_token")]
        return {"compile_seconds": sum(start_up) if self.backend.compile else None, "first_call_seconds": sum(start_up)}

    def measure(self) -> dict[str, Any]:
        """One repetition: seconds to the first token, to each further one, and which tokens came."""
        self.fill()
        arrivals: list[float] = []
        start = time.perf_counter()
        for _ in self.engine.steps(self.prompts, self.workload.new, Sampler(0.0), self.cache, self.workload.depth):
            arrivals.append(time.perf_counter() - start)
        gaps = [after - before for before, after in pairwise(arrivals)]
        return {"ttft": arrivals[0], "total": arrivals[-1], "gaps": gaps, "second_token": gaps[0] if gaps else 0.0}

    def reference(self) -> dict[str, Any]:
        """Continue the prompts greedily and keep tokens and logits: what the other arms are held against."""
        w, runner = self.workload, self.engine.runner
        rows, steps = parity.rows_and_positions(w.batch, w.new, self.engine.config.vocab_size)
        self.fill()
        logits = runner.prefill(self.prompts, self.cache, w.depth)  # (B, W)
        kept, text = [], []
        for _ in range(steps):
            kept.append(logits[:rows].cpu())
            text.append(logits.argmax(dim=-1))
            logits = runner.decode(text[-1][:, None], self.cache)[:, -1]
        save_file(
            {"tokens": torch.stack(text).cpu(), "logits": torch.stack(kept)}, self.folder / "reference.safetensors"
        )  # (P, B), (P, rows, W)
        return {"rows": rows, "steps": steps}

    def parity(self) -> dict[str, Any]:
        """Read the reference's text step by step, and compare the logits."""
        kept = load_file(self.folder / "reference.safetensors")
        text, reference = kept["tokens"].to(self.engine.runner.device), kept["logits"]
        runner, rows = self.engine.runner, reference.shape[1]
        self.fill()
        ours: list[Tensor] = [runner.prefill(self.prompts, self.cache, self.workload.depth)[:rows]]
        for tokens in text[:-1]:
            ours.append(runner.decode(tokens[:, None], self.cache)[:rows, -1])
        found = parity.compare([logits.clone() for logits in ours], reference, self.engine.backend)
        return vars(found) | {"passes": found.passes}

    def memory(self) -> dict[str, Any]:
        """Peak memory in bytes: the allocator's, what it reserved, and the process's own on the host."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.engine.runner.device.type == "cpu":
            return {"allocated": None, "reserved": None, "host": host}
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(), "host": host}

    def synchronize(self) -> None:
        if self.engine.runner.device.type != "cpu":
            torch.cuda.synchronize()
