"""One arm's process: builds the model, warms up, and measures when it is told to.

The parent asks, and this answers: see process.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import statistics
import time
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import r1
from r1 import build, roofline
from r1.bench import exam, parity, timeline
from r1.bench.arms import Workload
from r1.bench.exam import Question
from r1.bench.parity import Bound, Parity
from r1.bench.process import answer
from r1.bench.routing import make_uniform
from r1.bench.upcast import upcast
from r1.device import available_bytes, synchronize, torch_device
from r1.errors import InputError
from r1.model.router import Router
from r1.run import graphs, speculate
from r1.run.generate import Engine
from r1.run.runner import round_capacity
from r1.run.sampler import Sampler
from r1.switches.backend import Backend, resolve
from r1.switches.machine import clocks_and_power

COMPILER_CHECKS = "compiler-checks"
"""Folder of what Inductor finds out of a CPU's vector instructions, by compiling: once for all
arms, as on any machine."""
COMMANDS = (
    "build", "build_reference", "reference", "rates", "warm", "measure", "parity", "kernels",
    "moe_layer", "trace", "accuracy",
)  # fmt: skip


def serve(
    pipe: Connection, backend: Backend, workload: Workload, folder: Path, compiled: str
) -> None:
    """The process's main: answers commands until "quit". `folder` holds the reference; `compiled`
    names this arm's cache of compiled code in it, which is cold for the first process that uses
    it."""
    if (folder / COMPILER_CHECKS).is_dir() and not (folder / compiled).exists():
        shutil.copytree(folder / COMPILER_CHECKS, folder / compiled)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / compiled)
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "5"
    )  # the profiler's library greets on stderr otherwise
    bench = Bench(backend, workload, folder)
    answer(pipe, {name: getattr(bench, name) for name in COMMANDS})


def check_compiler(folder: Path) -> None:
    """A process's main: let Inductor try the CPU's vector instructions, and keep what it finds for
    the arms that compile."""
    from torch._inductor.cpu_vec_isa import (
        pick_vec_isa,  # seconds to import, and only this asks for it
    )
    from torch._inductor.exc import InvalidCxxCompiler

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / COMPILER_CHECKS)
    with contextlib.suppress(InvalidCxxCompiler):  # the arms will say so
        pick_vec_isa()


class Bench:
    """An engine and the workload it is measured on."""

    engine: Engine

    def __init__(self, backend: Backend, workload: Workload, folder: Path) -> None:
        self.backend, self.workload, self.folder = backend, workload, folder
        self.text: list[list[int]] = []

    def build(self) -> dict[str, Any]:
        """Load or make the model, and what it is measured on; how long the loading took."""
        built = self.load()
        self.prepare()
        return built

    def load(self) -> dict[str, Any]:
        """Load or make the model, routed as the workload says."""
        w = self.workload
        start = time.perf_counter()
        if w.model is not None:
            self.engine = r1.load(w.model, self.backend, batch=w.batch, quiet=True)
        else:
            config = w.config()
            backend = resolve(self.backend, config, batch=w.batch)
            self.engine = Engine(build.from_shape(config, backend, seed=w.seed), backend)
        if w.routing == "uniform":
            make_uniform(self.engine.model, w.seed)
        seconds = time.perf_counter() - start
        return {"load_seconds": seconds, "backend": vars(self.engine.backend)}

    def prepare(self) -> None:
        """Prompts, the same in every arm, and a cache for them."""
        w, config = self.workload, self.engine.config
        tokens = torch.randint(
            config.vocab_size,
            (w.batch, w.depth + w.prompt),
            generator=torch.Generator().manual_seed(w.seed),
        )
        self.before, self.prompts = tokens[:, : w.depth].tolist(), tokens[:, w.depth :].tolist()
        context = config.max_position_embeddings
        if w.tokens > context:
            raise InputError(
                f"depth + prompt + new is {w.tokens}, more than the context of {context}"
            )
        padded = [n for n in (w.prompt, w.depth) if n and round_capacity(n) != n]
        if w.routing == "uniform" and self.engine.backend.prefill_graphs and w.batch > 1 and padded:
            raise InputError(
                f"--routing uniform draws experts by a token's place among all, which padding moves: under prefill_graphs give "
                f"prompts of {round_capacity(padded[0])} tokens, not {padded[0]}, or one row"
            )
        self.cache = self.engine.runner.cache(w.batch, w.tokens)

    def fill(self) -> None:
        """Bring the cache to the workload's depth; never inside a timed region."""
        self.cache.lengths.zero_()
        if self.workload.depth:
            self.engine.runner.prefill(self.before, self.cache)
        synchronize(self.engine.runner.device)

    def warm(self) -> dict[str, Any]:
        """Run the whole workload twice, eager arms too; what the first call took over the second is
        start-up cost."""
        first, second = self.measure(), self.measure()
        return {
            "start_seconds": sum(max(0.0, first[k] - second[k]) for k in ("ttft", "second_token"))
        }

    def measure(self) -> dict[str, Any]:
        """One repetition: seconds to the first token, to the last, and of each step between;
        accepted drafts; memory."""
        w = self.workload
        self.fill()
        if self.engine.runner.device.type != "cpu":
            # building, compiling and the parity check have peaks of their own
            torch.cuda.reset_peak_memory_stats()
        arrivals: list[float] = []
        steps: list[list[list[int]]] = []
        start = time.perf_counter()
        for step in self.engine.steps(
            self.prompts, w.new, Sampler(0.0, seed=w.seed), self.cache, w.depth, w.assumed
        ):
            arrivals.append(time.perf_counter() - start)
            steps.append(step)
        gaps = [after - before for before, after in pairwise(arrivals)]
        self.text = [
            [token for step in steps for token in step[row]][: w.new] for row in range(w.batch)
        ]
        turns = accepted = 0
        for row in range(w.batch):
            written = 1
            for step in steps[1:]:
                if written < w.new:
                    turns, accepted = turns + 1, accepted + len(step[row]) - 1
                    written += len(step[row])
        return {
            "tokens": w.new,
            "turns": turns,
            "accepted": accepted,
            "ttft": arrivals[0],
            "total": arrivals[-1],
            "gaps": gaps,
            "second_token": gaps[0] if gaps else 0.0,
            "memory": self.memory(),
        } | clocks_and_power()

    def build_reference(self) -> dict[str, Any]:
        """The fp32 eager model: fp32 weights where they fit, else bf16 ones that every product
        widens."""
        w = self.workload
        config = w.config()
        backend = resolve(self.backend, config, batch=w.batch)
        needed = 4 * build.count_parameters(config) + 2 * build.HEADROOM
        if needed < available_bytes(torch_device(backend.device)):
            return self.build()
        self.backend = dataclasses.replace(self.backend, dtype="bf16")
        built = self.load()
        upcast(self.engine.model)
        self.engine.runner.cache_dtype = torch.float32
        self.prepare()
        return built

    def reference(self, dtypes: Iterable[str]) -> dict[str, Any]:
        """Continue the prompts greedily; keep tokens and logits, and what rounding to each of
        `dtypes`, which the arms compute in, makes of them; count the experts that the steps hit."""
        w, runner = self.workload, self.engine.runner
        rows, steps = parity.rows_and_positions(w.batch, w.new, self.engine.config.vocab_size)
        self.fill()
        logits = runner.prefill(self.prompts, self.cache, w.depth)  # (B, W)
        hits: list[int] = []

        def count(_m: nn.Module, _i: Any, out: tuple[Tensor, Tensor]) -> None:
            hits.append(out[0].unique().numel())

        hooks = [
            m.register_forward_hook(count)
            for m in self.engine.model.modules()
            if isinstance(m, Router)
        ]
        kept, text = [], []
        for step in range(steps):
            kept.append(logits[:rows].cpu())
            text.append(logits.argmax(dim=-1))
            if step + 1 < max(steps, 2):
                logits = runner.decode(text[-1][:, None], self.cache)[:, -1]
        for hook in hooks:
            hook.remove()
        told = {
            "tokens": torch.stack(text).cpu(),
            "logits": torch.stack(kept),
        }  # (P, B), (P, rows, W)
        save_file(told, self.folder / "reference.safetensors")
        rounding = {amp: vars(self._rounding(amp, told)) for amp in dtypes if amp != "fp32"}
        (self.folder / "rounding.json").write_text(json.dumps(rounding))
        return {"experts_hit": sum(hits) / len(hits) if hits else 0.0, "rows": rows, "steps": steps}

    def _rounding(self, amp: str, told: dict[str, Tensor]) -> Bound:
        """The KL that this very code makes when its products are rounded to `amp`."""
        runner = self.engine.runner
        plain, runner.backend = runner.backend, dataclasses.replace(runner.backend, amp=amp)
        try:
            found = self._read_text(told, Bound(math.inf, math.inf))
            return Bound(found.median_kl, found.mean_kl)
        finally:
            runner.backend = plain

    def rates(self, dtypes: Iterable[str]) -> dict[str, Any]:
        """The machine's ceilings, by dtype."""
        return {
            dtype: vars(rates)
            for dtype, rates in roofline.measure_rates(self.engine.runner.device, dtypes).items()
        }

    def parity(self) -> dict[str, Any]:
        """Read the reference's text step by step, and compare the logits."""
        told = load_file(self.folder / "reference.safetensors")
        rounding = {
            amp: Bound(**made)
            for amp, made in json.loads((self.folder / "rounding.json").read_text()).items()
        }
        found = self._read_text(told, parity.bound(self.engine.backend, rounding))
        return vars(found) | {"passes": found.passes, "same_text": self._same_text(told)}

    def _same_text(self, told: dict[str, Tensor]) -> float | None:
        """The share of the reference's greedy text that was written before another token was; None
        where none was written, or coins chose it."""
        if not self.text or (
            self.workload.assumed is not None and self.engine.backend.speculate != "off"
        ):
            return None
        rows, steps = told["logits"].shape[1], len(told["tokens"])
        ours = torch.tensor(self.text[:rows])[:, :steps]  # (rows, P)
        return float((ours == told["tokens"].T[:rows]).long().cumprod(dim=1).double().mean())

    def _read_text(self, told: dict[str, Tensor], allowed: Bound) -> Parity:
        text, reference = told["tokens"].to(self.engine.runner.device), told["logits"]
        runner, rows = self.engine.runner, reference.shape[1]
        self.fill()
        ours: list[Tensor] = [
            runner.prefill(self.prompts, self.cache, self.workload.depth)[:rows].clone()
        ]
        # As many tokens at a time as a step of this arm reads: a verification is held to the
        # reference as it is computed.
        width = self.engine.backend.step_tokens
        text = torch.nn.functional.pad(
            text[:-1], (0, 0, 0, -(len(text) - 1) % width)
        )  # (a multiple of S, B)
        for start in range(0, len(text), width):
            ours += (
                runner.decode(text[start : start + width].T, self.cache)[:rows]
                .clone()
                .unbind(dim=1)
            )
        return parity.compare(ours[: len(reference)], reference, allowed)

    def kernels(self) -> dict[str, Any]:
        """What one decode step runs on the GPU (timeline.py), and how many kernels that is; None on
        a CPU."""
        if self.engine.runner.device.type == "cpu":
            return {"count": None, "parts": None}
        parts = timeline.load(self._export(self._profile()))
        return {"count": sum(part["calls"] for part in parts), "parts": parts}

    def moe_layer(self) -> dict[str, Any]:
        """Seconds of one MoE layer in a decode step: all of the model's in a row, called (or
        captured) as this arm does it."""
        runner, config = self.engine.runner, self.engine.config
        layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
        if not layers:
            return {"seconds": None}
        self.fill()
        runner.prefill(self.prompts, self.cache, self.workload.depth)
        embedding = runner.model.embed_tokens.weight[
            : self.cache.rows, None
        ]  # (B, 1, D): any hidden states will do

        def chain() -> None:
            with runner.context():
                step = runner.behind(self.cache, 1)
                hidden = embedding
                for layer in layers:
                    hidden = runner.blocks["decode"][layer](hidden, step, self.cache.layers[layer])

        if runner.backend.cuda_graphs:
            chain = graphs.record(chain).replay
        calls, times = 8, []
        for _ in range(7):
            synchronize(self.engine.runner.device)
            start = time.perf_counter()
            for _ in range(
                calls
            ):  # one after the other, as steps are: the host launches ahead of the GPU
                chain()
            synchronize(self.engine.runner.device)
            times.append((time.perf_counter() - start) / calls)
        return {"seconds": statistics.median(times[2:]) / len(layers)}

    def trace(self) -> dict[str, Any]:
        """A Chrome trace of one decode step, and its costliest kernels (on a CPU: operators)."""
        found = self._profile()
        path = self._export(found)
        if self.engine.runner.device.type == "cpu":
            table = found.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60
            )
        else:
            table = "\n".join(timeline.table(timeline.load(path)))
        return {"path": str(path), "table": table}

    def _export(self, found: profile) -> Path:
        """Where the Chrome trace of a profile is written to."""
        path = self.folder / "trace.json"
        found.export_chrome_trace(str(path))
        return path

    def _profile(self) -> profile:
        self.fill()
        runner, w = self.engine.runner, self.workload
        if runner.drafts:
            turns = speculate.launch(
                runner, self.prompts, Sampler(0.0, seed=w.seed), self.cache, w.depth, w.assumed
            )
            next(turns)
            step = partial(next, turns)
        else:
            tokens = runner.prefill(self.prompts, self.cache, w.depth).argmax(dim=-1)[:, None]
            step = partial(runner.decode, tokens, self.cache)
        step()
        gpu = self.engine.runner.device.type != "cpu"
        with profile(
            activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU], acc_events=True
        ) as found:
            step()
            synchronize(self.engine.runner.device)
        return found

    def accuracy(self, questions: list[Question]) -> dict[str, Any]:
        """The share of these that the arm answers rightly; a compiled or tuned one is asked in the
        shapes that it is made for."""
        backend = self.engine.backend
        batch = self.workload.batch if backend.compile or backend.tune else len(questions)
        share = exam.accuracy(self.engine, questions, self.workload.tokens, batch)
        return {"share": share, "problems": len(questions)}

    def memory(self) -> dict[str, Any]:
        """Peak memory in bytes: the allocator's and what it reserved during this repetition, and
        the process's own so far.

        What a graph computes in isn't allocated when it runs, but its own all the time.
        """
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.engine.runner.device.type == "cpu":
            return {"allocated": None, "reserved": None, "host": host}
        pools = [
            segment
            for segment in torch.cuda.memory_snapshot()
            if segment["segment_pool_id"] != (0, 0)
        ]
        graphs = sum(segment["total_size"] - segment["allocated_size"] for segment in pools)
        allocated = torch.cuda.max_memory_allocated() + graphs
        return {"allocated": allocated, "reserved": torch.cuda.max_memory_reserved(), "host": host}
