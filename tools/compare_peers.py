"""Ours beside transformers: the same shape, prompts and machine, in turn, in one call.

    python tools/compare_peers.py --shape moonlight-16b                    # eager, both
    python tools/compare_peers.py --shape moonlight-16b --compiled --cuda-graphs

Weights are random, N(0, 0.02), each side its own, so the work is the same and the tokens are not. Each peer has a process
of its own; repetitions are taken in turn. transformers runs as its users run it: `generate`, with its default attention and
experts; `--compiled` adds its static cache, with which it compiles the decode step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from r1 import InputError, build, switches
from r1.backend import Backend, resolve
from r1.config import SHAPES, Config, shape
from r1.generate import Engine, Sampler
from r1.machine import Machine

Measure = Callable[[], dict[str, float]]


def ours(config: Config, arguments: argparse.Namespace) -> Measure:
    """Our engine with the given switches."""
    backend = resolve(Backend(**switches.given(arguments)), config, batch=arguments.batch)
    engine = Engine(build.from_shape(config, backend), backend)
    prompts = _prompts(config, arguments).tolist()
    cache = engine.runner.cache(arguments.batch, arguments.prompt + arguments.new)

    def measure() -> dict[str, float]:
        cache.lengths.zero_()
        _synchronize()
        start, arrivals = time.perf_counter(), []
        for _ in engine.steps(prompts, arguments.new, Sampler(0.0), cache):
            arrivals.append(time.perf_counter() - start)
        return {"ttft": arrivals[0], "tpot": (arrivals[-1] - arrivals[0]) / (arguments.new - 1)}

    return measure


def transformers(config: Config, arguments: argparse.Namespace, *, static: bool) -> Measure:
    """transformers' model of the same family, random weights, its own generate."""
    from transformers import AutoConfig, AutoModelForCausalLM  # an extra: pip install -e '.[peers]'

    raw = config.to_dict()
    raw.pop("quantization_config", None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0.0, 0.02) if tensor.dim() > 1 else tensor.fill_(1.0)
        for tensor in model.buffers():  # the gate's bias
            tensor.zero_()
    rotary = type(model.model.rotary_emb)  # its frequencies are computed, not stored: meta lost them
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
        _synchronize()
        start = time.perf_counter()
        model.generate(tokens, max_new_tokens=new, min_new_tokens=new, **options)
        _synchronize()
        return time.perf_counter() - start

    def measure() -> dict[str, float]:
        first, all_of_them = timed(1), timed(arguments.new)
        return {"ttft": first, "tpot": (all_of_them - first) / (arguments.new - 1)}

    return measure


def serve(pipe: Connection, name: str, arguments: argparse.Namespace) -> None:
    """One peer's process: warm up twice, then a repetition for each message."""
    config = shape(arguments.shape, arguments.layers)
    measure = ours(config, arguments) if name == "r1" else transformers(config, arguments, static="static" in name)
    start = time.perf_counter()
    measure()
    first = time.perf_counter() - start
    measure()
    pipe.send({"first_call_s": first})
    while pipe.recv() == "measure":
        pipe.send(measure())
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    pipe.send({"allocated_gb": peak / 1e9})


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for input that can't be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, metavar="N")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="transformers with a static cache and its compiled decode too")
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    switches.add_flags(parser)
    arguments = parser.parse_args(argv)
    try:
        resolve(Backend(**switches.given(arguments)), shape(arguments.shape, arguments.layers), batch=arguments.batch)
    except InputError as error:
        print(f"compare_peers: {error}", file=sys.stderr)
        return 2

    names = ["r1", "transformers eager"] + (["transformers static cache + compile"] if arguments.compiled else [])
    figures = compare(names, arguments)
    import transformers as peer

    machine = (
        f"{Machine.here().name}, torch {torch.__version__}, transformers {peer.__version__}, python {platform.python_version()}"
    )
    used = Backend(**switches.given(arguments)).describe()
    print(f"{machine}\n{arguments.shape}, batch {arguments.batch}, {arguments.prompt} + {arguments.new} tokens, r1: {used}\n")
    print(
        "| | TTFT ms | TPOT ms (range) | tok/s | r1's TPOT / its | first call s | GPU GB |\n|---|---:|---:|---:|---:|---:|---:|"
    )
    for name in names:
        f = figures[name]
        tpots = [1e3 * r["tpot"] for r in f["repetitions"]]
        ttft = 1e3 * statistics.median(r["ttft"] for r in f["repetitions"])
        ratios = [a["tpot"] / b["tpot"] for a, b in zip(figures["r1"]["repetitions"], f["repetitions"], strict=True)]
        tpot = statistics.median(tpots)
        print(
            f"| {name} | {ttft:.1f} | {tpot:.2f} ({min(tpots):.2f}-{max(tpots):.2f}) | {arguments.batch * 1e3 / tpot:.1f} "
            f"| {statistics.median(ratios):.2f} | {f['first_call_s']:.1f} | {f['allocated_gb']:.1f} |"
        )
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"machine": machine, "arguments": vars(arguments), "figures": figures}, indent=1, default=str)
        )
    return 0


def compare(names: list[str], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Start the peers one after the other, then measure them in turn."""
    context = multiprocessing.get_context("spawn")
    figures: dict[str, dict[str, Any]] = {}
    pipes: dict[str, Any] = {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, name, arguments), daemon=True).start()
        theirs.close()
        figures[name] = {**pipes[name].recv(), "repetitions": []}
    for _ in range(arguments.repetitions):
        for name, pipe in pipes.items():
            pipe.send("measure")
            figures[name]["repetitions"].append(pipe.recv())
    for name, pipe in pipes.items():
        pipe.send("quit")
        figures[name] |= pipe.recv()
    return figures


def _prompts(config: Config, arguments: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (arguments.batch, arguments.prompt), generator=generator)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
