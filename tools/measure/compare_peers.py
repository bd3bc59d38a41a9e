"""Ours beside transformers: the same shape, prompts and machine, in turn, in one call.

    python tools/measure/compare_peers.py --shape moonlight-16b                    # eager, both
    python tools/measure/compare_peers.py --shape moonlight-16b --compiled --cuda-graphs

Weights are random, N(0, 0.02), each side its own, so the work is the same and the tokens are not.
Each peer has a process of its own; repetitions are taken in turn with ours. transformers runs as
its users run it: `generate`, with its default attention and experts; `--compiled` adds its static
cache, with which it compiles the decode step (on a GPU only)."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from r1 import InputError, build
from r1.bench.process import Found, Process, answer, interrupt_once, signals
from r1.device import DTYPES, synchronize, torch_device
from r1.files.config_json import dump_config
from r1.model.config import Config
from r1.model.shapes import SHAPES, shape
from r1.run.generate import Engine
from r1.run.sampler import Sampler
from r1.switches import flags
from r1.switches.backend import Backend, resolve
from r1.switches.machine import Machine

Measure = Callable[[], dict[str, float]]


def ours(config: Config, arguments: argparse.Namespace) -> Measure:
    """Our engine with the given switches."""
    backend = resolve(Backend(**flags.given(arguments)), config, batch=arguments.batch)
    engine = Engine(build.from_shape(config, backend), backend)
    prompts = _prompts(config, arguments).tolist()
    cache = engine.runner.cache(arguments.batch, arguments.prompt + arguments.new)

    def measure() -> dict[str, float]:
        cache.lengths.zero_()
        synchronize(engine.runner.device)
        start, arrivals = time.perf_counter(), []
        for _ in engine.steps(prompts, arguments.new, Sampler(0.0), cache):
            arrivals.append(time.perf_counter() - start)
        return {"ttft": arrivals[0], "tpot": (arrivals[-1] - arrivals[0]) / (arguments.new - 1)}

    return measure


def transformers(config: Config, arguments: argparse.Namespace, *, static: bool) -> Measure:
    """transformers' model of the same family, random weights, its own generate."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = dump_config(config)
    raw.pop("quantization_config", None)
    backend = resolve(Backend(**flags.given(arguments)), config, batch=arguments.batch)
    device, dtype = torch_device(backend.device), DTYPES[backend.dtype]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0.0, 0.02) if tensor.dim() > 1 else tensor.fill_(1.0)
        for tensor in model.buffers():  # the gate's bias
            tensor.zero_()
    rotary = type(
        model.model.rotary_emb
    )  # its frequencies are computed, not stored: meta lost them
    model.model.rotary_emb = rotary(config=model.config).to(device)
    model.eval()
    tokens = _prompts(config, arguments).to(device)
    options: dict[str, Any] = {
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(tokens),
    }
    if static:
        options["cache_implementation"] = "static"

    def timed(new: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        model.generate(tokens, max_new_tokens=new, min_new_tokens=new, **options)
        synchronize(device)
        return time.perf_counter() - start

    def measure() -> dict[str, float]:
        all_of_them, first = (
            timed(arguments.new),
            timed(1),
        )  # the longer first: its static cache serves both
        return {"ttft": first, "tpot": (all_of_them - first) / (arguments.new - 1)}

    return measure


def serve(pipe: Connection, name: str, arguments: argparse.Namespace) -> None:
    """One peer's process: answers "start", which warms up twice, then "measure", a repetition, and
    "memory"."""
    measure: Measure

    def start() -> Found:
        nonlocal measure
        config = shape(arguments.shape, arguments.layers)
        measure = (
            ours(config, arguments)
            if name == "r1"
            else transformers(config, arguments, static="static" in name)
        )
        begin = time.perf_counter()
        measure()
        first = time.perf_counter() - begin
        measure()
        return {"first_call_s": first}

    def memory() -> Found:
        return {
            "allocated_gb": torch.cuda.max_memory_allocated() / 1e9
            if torch.cuda.is_available()
            else 0.0
        }

    answer(pipe, {"start": start, "measure": lambda: measure(), "memory": memory})


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--shape", choices=SHAPES, default="tiny")
    p.add_argument("--layers", type=int, metavar="N")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--prompt", type=int, default=128)
    p.add_argument("--new", type=int, default=128)
    p.add_argument("-r", "--repetitions", type=int, default=3)
    p.add_argument(
        "--compiled",
        action="store_true",
        help="transformers with a static cache and its compiled decode too",
    )
    p.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    flags.add_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 2 for input that can't be used, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    try:
        if find_spec("transformers") is None:
            raise InputError("transformers is not installed: pip install -e '.[peers]'")
        if min(arguments.batch, arguments.prompt, arguments.new - 1, arguments.repetitions) < 1:
            raise InputError("--batch, --prompt and -r take 1 or more, --new 2 or more")
        resolve(
            Backend(**flags.given(arguments)),
            shape(arguments.shape, arguments.layers),
            batch=arguments.batch,
        )
    except InputError as error:
        print(f"compare_peers: {error}", file=sys.stderr)
        return 2

    names = ["transformers eager"] + (
        ["transformers static cache + compile"] if arguments.compiled else []
    )
    versions = f"torch {torch.__version__}, transformers {version('transformers')}, python {platform.python_version()}"
    found = {"machine": f"{Machine.here().name}, {versions}", "arguments": vars(arguments)}
    try:
        with signals(interrupt_once):  # SIGTERM too must end the peers, which are deaf to it
            for figures in compare(names, arguments):
                found["figures"] = figures
                if arguments.output:
                    arguments.output.write_text(json.dumps(found, indent=1, default=str) + "\n")
    except InputError as error:
        print(f"compare_peers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(found["machine"], "\n".join(table(found)), sep="\n\n")
    return 0


def table(found: dict[str, Any]) -> list[str]:
    """What `-o` keeps, as lines of Markdown: what ran, then a row for each peer."""
    how, figures = found["arguments"], found["figures"]
    used = Backend(
        **{name: how[name] for name in how if name in Backend.__dataclass_fields__}
    ).describe()
    sizes = f"{how['shape']}, batch {how['batch']}, {how['prompt']} + {how['new']} tokens"
    lines = [
        f"{sizes}; r1: {used}",
        "",
        "| | TTFT ms | TPOT ms (range) | tok/s | r1's TPOT / its (range) | first call s | GPU GB |",
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for name, f in figures.items():
        tpots = [1e3 * r["tpot"] for r in f["repetitions"]]
        tpot, ttft = (
            statistics.median(tpots),
            1e3 * statistics.median(r["ttft"] for r in f["repetitions"]),
        )
        ratios = [
            ours["tpot"] / theirs["tpot"]
            for ours, theirs in zip(f.get("beside", []), f["repetitions"], strict=False)
        ]
        ratio = (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            if ratios
            else "1"
        )
        lines.append(
            f"| {name} | {ttft:.1f} | {tpot:.2f} ({min(tpots):.2f}-{max(tpots):.2f}) | {how['batch'] * 1e3 / tpot:.1f} "
            f"| {ratio} | {f['first_call_s']:.1f} | {f['allocated_gb']:.1f} |"
        )
    return lines


def compare(names: list[str], arguments: argparse.Namespace) -> Iterator[dict[str, dict[str, Any]]]:
    """Measure each of `names` in turn with ours; yields all figures so far after each. Ours stays,
    the others come one after the other: two models need memory at a time. A peer's "beside" holds
    our repetitions that were taken in turn with its own."""
    with peer("r1", arguments) as us:
        figures: dict[str, dict[str, Any]] = {"r1": {**us("start"), "repetitions": []}}
        for name in names:
            with peer(name, arguments) as them:
                started = them("start")
                turns = [(us("measure"), them("measure")) for _ in range(arguments.repetitions)]
                beside, repetitions = [ours for ours, _ in turns], [theirs for _, theirs in turns]
                figures["r1"]["repetitions"] += beside
                figures[name] = {
                    **started,
                    "repetitions": repetitions,
                    **them("memory"),
                    "beside": beside,
                }
            yield figures
        figures["r1"] |= us("memory")
    yield figures


@contextmanager
def peer(name: str, arguments: argparse.Namespace) -> Iterator[Callable[[str], Found]]:
    """A peer's process, for as long as it is wanted: a function that asks it. Raises InputError
    where it can't answer."""
    print(f"{name}: starting", file=sys.stderr)
    with Process(serve, name, arguments) as process:

        def ask(command: str) -> Found:
            found = process.ask(command)
            if "refused" in found:
                raise InputError(f"{name}: {found['refused']}")
            return found

        yield ask


def _prompts(config: Config, arguments: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        config.vocab_size, (arguments.batch, arguments.prompt), generator=generator
    )


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
