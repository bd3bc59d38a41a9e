"""Measure r1 and transformers in turn: the same shape, prompts and machine.

    # both eager
    python tools/measure/compare_peers.py --shape moonlight-16b
    python tools/measure/compare_peers.py --shape moonlight-16b --compiled --cuda-graphs

Each side has its own random weights, N(0, 0.02), so the work is the same and the tokens differ.
Each side has a process of its own, and repetitions are taken in turn. transformers runs as its
users run it: `generate`, with its default attention and experts. `--compiled` adds a second run of
transformers with its static cache, for which it compiles the decode step (on a GPU only).
"""

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

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
import torch

from r1 import InputError, build
from r1.bench.process import Answer, Process, answer_commands, interrupt_once, signals
from r1.device import DTYPES, synchronize, torch_device
from r1.files.config_json import dump_config
from r1.model.config import Config
from r1.model.shapes import SHAPES, shape
from r1.run.engine import Engine
from r1.run.sampler import Sampler
from r1.switches import flags
from r1.switches.backend import Backend
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

Measure = Callable[[], dict[str, float]]


def ours(config: Config, arguments: argparse.Namespace) -> Measure:
    """r1's engine with the given switches."""
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
    """transformers' `generate`, on its model of the same family with random weights."""
    backend = resolve(Backend(**flags.given(arguments)), config, batch=arguments.batch)
    device, dtype = torch_device(backend.device), DTYPES[backend.dtype]
    model = _random_model(config, device, dtype)
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
        whole = timed(arguments.new)  # the longer run first: its static cache serves both
        first = timed(1)
        return {"ttft": first, "tpot": (whole - first) / (arguments.new - 1)}

    return measure


def _random_model(config: Config, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' model of the family, allocated on the device without a copy on the host."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = dump_config(config)
    raw.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0.0, 0.02) if tensor.dim() > 1 else tensor.fill_(1.0)
        for tensor in model.buffers():  # the gate's bias
            tensor.zero_()
    # Its frequencies are computed, not stored, so the meta device lost them.
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config=model.config).to(device)
    return model.eval()


def serve(pipe: Connection, name: str, arguments: argparse.Namespace) -> None:
    """The main function of one side's process. It answers three commands:

    - "start": make the model, and warm up twice
    - "measure": one repetition
    - "memory": the GPU's peak
    """
    measure: Measure

    def start() -> Answer:
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

    def memory() -> Answer:
        gpu = torch.cuda.is_available()
        return {"allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0}

    answer_commands(pipe, {"start": start, "measure": lambda: measure(), "memory": memory})


def parser() -> argparse.ArgumentParser:
    p = shared.parser(__doc__)
    p.add_argument("--shape", choices=SHAPES, default="tiny", help="default tiny")
    p.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="rows (default 1)")
    p.add_argument(
        "--prompt", type=int, default=128, metavar="N", help="tokens of a prompt (default 128)"
    )
    p.add_argument(
        "--new", type=int, default=128, metavar="N", help="new tokens of a row (default 128)"
    )
    p.add_argument("-r", "--repetitions", type=int, default=3, metavar="N", help="default 3")
    p.add_argument(
        "--compiled",
        action="store_true",
        help="measure transformers with its static cache and compiled decode step too",
    )
    shared.add_output(p, "write the figures as JSON")
    flags.add_flags(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 2 for input that can't be used, 130 after Ctrl-C."""
    return shared.run(__file__, work, parser().parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    if find_spec("transformers") is None:
        raise InputError("transformers is not installed: pip install -e '.[peers]'")
    if min(arguments.batch, arguments.prompt, arguments.new - 1, arguments.repetitions) < 1:
        raise InputError("--batch, --prompt and -r take 1 or more, --new 2 or more")
    shared.check_output(arguments.output)
    config = shape(arguments.shape, arguments.layers)
    resolve(Backend(**flags.given(arguments)), config, batch=arguments.batch)  # or InputError

    names = ["transformers eager"]
    names += ["transformers static cache + compile"] if arguments.compiled else []
    versions = f"torch {torch.__version__}, transformers {version('transformers')}"
    machine = f"{Machine.here().name}, {versions}, python {platform.python_version()}"
    result: dict[str, Any] = {"machine": machine, "arguments": shared.recorded(arguments)}
    try:
        with signals(interrupt_once):  # children ignore signals: on SIGTERM too we must end them
            for figures in compare(names, arguments):
                result["figures"] = figures
                if arguments.output:
                    text = json.dumps(result, indent=1) + "\n"
                    arguments.output.write_text(text, encoding="utf-8")
    except KeyboardInterrupt:
        return 130
    print(machine, "\n".join(table(result)), sep="\n\n")
    return 0


def table(result: dict[str, Any]) -> list[str]:
    """A result file's content as Markdown: the sizes, then a row for each side."""
    how = result["arguments"]
    switches = {name: how[name] for name in how if name in Backend.__dataclass_fields__}
    sizes = f"{how['shape']}, batch {how['batch']}, {how['prompt']} + {how['new']} tokens"
    return [
        f"{sizes}; r1: {Backend(**switches).describe()}",
        "",
        "| | TTFT ms | TPOT ms (range) | tok/s | r1's TPOT / its (range) | first call s | GPU GB |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_row(name, figures, how["batch"]) for name, figures in result["figures"].items()),
    ]


def _row(name: str, figures: dict[str, Any], batch: int) -> str:
    repetitions = figures["repetitions"]
    ttft = 1e3 * statistics.median(r["ttft"] for r in repetitions)
    tpots = [1e3 * r["tpot"] for r in repetitions]
    tpot = statistics.median(tpots)
    beside = figures.get("beside", [])
    ratios = [us["tpot"] / them["tpot"] for us, them in zip(beside, repetitions, strict=False)]
    ratio = "1"
    if ratios:
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    times = f"{ttft:.1f} | {tpot:.2f} ({min(tpots):.2f}-{max(tpots):.2f})"
    ends = f"{figures['first_call_s']:.1f} | {figures['allocated_gb']:.1f}"
    return f"| {name} | {times} | {batch * 1e3 / tpot:.1f} | {ratio} | {ends} |"


def compare(names: list[str], arguments: argparse.Namespace) -> Iterator[dict[str, dict[str, Any]]]:
    """Measure each of `names` in turn with r1. Yields all figures so far, after each.

    r1 stays, and the others come one after another, so two models need memory at a time. The
    "beside" of a side holds those repetitions of r1 that were taken in turn with its own.
    """
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
def peer(name: str, arguments: argparse.Namespace) -> Iterator[Callable[[str], Answer]]:
    """A side's process, and a function that sends it a command. The process ends with the block.

    The function raises InputError if the side refuses.
    """
    print(f"{name}: starting", file=sys.stderr)
    with Process(serve, name, arguments) as process:

        def ask(command: str) -> Answer:
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
