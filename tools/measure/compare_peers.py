"""Measure r1 and transformers in turn: the same shape, prompts and machine.

    # both eager
    python tools/measure/compare_peers.py --shape moonlight-16b
    python tools/measure/compare_peers.py --shape moonlight-16b --compiled --cuda-graphs

Each side has its own random weights, N(0, 0.02), so the work is the same and the tokens differ.
Each side has a process of its own. Repetitions are taken in turn where the memory holds two models
in the dtype that is asked for, and otherwise one side after the other. r1's process is that of a
bench.py arm: before anything is timed, its logits are held against the fp32 reference. If they
fail, no ratio is shown, and the exit status is 1.
transformers runs as its users run it: `generate`, with its default attention and experts.
`--compiled` adds a second run of transformers with its static cache, whose decode step it compiles.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
import torch
from peer_transformers import serve

from r1 import InputError
from r1.bench.arms import from_switches
from r1.bench.compiler_checks import CompilerChecks
from r1.bench.measure import how_many_fit
from r1.bench.process import Answer, Process, interrupt_once, signals
from r1.bench.reference import make_reference
from r1.bench.session import Session
from r1.bench.team import Lead
from r1.bench.worker.serve import Setup
from r1.bench.workload import Workload
from r1.model.shapes import SHAPES, shape
from r1.switches import flags
from r1.switches.backend import Backend
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

ALONE = "The memory holds one model at a time, so r1 was measured first, and the others after it."
Ask = Callable[[str], Answer]
"""Sends a command to a side's process: "start", "measure" or "memory"; to r1's also "quit"."""


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
    """Returns the exit status: 0; 1 if r1's logits are wrong, 2 for input that can't be used, 130
    after Ctrl-C.
    """
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
    result["in_turn"] = two_fit(arguments)
    try:
        with signals(interrupt_once):  # children ignore signals: on SIGTERM too we must end them
            for figures in compare(names, arguments, in_turn=result["in_turn"]):
                result["figures"] = figures
                if arguments.output:
                    text = json.dumps(result, indent=1) + "\n"
                    arguments.output.write_text(text, encoding="utf-8")
    except KeyboardInterrupt:
        return 130
    print(machine, "\n".join(table(result)), sep="\n\n")
    return 0 if result["figures"]["r1"]["parity"]["passes"] else 1


def table(result: dict[str, Any]) -> list[str]:
    """A result file's content as Markdown: the sizes, then a row for each side, then r1's parity.

    Files that this tool wrote before it checked parity have none.
    """
    how, figures = result["arguments"], result["figures"]
    switches = {name: how[name] for name in how if name in Backend.__dataclass_fields__}
    sizes = f"{how['shape']}, batch {how['batch']}, {how['prompt']} + {how['new']} tokens"
    parity = figures["r1"].get("parity")
    wrong = parity is not None and not parity["passes"]
    return [
        f"{sizes}; r1: {Backend(**switches).describe()}",
        "",
        "| | TTFT ms | TPOT ms (range) | tok/s | r1's TPOT / its (range) | first call s | GPU GB |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_row(name, each, how["batch"], wrong) for name, each in figures.items()),
        *(() if parity is None else ("", _parity(parity))),
        *(() if result.get("in_turn", True) else ("", ALONE)),
    ]


def _parity(parity: dict[str, Any]) -> str:
    verdict = "passes" if parity["passes"] else "FAILS"
    kl = f"median KL {parity['median_kl']:.1e}, and {parity['bound']:.1e} would pass"
    return f"r1's parity with the fp32 reference {verdict}: {kl}."


def _row(name: str, figures: dict[str, Any], batch: int, wrong: bool) -> str:
    repetitions = figures["repetitions"]
    ttft = 1e3 * statistics.median(r["ttft"] for r in repetitions)
    tpots = [1e3 * r["tpot"] for r in repetitions]
    tpot = statistics.median(tpots)
    beside = figures.get("beside", [])
    ratios = [us["tpot"] / them["tpot"] for us, them in zip(beside, repetitions, strict=False)]
    ratio = "1"
    if ratios:
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    ratio = "parity fails" if wrong else ratio
    times = f"{ttft:.1f} | {tpot:.2f} ({min(tpots):.2f}-{max(tpots):.2f})"
    ends = f"{figures['first_call_s']:.1f} | {figures['allocated_gb']:.1f}"
    return f"| {name} | {times} | {batch * 1e3 / tpot:.1f} | {ratio} | {ends} |"


def two_fit(arguments: argparse.Namespace) -> bool:
    """Whether the memory holds r1's model and transformers' at a time."""
    workload = workload_of(arguments)
    return how_many_fit(from_switches(flags.given(arguments))[:1], workload, workload.config()) > 1


def workload_of(arguments: argparse.Namespace) -> Workload:
    """The work of both sides."""
    sizes = (arguments.batch, arguments.prompt, arguments.new, 0, 0)
    return Workload(None, arguments.shape, arguments.layers, *sizes)


def compare(
    names: list[str], arguments: argparse.Namespace, *, in_turn: bool = True
) -> Iterator[dict[str, dict[str, Any]]]:
    """Measure each of `names` in turn with r1. Yields all figures so far, after each.

    r1 stays, and the others come one after another, so two models need memory at a time. The
    "beside" of a side holds those repetitions of r1 that were taken in turn with its own. Not
    `in_turn`: r1 is measured once, and ends, before the others come.
    """
    times = range(arguments.repetitions)
    with own_side(arguments) as us:
        figures: dict[str, dict[str, Any]] = {"r1": {**us("start"), "repetitions": []}}
        before: list[Answer] = []
        if not in_turn:
            before = figures["r1"]["repetitions"] = [us("measure") for _ in times]
            us("quit")
        for name in names:
            with peer(name, arguments) as them:
                started = them("start")
                turns = [(us("measure") if in_turn else before[n], them("measure")) for n in times]
                beside, repetitions = [ours for ours, _ in turns], [theirs for _, theirs in turns]
                if in_turn:
                    figures["r1"]["repetitions"] += beside
                figures[name] = {
                    **started,
                    "repetitions": repetitions,
                    **them("memory"),
                    "beside": beside,
                }
            figures["r1"] |= us("memory")
            yield figures


@contextmanager
def own_side(arguments: argparse.Namespace) -> Iterator[Ask]:
    """r1's process, an arm of bench.py, after its fp32 reference is made."""
    workload = workload_of(arguments)
    compared, config = from_switches(flags.given(arguments)), workload.config()
    arm, lead, setup = compared[-1], Lead(), Setup()
    peak = 0.0

    with tempfile.TemporaryDirectory(prefix="r1-peers-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        checks = stack.enter_context(CompilerChecks([arm], config, folder))
        make_reference([compared[0], arm], workload, config, folder, checks, setup, lead)
        checks.join()
        session = Session(arm, workload, folder, [], "r1", setup, lead)
        stack.callback(session.process.quit)

        def start() -> Answer:
            ask("build")
            first = ask("measure")["total"]
            return {"first_call_s": first, "parity": ask("parity")}

        def ask(command: str) -> Answer:
            nonlocal peak
            answer = session.process.ask(command)
            if "refused" in answer:
                raise InputError(f"r1: {answer['refused']}")
            if command == "measure":
                peak = max(peak, (answer["memory"]["allocated"] or 0) / 1e9)
            return answer

        def measure() -> Answer:
            answer = ask("measure")
            tpot = (answer["total"] - answer["ttft"]) / (arguments.new - 1)
            return {"ttft": answer["ttft"], "tpot": tpot}

        def end() -> Answer:
            session.process.quit()
            return {}

        commands = {"start": start, "measure": measure, "quit": end}
        commands["memory"] = lambda: {"allocated_gb": peak}
        yield lambda command: commands[command]()


@contextmanager
def peer(name: str, arguments: argparse.Namespace) -> Iterator[Ask]:
    """transformers' process, which ends with the block. `Ask` raises InputError if it refuses."""
    print(f"{name}: starting", file=sys.stderr)
    with Process(serve, name, arguments) as process:

        def ask(command: str) -> Answer:
            found = process.ask(command)
            if "refused" in found:
                raise InputError(f"{name}: {found['refused']}")
            return found

        yield ask


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
