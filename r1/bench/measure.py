"""Measure all arms on all workloads, repetitions in turn with the baseline's."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1 import streams
from r1.bench import exam, plan
from r1.bench.arms import Arm
from r1.bench.busy import load
from r1.bench.compiler_checks import CompilerChecks
from r1.bench.exam import Question
from r1.bench.process import Answer
from r1.bench.progress import Progress, say, weight
from r1.bench.reference import make_reference
from r1.bench.report import rows
from r1.bench.report.speedup import set_speedups
from r1.bench.report.text import busy
from r1.bench.result import new_result, without_paths
from r1.bench.session import Session
from r1.bench.sizes import check_sizes
from r1.bench.team import Lead
from r1.bench.worker.serve import Setup
from r1.bench.workload import Workload
from r1.build import HEADROOM, placed_bytes, weight_bytes
from r1.device import available_bytes, torch_device
from r1.errors import InputError
from r1.files.config_json import load_config
from r1.model.config import Config
from r1.switches.draft import resolve_draft
from r1.switches.machine import Machine
from r1.switches.resolve import resolve


def run(
    arguments: argparse.Namespace, argv: Sequence[str], machine: Machine, lead: Lead
) -> tuple[Answer, bool]:
    """The command that measures. Returns the result, and whether an interrupt ended it early.

    `lead` starts the arms' processes. Raises InputError if nothing can be measured.
    """
    plan.check(arguments)
    model = plan.checkpoint(arguments)
    questions = plan.questions_of(model, arguments.problems)
    work = plan.workloads(arguments)
    plans = plan.plans(arguments, machine, work)
    result = new_result(arguments, argv, machine, work)
    _note_load(result)
    arms = [arm for _, compared in plans for arm in compared]
    progress, number, interrupted = Progress([weight(arm) for arm in arms]), 0, False
    try:
        for workload, compared in plans:
            progress.skip_to(number)
            number += len(compared)
            try:
                measure(compared, workload, arguments, questions, result, progress, lead)
            except InputError as error:
                if len(plans) == 1:
                    raise
                # The rows of the other workloads are kept.
                result["notes"].append(f"{workload.describe()}: n/a: {error}")
    except KeyboardInterrupt:  # of any signal (process.py): finished rows are kept
        result["notes"].append("Interrupted: only what was finished is shown.")
        interrupted = True
    return without_paths(result, model, work[0].draft), interrupted


def measure(
    compared: list[Arm],
    workload: Workload,
    arguments: argparse.Namespace,
    questions: list[Question],
    result: Answer,
    progress: Progress,
    lead: Lead,
) -> None:
    """All arms on one workload. Rows are added to `result` as soon as they are complete."""
    config = workload.config()
    check_sizes(workload, config, resolve(compared[0].backend, config, batch=workload.batch))
    if not result["rows"] and (sentence := busy(result["machine"])):
        streams.complain(f"bench: {sentence}")
    with (
        _scratch() as name,
        CompilerChecks(compared, config, Path(name)) as checks,
    ):
        folder = Path(name)
        asked = _questions_for(workload, arguments, questions, result["notes"])
        setup = Setup(result["machine"].get("threads"), tuple(arguments.imports))
        reference = make_reference(compared, workload, config, folder, checks, setup, lead)
        if workload.alone:
            result["notes"].append(
                "Nothing was measured beside it. Parity is with its own numbers in fp32."
            )
        elif compared[0].backend.ranks > 1:
            result["notes"].append(
                "No single device could hold the model, so devices share it in the baseline and in "
                "the reference too."
            )
        rates = reference["rates"]
        result["machine"] |= {
            "copy_gb_s": next(iter(rates.values()))["copy"] / 1e9,
            "matmul_tflop_s": {dtype: rate["matmul"] / 1e12 for dtype, rate in rates.items()},
        }
        for name in ("link", "disk", "ram"):
            if rate := next(iter(rates.values())).get(name):
                result["machine"][f"{name}_gb_s"] = rate / 1e9
        comparison = Comparison(
            workload, arguments, setup, asked, result, folder, reference, config, progress, lead
        )
        comparison.measure_timed(compared, checks)
        comparison.check_pairs(compared)


def _note_load(result: Answer) -> None:
    """Keep the largest number of threads of other programs that was seen. No arm may run now."""
    result["machine"]["load"] = max(load(), result["machine"].get("load", 0.0))


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for the reference, and for the caches of compiled code."""
    try:
        return tempfile.TemporaryDirectory(prefix="r1-bench-")
    except OSError as error:
        raise InputError(
            f"no temporary folder can be made ({error.strerror}): name another in TMPDIR"
        ) from None


def _questions_for(
    workload: Workload, arguments: argparse.Namespace, questions: list[Question], notes: list[str]
) -> list[Question]:
    """The problems that fit the workload. If none does, a note says so."""
    count = plan.PROBLEMS if arguments.problems is None else arguments.problems
    asked = exam.fitting(questions, workload.tokens, count)
    if questions and not asked:
        notes.append(
            f"No problem of {exam.FILE} fits {workload.tokens} tokens, so there is no accuracy: "
            "take more --new, or --prompt."
        )
    return asked


@dataclass
class Comparison:
    """The measurement of one workload, after its reference is made."""

    workload: Workload
    arguments: argparse.Namespace
    setup: Setup
    questions: list[Question]
    result: Answer
    folder: Path
    """Holds the reference, and the caches of compiled code."""
    reference: Answer
    config: Config
    progress: Progress
    lead: Lead

    def session(self, arm: Arm) -> Session:
        """A new process for this arm."""
        title = self.progress.begin(arm.name if arm.timed else f"pair {arm.name}")
        notes = self.result["notes"]
        return Session(arm, self.workload, self.folder, notes, title, self.setup, self.lead)

    def measure_timed(self, compared: list[Arm], checks: CompilerChecks) -> None:
        """The baseline, and the timed arms in turn with it.

        If the memory holds one model only, the baseline is measured alone, before the others.
        """
        place, times = len(self.result["rows"]), self.arguments.repetitions
        one_at_a_time = how_many_fit(compared, self.workload, self.config) == 1
        if one_at_a_time and not self.workload.alone:
            self.result["notes"].append(
                "Only one model fits the memory at a time, so arms were measured one after the "
                "other, not in turn with the baseline."
            )
        baseline = self.session(compared[0])
        try:
            if not baseline.start(self.arguments.warm_start):
                what = "it" if self.workload.alone else "the baseline"
                raise InputError(f"{what} can't be had: {baseline.answers['refused']}")
            checks.join()
            alone = None
            if one_at_a_time:
                alone = baseline.repeat(times)
                baseline.finish(self.arguments, self.questions)
            for arm in compared[1:]:
                if arm.timed:
                    self.measure_arm(arm, baseline, alone)
            if not baseline.answers["measure"]:  # no other arm could be measured
                baseline.repeat(times)
            if not one_at_a_time:
                baseline.finish(self.arguments, self.questions)
        finally:
            self.add_baseline(baseline, place)

    def measure_arm(self, arm: Arm, baseline: Session, alone: list[Answer] | None) -> None:
        """One arm, and its row. `alone`: the baseline's repetitions, if they are done already."""
        _note_load(self.result)
        session, times = self.session(arm), self.arguments.repetitions
        try:
            if session.start(self.arguments.warm_start):
                for number in range(times):
                    say(f"{session.title}: repetition {number + 1} of {times}")
                    beside = baseline.once() if alone is None else alone[number]
                    session.answers["beside"].append(beside)
                    session.once()
                session.finish(self.arguments, self.questions)
        finally:
            session.process.quit()
        self.result["rows"].append(self.row(arm, session))

    def add_baseline(self, baseline: Session, place: int) -> None:
        """End the baseline's process, and insert its row, if it has measurements.

        Then the speed-ups of the other rows are known. After an interrupt the time of its MoE layer
        may be missing. It is not measured then.
        """
        answers = baseline.answers
        if answers["measure"]:
            answers.setdefault("moe_layer", {"seconds": None})
        baseline.process.quit()
        if answers["measure"]:
            self.result["rows"].insert(place, self.row(baseline.arm, baseline))
            set_speedups(self.result["rows"])

    def row(self, arm: Arm, session: Session) -> Answer:
        """An arm's row of the result."""
        reference = self.reference
        if self.workload.alone and "parity" in session.answers:
            hit = session.answers["parity"]["experts_hit"]
            reference = reference | {"reference": {"experts_hit": hit}}
        return rows.row(arm, self.workload, session.answers, reference, self.config)

    def check_pairs(self, compared: list[Arm]) -> None:
        """Pairs of switches, of which only parity is checked."""
        for arm in compared:
            if not arm.timed:
                session = self.session(arm)
                try:
                    session.ask("build", "parity")
                finally:
                    session.process.quit()
                self.result["pairs"].append(rows.pair(arm, self.workload, session.answers))


def how_many_fit(compared: list[Arm], workload: Workload, config: Config) -> int:
    """How many models the memory holds at a time, with room for caches and activations."""
    resolved = resolve(compared[0].backend, config, batch=workload.batch)
    if resolved.experts != "device" and not resolved.expert_slots:
        return 1  # its slots take all that is free
    mtp = any(arm.backend.speculate == "mtp" for arm in compared)
    own = torch_device(resolved.device).type
    placed = placed_bytes(config, resolved, mtp=mtp)
    need = placed.pop(own) + 4 * HEADROOM
    drafting = next((arm.backend for arm in compared if arm.backend.speculate == "draft"), None)
    if drafting and workload.draft:
        small = load_config(workload.draft)
        need += weight_bytes(small, resolve_draft(drafting, small, batch=workload.batch))
    fit = available_bytes(torch_device(own)) // need
    if on_host := placed["cpu"] * resolved.ranks:  # beside the device
        fit = min(fit, available_bytes(torch_device("cpu")) // (on_host + 4 * HEADROOM))
    return max(1, int(fit))
