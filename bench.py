"""What each optimization buys on this machine: `python bench.py --compile --amp bf16`, or all of
them: `--ablate`.

Prints the machine, then one row per arm: baseline (all switches off), each given switch alone, all
given together. Every arm runs in a process of its own, all warmed up alike; repetitions are taken
in turn with the baseline's, so that a drifting clock hits both; and each arm's logits are held
against an fp32 eager reference on the same tokens. A checkpoint that brings problems is asked some
of them by each arm."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from r1 import InputError
from r1.__main__ import EMBEDDED
from r1.bench import arms, exam, merge, plot, report, worker
from r1.bench.arms import TEXTBOOK, Arm, Settings, Workload
from r1.bench.exam import Question
from r1.bench.process import Found, Process, interrupt_once, signals
from r1.build import HEADROOM, count_parameters
from r1.device import DTYPES, available_bytes, torch_device
from r1.errors import hung_up
from r1.files.config_json import dump_config
from r1.model.config import Config
from r1.model.shapes import SHAPES
from r1.switches import flags
from r1.switches.backend import Backend, resolve
from r1.switches.machine import Machine, explain

REFERENCE = "fp32 reference"
PROBLEMS = 16
"""Asked by default: what two CPU cores answer in a few seconds."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where an arm fails parity or breaks down; 2 for bad input; 130
    after Ctrl-C."""
    arguments = parser().parse_args(argv)
    try:
        return run(arguments)
    except BrokenPipeError:
        return hung_up()
    except InputError as error:
        say("")
        print(f"bench: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="bench.py", description="Measure what each optimization buys on this machine."
    )
    model = p.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a checkpoint's folder (default: the embedded tiny-r1)",
    )
    model.add_argument(
        "--shape", choices=SHAPES, help="random weights of a published shape, made on the device"
    )
    p.add_argument("--layers", type=int, metavar="N", help="only the first N layers of --shape")
    p.add_argument(
        "--batch",
        type=numbers,
        default=[1],
        metavar="N,..",
        help="rows decoded together (default 1)",
    )
    p.add_argument(
        "--prompt",
        type=numbers,
        default=[128],
        metavar="N,..",
        help="tokens of each prompt (default 128)",
    )
    p.add_argument(
        "--new",
        type=numbers,
        default=[128],
        metavar="N,..",
        help="new tokens of each row (default 128)",
    )
    p.add_argument(
        "--depth",
        type=partial(numbers, least=0),
        default=[0],
        metavar="N,..",
        help="tokens in the cache before (default 0)",
    )
    p.add_argument(
        "-r",
        "--repetitions",
        type=int,
        default=5,
        metavar="N",
        help="repetitions of each arm (default 5)",
    )
    p.add_argument("--seed", type=flags.seed, default=0, help="of random weights and prompts")
    p.add_argument(
        "--problems", type=int, metavar="N",
        help=f"how many problems of the checkpoint's {exam.FILE}, if it has one, each arm is asked (default {PROBLEMS}; 0: none)",
    )  # fmt: skip
    p.add_argument(
        "--ablate",
        action="store_true",
        help="every switch this machine can run: ladder, alone, all but one, pairs",
    )
    p.add_argument(
        "--only", type=kinds, metavar="KIND,..",
        help=f"kinds of arms beside the baseline: {', '.join(arms.KINDS)}, or {arms.ALL_BUT}SWITCH for one of all-but-one "
        f"(default {','.join(arms.USUAL)}; all for --ablate)",
    )  # fmt: skip
    p.add_argument(
        "--routing", choices=("model", "uniform"), default="model",
        help="uniform: experts drawn for each row, as trained weights would spread; random weights crowd on a few",
    )  # fmt: skip
    p.add_argument(
        "--assume-acceptance", type=float, metavar="A",
        help="with --speculate mtp: accept each draft with this probability whatever the model says (random weights draft badly; "
        "a shape without an MTP layer gets one): tells a speed, and writes no meaningful text",
    )  # fmt: skip
    p.add_argument(
        "--warm-start",
        action="store_true",
        help="start compiled arms a second time too, with a warm cache",
    )
    p.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="a Chrome trace of each arm's decode step, and its top kernels",
    )
    p.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the result: FILE.png, and the same as FILE.svg",
    )
    p.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="merge results of several machines, and end",
    )
    p.add_argument(
        "--price",
        type=prices,
        metavar="P,..",
        help="--compare: what each machine costs an hour (one for all, or each)",
    )
    p.add_argument(
        "--show",
        type=Path,
        metavar="JSON",
        help="print, and with --plot draw, a result kept by -o json, and end",
    )
    p.add_argument(
        "--explain",
        action="store_true",
        help="print what this machine can do, and why not, and end",
    )
    p.add_argument(
        "-o",
        "--output",
        choices=("md", "json", "jsonl", "csv"),
        default="md",
        help="what is printed (default md)",
    )
    flags.add_flags(p)
    return p


def prices(text: str) -> list[float]:
    """A comma list of amounts of money."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give amounts of money, with commas between"
        ) from None


def kinds(text: str) -> tuple[str, ...]:
    """A comma list of kinds of arms; the switch in one is written as its flag is."""
    chosen = []
    for kind in text.split(","):
        switch = kind.removeprefix(arms.ALL_BUT).replace("-", "_")
        if kind not in arms.KINDS and (
            not kind.startswith(arms.ALL_BUT) or switch not in vars(Backend())
        ):
            raise argparse.ArgumentTypeError(
                f"{kind!r}: give {', '.join(arms.KINDS)} or {arms.ALL_BUT}SWITCH (as in {arms.ALL_BUT}moe), with commas between"
            )
        chosen.append(kind if kind in arms.KINDS else arms.ALL_BUT + switch)
    return tuple(chosen)


def numbers(text: str, least: int = 1) -> list[int]:
    """A comma list of whole numbers of at least `least`, 0 or 1."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [-1]
    if min(values) < least:
        allowed = "above 0" if least else "of 0 or more"
        raise argparse.ArgumentTypeError(
            f"{text!r}: give whole numbers {allowed}, with commas between"
        )
    return values


def run(arguments: argparse.Namespace) -> int:
    machine = Machine.here()
    if arguments.explain:
        print(explain(machine))
        return 0
    if arguments.compare:
        print(merge.compare(arguments.compare, arguments.price))
        return 0
    if arguments.price:
        raise InputError("--price goes with --compare")
    if arguments.plot:
        plot.check(arguments.plot)
    if arguments.profile:
        above = next(
            folder
            for folder in (arguments.profile, *arguments.profile.absolute().parents)
            if folder.exists()
        )
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise InputError(
                f"--profile {arguments.profile}: no folder can be made there, or written to: name another"
            )
    if arguments.show:
        present(merge.load(arguments.show, complete=True), arguments)
        return 0
    if arguments.repetitions < 1:
        raise InputError(f"-r {arguments.repetitions}: give a whole number above 0")
    if arguments.layers is not None and arguments.shape is None:
        raise InputError("--layers cuts a --shape, and none is given: a checkpoint is run whole")
    given = flags.given(arguments)
    if arguments.assume_acceptance is not None:
        if given.get("speculate") != "mtp":
            raise InputError(
                "--assume-acceptance is about drafts, and nothing drafts: add --speculate mtp"
            )
        if not 0 <= arguments.assume_acceptance <= 1:
            raise InputError(
                f"--assume-acceptance {arguments.assume_acceptance}: give a probability, 0 to 1"
            )
    model = None if arguments.shape else str(arguments.model or EMBEDDED)
    questions = questions_of(model, arguments.problems)
    lists = itertools.product(arguments.batch, arguments.prompt, arguments.new, arguments.depth)
    source = (model, arguments.shape, arguments.layers)
    workloads = [
        Workload(*source, *sizes, arguments.seed, arguments.routing, arguments.assume_acceptance)
        for sizes in lists
    ]
    config = workloads[0].config()
    plans = [(workload, arms_of(given, machine, workload, arguments)) for workload in workloads]
    if not arguments.ablate:  # which takes only what can run here
        check_possible(plans, config, machine)
    result: Found = {
        "schema": report.SCHEMA,
        "machine": {
            "name": machine.name,
            "memory_gb": machine.memory / 1e9,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": "python bench.py " + " ".join(sys.argv[1:]),
        "config": dump_config(config),
        "repetitions": arguments.repetitions,
        "rows": [],
        "pairs": [],
        "notes": [],
    }
    result["workload"] = workloads[0].describe() if len(workloads) == 1 else workloads[0].name
    status = 0
    try:
        with signals(interrupt_once):  # a time limit keeps what is finished, as Ctrl-C does
            for workload, compared in plans:
                try:
                    measure(compared, workload, config, arguments, questions, result)
                except InputError as error:
                    if len(workloads) == 1:
                        raise
                    result["notes"].append(
                        f"{workload.describe()}: n/a: {error}"
                    )  # the other workloads' rows are kept
    except KeyboardInterrupt:
        result["notes"].append("Interrupted: only what was finished is shown.")
        status = 130
    say("")
    present(result, arguments)
    failed = any(
        row.get("parity") is False or row.get("crashed") for row in result["rows"] + result["pairs"]
    )
    return status or int(failed)


def arms_of(
    given: Settings, machine: Machine, workload: Workload, arguments: argparse.Namespace
) -> list[Arm]:
    """What is compared on this workload. Raises InputError where --only names a kind of which there
    is no arm."""
    if arguments.ablate:
        compared = arms.ablation(given, machine, workload.batch, arguments.only or arms.KINDS)
    else:
        compared = arms.from_switches(given, arguments.only or arms.USUAL)
    for kind in arguments.only or ():
        if not any(each.is_of([kind]) for each in compared[1:]):
            raise InputError(f"--only {kind}: with these switches no arm is of this kind")
    return compared


def check_possible(
    plans: list[tuple[Workload, list[Arm]]], config: Config, machine: Machine
) -> None:
    """Raises InputError where the baseline can't run here, or arms are asked for beside it and none
    of them can.

    Where some can, those that can't have a row that says why not.
    """
    reasons = []
    for workload, (base, *asked) in plans:
        resolve(base.backend, config, machine, batch=workload.batch)
        for arm in asked:
            try:
                resolve(arm.backend, config, machine, batch=workload.batch)
                return
            except InputError as error:
                reasons.append(str(error))
    if reasons:
        raise InputError(
            f"nothing beside the baseline can be run: {'; '.join(dict.fromkeys(reasons))}"
        )


def questions_of(model: str | None, count: int | None) -> list[Question]:
    """What the arms may be asked, of which each workload takes the first `count` that fit. Raises
    InputError."""
    if count is not None and count < 0:
        raise InputError(f"--problems {count}: give 0 or more")
    found = exam.load(model) if model is not None and count != 0 else []
    if count and not found:
        raise InputError(
            f"--problems {count}: {model or 'a shape of random weights'} has no {exam.FILE}: leave it out"
        )
    return found


def present(result: Found, arguments: argparse.Namespace) -> None:
    """Print the result as `-o` says, and draw it where `--plot` does."""
    print(report.render(result, arguments.output))
    if arguments.plot and any(row["refused"] is None for row in result["rows"]):
        print(f"drawn: {' '.join(map(str, plot.draw(result, arguments.plot)))}", file=sys.stderr)


def measure(
    compared: list[Arm],
    workload: Workload,
    config: Config,
    arguments: argparse.Namespace,
    questions: list[Question],
    result: Found,
) -> None:
    """All arms on one workload; rows are added to `result` as they are finished."""
    with (
        tempfile.TemporaryDirectory(prefix="r1-bench-") as name,
        CompilerChecks(compared, config, Path(name)) as checks,
    ):
        folder, base, position = Path(name), compared[0], len(result["rows"])
        asked = exam.fitting(
            questions,
            workload.tokens,
            PROBLEMS if arguments.problems is None else arguments.problems,
        )
        if questions and not asked:
            result["notes"].append(
                f"No problem of {exam.FILE} fits {workload.tokens} tokens, so there is no accuracy: take more --new, or --prompt."
            )
        reference = make_reference(compared, workload, config, folder, checks)
        rates = reference["rates"]
        result["machine"] |= {
            "copy_gb_s": next(iter(rates.values()))["copy"] / 1e9,
            "matmul_tflop_s": {dtype: rate["matmul"] / 1e12 for dtype, rate in rates.items()},
        }

        timed = [arm for arm in compared[1:] if arm.timed]
        room = how_many_fit(compared, workload, config)
        result["notes"] += [] if room > 1 else [
            "Only one model fits the memory at a time, so arms were measured one after the other, not in turn with the baseline."
        ]  # fmt: skip
        first = Session(base, workload, folder, result["notes"])
        try:
            if not first.start(arguments.warm_start):
                raise InputError(f"the baseline can't be had: {first.found['refused']}")
            checks.join()
            baseline_alone = first.repeat(arguments.repetitions) if room == 1 else []
            if room == 1:
                first.finish(arguments, asked)
            for arm in timed:
                session = Session(arm, workload, folder, result["notes"])
                try:
                    if session.start(arguments.warm_start):
                        for number in range(arguments.repetitions):
                            say(f"{arm.name}: repetition {number + 1} of {arguments.repetitions}")
                            session.found["beside"].append(
                                baseline_alone[number] if room == 1 else first.once()
                            )
                            session.once()
                        session.finish(arguments, asked)
                finally:
                    session.process.quit()
                result["rows"].append(report.row(arm, workload, session.found, reference, config))
            if not first.found["measure"]:  # no other arm came to be measured in turn with it
                first.repeat(arguments.repetitions)
            if room > 1:
                first.finish(arguments, asked)
        finally:
            if first.found[
                "measure"
                # where that was interrupted: what the baseline has is kept, and nobody waits for more
            ]:
                first.found.setdefault("moe_layer", {"seconds": None})
            first.process.quit()
            if first.found["measure"]:
                result["rows"].insert(
                    position, report.row(base, workload, first.found, reference, config)
                )
        for arm in compared:
            if not arm.timed:
                session = Session(arm, workload, folder, result["notes"])
                try:
                    session.ask("build", "parity")
                finally:
                    session.process.quit()
                result["pairs"].append(report.pair(arm, workload, session.found))


class Session:
    """One arm's process, and what it has told so far."""

    def __init__(self, arm: Arm, workload: Workload, folder: Path, notes: list[str]) -> None:
        self.arm, self.workload, self.folder = arm, workload, folder
        self.found: Found = {"measure": [], "beside": [], "cold": None}
        self.notes = notes
        self.compiled = "inductor-" + str(abs(hash(arm.backend)))
        self.process = self.new_process()

    def new_process(self) -> Process:
        return Process(worker.serve, self.arm.backend, self.workload, self.folder, self.compiled)

    def ask(self, *commands: str, how: str = "") -> bool:
        """Ask one after the other, and keep the answers; False where one is refused."""
        name = self.arm.name if self.arm.timed else f"pair {self.arm.name}"
        return all(keep(self.found, self.process, name + how, command) for command in commands)

    def start(self, twice: bool) -> bool:
        """Build, warm up, check parity. With `twice` a compiled arm is started in a second process,
        which finds the cache of compiled code that the first one left, and is the one measured."""
        if self.arm.backend.compile and twice:
            fine = self.ask("build", "warm", how=", cold cache")
            self.process.quit()
            if not fine:
                return False
            self.found["cold"] = self.found["warm"]["start_seconds"]
            self.process = self.new_process()
        return self.ask("build", "warm", "parity", "kernels")

    def once(self) -> Found:
        """One repetition."""
        answer = self.process.ask("measure")
        if "refused" in answer:
            raise InputError(f"{self.arm.name}: {answer['refused']}")
        self.found["measure"].append(answer)
        return answer

    def repeat(self, times: int) -> list[Found]:
        return [self.once() for _ in range(times)]

    def finish(self, arguments: argparse.Namespace, questions: list[Question]) -> None:
        """A MoE layer's time, a trace where one is wanted, right answers; the process is not needed
        afterwards."""
        self.ask("moe_layer")
        if arguments.profile and self.ask("trace"):
            name = " ".join(
                (
                    self.arm.kind,
                    self.arm.name,
                    *(f"{size} {n}" for size, n in self.workload.sizes.items()),
                )
            )
            stem = "-".join(re.findall(r"\w+", name))
            arguments.profile.mkdir(parents=True, exist_ok=True)
            shutil.move(self.found["trace"]["path"], arguments.profile / f"{stem}.json")
            (arguments.profile / f"{stem}.txt").write_text(self.found["trace"]["table"])
        if questions and "refused" not in self.found:
            say(f"{self.arm.name}, {len(questions)} problems: accuracy")
            answer = self.process.ask("accuracy", questions)
            if "refused" in answer:  # what was measured stands all the same
                self.notes.append(
                    f"{self.arm.name} could not be asked problems: {answer['refused']}"
                )
            else:
                self.found["accuracy"] = answer
        self.process.quit()


def make_reference(
    compared: list[Arm], workload: Workload, config: Config, folder: Path, checks: CompilerChecks
) -> Found:
    """The text and logits that every arm is held against, the experts it hits, and the machine's
    rates in the arms' dtypes."""
    plain = Backend(device=compared[0].backend.device, dtype="fp32", **TEXTBOOK)
    dtypes = sorted(dtypes_of(compared, workload, config))
    found: Found = {}
    with Process(worker.serve, plain, workload, folder, "inductor-reference") as process:
        if keep(found, process, REFERENCE, "build_reference") and keep(
            found, process, REFERENCE, "rates", dtypes
        ):
            checks.start()
            keep(found, process, REFERENCE, "reference", dtypes)
    if "refused" in found:
        raise InputError(found["refused"])
    return found


def keep(found: Found, process: Process, name: str, command: str, *arguments: object) -> bool:
    """Put a command's answer into `found` under its name; where it is refused, the refusal, and
    False."""
    say(f"{name}: {command}")
    answer = process.ask(command, *arguments)
    if "refused" in answer:
        found |= answer
        return False
    found[command] = answer
    return True


class CompilerChecks:
    """What Inductor finds out of a CPU by compiling: in a process beside the reference and the
    baseline's warm-up, which nobody times, and done before the first arm that compiles."""

    def __init__(self, compared: list[Arm], config: Config, folder: Path) -> None:
        needed = (
            any(arm.backend.compile for arm in compared)
            and torch_device(resolve(compared[0].backend, config).device).type == "cpu"
        )
        context = multiprocessing.get_context("spawn")
        self.process = (
            context.Process(target=worker.check_compiler, args=(folder,), daemon=True)
            if needed
            else None
        )

    def start(self) -> None:
        if self.process:
            with signals(signal.SIG_IGN):
                self.process.start()

    def join(self) -> None:
        if self.process:
            self.process.join()

    def __enter__(self) -> CompilerChecks:
        return self

    def __exit__(self, *_: object) -> None:
        if (
            self.process and self.process.pid is not None
        ):  # started, and not joined where an interrupt or an error came before
            self.process.kill()
            self.process.join()  # the folder it writes to is deleted next


def dtypes_of(compared: list[Arm], workload: Workload, config: Config) -> set[str]:
    """The dtypes that the arms compute in, those that can be had."""
    dtypes = set()
    for arm in compared:
        with contextlib.suppress(InputError):  # the arm's own process says so, and its row
            dtypes.add(resolve(arm.backend, config, batch=workload.batch).compute)
    return dtypes or {"fp32"}


def how_many_fit(compared: list[Arm], workload: Workload, config: Config) -> int:
    """How many arms' models the device holds at a time, with room for caches and activations."""
    resolved = resolve(compared[0].backend, config, batch=workload.batch)
    mtp = any(arm.backend.speculate == "mtp" for arm in compared)
    need = count_parameters(config, mtp=mtp) * DTYPES[resolved.dtype].itemsize + 4 * HEADROOM
    return max(1, int(available_bytes(torch_device(resolved.device)) // need))


def say(text: str) -> None:
    """The progress line, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="" if text else "\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
