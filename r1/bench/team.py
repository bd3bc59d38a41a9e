"""An arm that several devices share: a child on each rank, and to whoever asks it is one process.

Under torchrun every rank runs bench.py. Rank 0 measures. The others wait for what it sends, and
each has a child of its own for an arm that is shared. A command goes to all children; they meet by
themselves, as ranks of one model. Rank 0's child answers. Where another one refuses, or dies, the
arm is refused, and all children of it are ended.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable
from typing import Protocol

from r1.bench.process import Answer, Process
from r1.errors import InputError
from r1.placement.ranks import Crew, Line

AGAIN = 0.5
"""Seconds between looks at the other ranks, while this one's child works."""
LATE = 20.0
"""Seconds that one rank's child may take longer than another one's."""
TOLD = ("refused", "crashed", "lost", "memory")
"""What rank 0 wants of the other ranks' answers."""


class Child(Protocol):
    """What a Session has: a Process, or a Team."""

    def ask(self, command: str, *arguments: object) -> Answer: ...

    def quit(self) -> None: ...


class Lead:
    """Starts an arm's processes. On rank 0 of several it sends the others along."""

    def __init__(self, crew: Crew | None = None, line: Line | None = None) -> None:
        self.crew, self.line, self.teams = crew or Crew(), line, 0

    def start(self, ranks: int, target: Callable[..., None], *arguments: object) -> Child:
        """A child that runs `target(pipe, *arguments, its place among the ranks)`."""
        if ranks == 1 or self.line is None:
            return Process(target, *arguments, Crew())
        self.teams += 1
        return Team(self.crew, self.line, ranks, self.teams, target, arguments)


class Team:
    """The children of one arm, as rank 0 sees them."""

    def __init__(
        self, crew: Crew, line: Line, ranks: int, number: int,
        target: Callable[..., None], arguments: tuple[object, ...],
    ) -> None:  # fmt: skip
        self.line, self.others, self.number = line, range(1, ranks), number
        self.asked = 0
        line.send(("start", number, ranks, target, arguments))
        self.own = Process(target, *arguments, crew.among(ranks, f"arm-{number}"))

    def ask(self, command: str, *arguments: object) -> Answer:
        """Send a command to all ranks; returns rank 0's answer, or why a rank has none."""
        self.asked += 1
        self.line.send(("ask", self.number, self.asked, command, arguments))
        self.own.begin(command, *arguments)
        answers: dict[int, Answer] = {}
        deadline: float | None = None
        while deadline is None or time.monotonic() < deadline:
            done = self.own.ready(AGAIN)
            answers |= {r: told for r in self.others if (told := self._told(r)) is not None}
            if done and len(answers) == len(self.others):
                break
            failed = any("refused" in each for each in answers.values())
            if deadline is None and (done or failed):
                deadline = time.monotonic() + LATE
            if done:
                time.sleep(0.01)
        silent: Answer = {"refused": "it does not answer", "crashed": True}
        return self._joined({rank: answers.get(rank, silent) for rank in self.others})

    def _joined(self, others: dict[int, Answer]) -> Answer:
        """One answer of all ranks'."""
        waits = not self.own.ready(0)  # for a rank that has failed
        if waits:
            self.own.process.kill()
        answer = self.own.finish()
        answers = {0: answer | {"lost": True} if waits else answer, **others}
        refused = [rank for rank, each in answers.items() if "refused" in each]
        if refused and (cause := min(refused, key=lambda rank: _blame(rank, answers[rank]))):
            sentence = f"rank {cause}: {others[cause]['refused']}"
            return {"refused": sentence, "crashed": others[cause].get("crashed", False)}
        if "memory" in answer:  # the most that a device needs
            every = [answer["memory"], *(each["memory"] for each in others.values())]
            answer["memory"] = {
                name: None if value is None else max(each[name] for each in every)
                for name, value in answer["memory"].items()
            }
        return answer

    def _told(self, rank: int) -> Answer | None:
        key = _key(self.number, self.asked, rank)
        if not self.line.store.check([key]):
            return None
        answer: Answer = pickle.loads(self.line.store.get(key))
        return answer

    def quit(self) -> None:
        """End all children, and wait until this rank's memory is free again."""
        with contextlib.suppress(RuntimeError):  # where the store is gone, so are the others
            self.line.send(("quit", self.number))
        self.own.quit()


def _blame(rank: int, answer: Answer) -> tuple[bool, bool, int]:
    """Least for the rank whose answer says best why the arm is refused: not one that has only lost
    another, and a refusal before a defect. Of defects rank 0's comes last: it may follow from one.
    """
    crashed = answer.get("crashed", False)
    return answer.get("lost", False), crashed, int(rank == 0) if crashed else rank


def _key(team: int, asked: int, rank: int) -> str:
    return f"answer/{team}/{asked}/{rank}"


def follow(crew: Crew, line: Line) -> None:
    """On the other ranks: do what rank 0 sends, until it ends."""
    children: dict[int, Process] = {}
    try:
        while (sent := line.receive()) is not None:
            what, number, *more = sent
            if what == "start":
                ranks, target, arguments = more
                if crew.rank < ranks:
                    place = crew.among(ranks, f"arm-{number}")
                    children[number] = Process(target, *arguments, place)
            elif number in children and what == "quit":
                children.pop(number).quit()
            elif number in children:
                asked, command, arguments = more
                told = _ask(children[number], line, command, arguments)
                line.store.set(_key(number, asked, crew.rank), pickle.dumps(told))
    finally:
        for child in children.values():
            child.quit()


def _ask(child: Process, line: Line, command: str, arguments: tuple[object, ...]) -> Answer:
    """What rank 0 wants of a child's answer. The child is ended if rank 0 does not wait for it."""
    child.begin(command, *arguments)
    while not child.ready(AGAIN):
        if line.waiting:
            child.process.kill()
    return {name: value for name, value in child.finish().items() if name in TOLD}


def check_host(crew: Crew) -> None:
    """Raise InputError where the ranks are on several hosts: they read the reference's files."""
    if crew.here != crew.count:
        raise InputError(
            f"bench.py measures on one host, and {crew.count - crew.here} of {crew.count} "
            "processes are on others: use torchrun --nnodes 1"
        )
