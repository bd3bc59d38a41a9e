"""What each optimization buys on this machine: `python bench.py --compile --amp bf16`.

Prints the machine, then one row per arm: baseline (all switches off), each given switch alone, all given together. Every
arm runs in a process of its own, all warmed up alike; repetitions are taken in turn, so that a drifting clock hits all of
them; and each arm's logits are held against an fp32 eager reference on the same tokens.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import platform
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from r1 import InputError, switches
from r1.__main__ import EMBEDDED
from r1.backend import Backend, Machine
from r1.bench import arms, report, worker
from r1.bench.arms import Arm, Workload
from r1.config import SHAPES, Config, shape


class Process:
    """A worker process and the pipe to it."""

    def __init__(self, backend: Backend, workload: Workload, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=worker.serve, args=(theirs, backend, workload, folder), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer. A worker that died is an answer too."""
        try:
            self.pipe.send(command)
            answer: dict[str, Any] = self.pipe.recv()
            return answer
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            return {"refused": f"its process ended with status {self.process.exitcode} (its own words are above)"}

    def quit(self) -> None:
        if self.process.is_alive():
            self.pipe.send("quit")
        self.process.join(timeout=30)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where an arm fails parity; 2 for input that can't be used."""
    arguments = parser().parse_args(argv)
    try:
        return run(arguments)
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="bench.py", description="Measure what each optimization buys on this machine.")
    model = p.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint's folder (default: the embedded tiny-r1)")
    model.add_argument("--shape", choices=SHAPES, help="random weights of a published shape, made on the device")
    p.add_argument("--layers", type=int, metavar="N", help="only the first N layers of --shape")
    p.add_argument("--batch", type=numbers, default=[1], metavar="N,..", help="rows decoded together (default 1)")
    p.add_argument("--prompt", type=numbers, default=[128], metavar="N,..", help="tokens of each prompt (default 128)")
    p.add_argument("--new", type=numbers, default=[128], metavar="N,..", help="new tokens of each row (default 128)")
    p.add_argument("--depth", type=numbers, default=[0], metavar="N,..", help="tokens in the cache before (default 0)")
    p.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="repetitions of each arm (default 5)")
    p.add_argument("--seed", type=int, default=0, help="of random weights and prompts")
    p.add_argument("-o", "--output", choices=("md", "json", "jsonl", "csv"), default="md", help="what is printed (default md)")
    switches.add_flags(p)
    return p


def numbers(text: str) -> list[int]:
    """A comma list of whole numbers, 0 or more."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 0:
        raise ValueError(text)
    return values


def run(arguments: argparse.Namespace) -> int:
    if arguments.repetitions < 1 or min(*arguments.batch, *arguments.prompt, *arguments.new, 1) < 1:
        raise InputError("--batch, --prompt, --new and -r take 1 or more")
    if arguments.layers is not None and arguments.shape is None:
        raise InputError("--layers cuts a --shape, and none is given: a checkpoint is run whole")
    model = None if arguments.shape else str(arguments.model or EMBEDDED)
    config = Config.load(model) if model else shape(arguments.shape, arguments.layers)
    compared = arms.from_switches(switches.given(arguments))
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for batch, prompt, new, depth in itertools.product(arguments.batch, arguments.prompt, arguments.new, arguments.depth):
        workload = Workload(model, arguments.shape, arguments.layers, batch, prompt, new, depth, arguments.seed)
        rows += measure(compared, workload, arguments.repetitions)
    machine = Machine.here()
    result = {
        "schema": 1,
        "machine": {
            "name": machine.name,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "workload": workload.describe() if len(rows) == len(compared) else f"{model or arguments.shape}",
        "config": config.to_dict(),
        "repetitions": arguments.repetitions,
        "rows": rows,
        "notes": notes,
    }  # fmt: skip
    print(report.render(result, arguments.output))
    return 1 if any(row.get("parity") is False for row in rows) else 0


def measure(compared: list[Arm], workload: Workload, repetitions: int) -> list[dict[str, Any]]:
    """All arms on one workload: reference first, then every arm warmed up, then repetitions in turn."""
    with tempfile.TemporaryDirectory(prefix="r1-bench-") as name:
        folder = Path(name)
        base = compared[0].backend
        say(f"reference (fp32, eager): {workload.describe()}")
        reference = Process(Backend(device=base.device, dtype="fp32", attention="naive", prefill_moe="loop"), workload, folder)
        refuse(reference.ask("build"))
        refuse(reference.ask("reference"))
        reference.quit()

        alive: dict[str, Process] = {}
        found: dict[str, dict[str, Any]] = {arm.name: {"measure": []} for arm in compared}
        try:
            for arm in compared:
                process = alive[arm.name] = Process(arm.backend, workload, folder)
                for command in ("build", "warm", "parity"):
                    say(f"{arm.name}: {command}")
                    answer = process.ask(command)
                    if "refused" in answer:
                        found[arm.name]["refused"] = answer["refused"]
                        alive.pop(arm.name).quit()
                        break
                    found[arm.name][command] = answer
            for repetition in range(repetitions):
                say(f"repetition {repetition + 1} of {repetitions}")
                for arm_name, process in alive.items():
                    found[arm_name]["measure"].append(process.ask("measure"))
            for arm_name, process in alive.items():
                found[arm_name]["memory"] = process.ask("memory")
        finally:
            for process in alive.values():
                process.quit()
            say("")
    baseline = found[compared[0].name].get("measure") or None
    sizes = vars(workload)
    return [report.row(arm.name, sizes, found[arm.name], None if arm is compared[0] else baseline) for arm in compared]


def refuse(answer: dict[str, Any]) -> None:
    if "refused" in answer:
        raise InputError(answer["refused"])


def say(text: str) -> None:
    """The progress line, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="" if text else "\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
