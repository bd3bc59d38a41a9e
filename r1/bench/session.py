"""One arm's process, as the parent sees it: which commands it is sent, and in which order."""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from r1.bench.arms import Arm
from r1.bench.exam import Question
from r1.bench.process import Answer
from r1.bench.progress import say
from r1.bench.team import Child, Lead
from r1.bench.worker.serve import Setup, serve
from r1.bench.workload import Workload
from r1.errors import InputError


class Session:
    """One arm's process, and its answers so far, by command."""

    def __init__(
        self,
        arm: Arm,
        workload: Workload,
        folder: Path,
        notes: list[str],
        title: str,
        setup: Setup,
        lead: Lead,
    ) -> None:
        """Start the process. `folder` holds the reference. `notes` are the result's.

        `title` begins the progress line. `lead` starts processes, several for an arm that devices
        share.
        """
        self.arm, self.workload, self.folder = arm, workload, folder
        self.title, self.setup, self.lead = title, setup, lead
        self.answers: Answer = {"measure": [], "beside": [], "cold": None}
        """"measure" has one answer for each repetition, "beside" the baseline's in turn with them.

        "cold" is the start-up time with a cold cache, if the arm is started twice."""
        self.notes = notes
        self.compiled = "inductor-" + str(abs(hash(arm.backend)))
        self.process = self.new_process()

    def new_process(self) -> Child:
        """A process for this arm. A second one finds the code that the first one compiled."""
        backend, folder = self.arm.backend, self.folder
        arguments = (backend, self.workload, folder, self.compiled, self.setup)
        return self.lead.start(backend.ranks, serve, *arguments)

    def ask(self, *commands: str, how: str = "") -> bool:
        """Send commands, one after the other, and keep the answers. False if one is refused."""
        title = self.title + how
        return all(keep(self.answers, self.process, title, command) for command in commands)

    def start(self, twice: bool) -> bool:
        """Build, warm up, check parity. False if one is refused.

        With `twice` a compiled arm is started again in a second process, with a warm cache of
        compiled code. The second process is the one that is measured.
        """
        if self.arm.backend.compile and twice:
            fine = self.ask("build", "warm", how=", cold cache")
            self.process.quit()
            if not fine:
                return False
            self.answers["cold"] = self.answers["warm"]["start_seconds"]
            self.process = self.new_process()
        if not self.ask("build", "warm"):
            return False
        if self.workload.alone and not keep(
            self.answers, self.process, self.title, "reference", ()
        ):  # it writes the text that it is compared on
            return False
        return self.ask("parity", "kernels")

    def once(self) -> Answer:
        """One repetition."""
        answer = self.process.ask("measure")
        if "refused" in answer:
            raise InputError(f"{self.arm.name}: {answer['refused']}")
        self.answers["measure"].append(answer)
        return answer

    def repeat(self, times: int) -> list[Answer]:
        """Several repetitions."""
        return [self.once() for _ in range(times)]

    def finish(self, arguments: argparse.Namespace, questions: list[Question]) -> None:
        """Time a MoE layer, measure the energy of steps, write a trace for --profile, ask the
        problems, and end the process.
        """
        self.ask("moe_layer", "energy")
        if arguments.profile and self.ask("trace"):
            self._keep_trace(arguments.profile)
        if questions and "refused" not in self.answers:
            self._examine(questions)
        self.process.quit()

    def _keep_trace(self, profile: Path) -> None:
        """Move the trace into the folder `profile`, under the arm's and the workload's name."""
        sizes = (f"{size} {n}" for size, n in self.workload.sizes.items())
        name = " ".join((self.arm.kind, self.arm.name, *sizes))
        stem = "-".join(re.findall(r"\w+", name))
        try:
            profile.mkdir(parents=True, exist_ok=True)
            shutil.move(self.answers["trace"]["path"], profile / f"{stem}.json")
            (profile / f"{stem}.txt").write_text(self.answers["trace"]["table"], encoding="utf-8")
        except OSError as error:
            self.notes.append(f"{self.arm.name}: its trace can't be kept ({error.strerror}).")

    def _examine(self, questions: list[Question]) -> None:
        """Ask the problems. If that is refused, the measurements stand, and a note says why."""
        say(f"{self.title}: {len(questions)} problems")
        answer = self.process.ask("accuracy", questions)
        if "refused" in answer:
            self.notes.append(f"{self.arm.name} could not be asked problems: {answer['refused']}")
        else:
            self.answers["accuracy"] = answer


def keep(answers: Answer, process: Child, name: str, command: str, *arguments: object) -> bool:
    """Send a command, and put its answer into `answers` under the command's name.

    If it is refused, "refused" is put there instead, and False returned. `name` is shown in the
    progress line.
    """
    say(f"{name}: {command}")
    answer = process.ask(command, *arguments)
    if "refused" in answer:
        answers |= answer
        return False
    answers[command] = answer
    return True
