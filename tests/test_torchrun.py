"""The commands on several processes: one answer, one table, one sentence, and no process stays.

Holds r1/placement/ranks.py, r1/bench/team.py, and the commands' part in both to account. Each start
takes some ten seconds, so what needs no command is tested with processes that are made up.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch.distributed as dist
from cases import ROOT
from command import TIMING, command

from r1.bench import ablation, arms, plan, team
from r1.bench.process import Answer, answer_commands
from r1.bench.team import Lead, Team
from r1.bench.workload import Workload
from r1.errors import InputError
from r1.placement import ranks
from r1.placement.ranks import Crew, Line
from r1.switches.machine import Machine

QUESTION = ("12+30=?", "--temperature", "0", "--device", "cpu")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SECONDS = 30
"""In which all ranks must be gone when one is."""


@contextmanager
def torchrun(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command on two processes, in a group of its own, as a terminal makes one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    words = [sys.executable, *TORCHRUN, *arguments]
    with subprocess.Popen(
        words, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)


def ours(stderr: str) -> list[str]:
    """What r1 says; torchrun has words of its own."""
    said = re.compile(r"(?:r1|bench): |\[.* tokens read")
    return [line for line in stderr.splitlines() if said.match(line)]


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


# ---------------------------- what ends well
@pytest.mark.parametrize("sharing", ["--tp", "--pp"])
def test_a_question(sharing: str) -> None:
    """The answer of one process, once, with one line of timings."""
    right = command(*QUESTION)
    with torchrun("-m", "r1", sharing, "2", *QUESTION) as process:
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and stdout == right.stdout
    (line,) = ours(stderr)
    assert TIMING.fullmatch(line)


@pytest.mark.parametrize("sharing", ["tp", "pp"])
def test_a_table(tmp_path: Path, sharing: str) -> None:
    """One table: the baseline on one process, and the shared arm, which passes parity."""
    kept = tmp_path / "result.json"
    sizes = ("--prompt", "8", "--new", "6", "-r", "1", "--problems", "0")
    with torchrun(
        "bench.py", f"--{sharing}", "2", "--device", "cpu", *sizes, "--output-file", str(kept)
    ) as process:
        stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert len(re.findall(r"^\| arm", stdout, re.MULTILINE)) == 1
    rows = {row["arm"]: row for row in json.loads(kept.read_text())["rows"]}
    shared = f"{sharing}=2"
    assert rows.keys() == {"baseline", shared} and all(row["parity"] for row in rows.values())
    assert rows[shared]["backend"][sharing] == 2
    bytes_of_a_step = rows[shared]["step_gb"] / rows["baseline"]["step_gb"]
    if sharing == "tp":
        assert bytes_of_a_step < 0.7, "one device's bytes"
    else:
        assert bytes_of_a_step == pytest.approx(1, abs=0.05), "stages read one after the other"


# ---------------------------- what ends early
def test_a_refusal_is_one_sentence() -> None:
    """All ranks find it; one of them tells it, and all have gone."""
    with torchrun("-m", "r1", "--tp", "2", "--quant", "fp8", *QUESTION) as process:
        stdout, stderr = process.communicate(timeout=120)
    (line,) = ours(stderr)
    assert line.startswith("r1: layers.0.self_attn.o_proj is stored in blocks of 128")
    assert process.returncode == 1 and not stdout


@pytest.mark.parametrize("how", ["a rank dies", "a stage dies", "Ctrl-C"])
def test_all_end_together(how: str) -> None:
    """In the middle of an answer: one sentence, and soon nobody is there."""
    sharing = "--pp" if how == "a stage dies" else "--tp"
    with torchrun("-m", "r1", sharing, "2", "--device", "cpu") as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("12+30=?\n" * 200)
        process.stdin.flush()
        assert process.stdout.readline(), "it answers"
        workers = children(process.pid)
        assert len(workers) == 2
        start = time.monotonic()
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(workers[1], signal.SIGKILL)
        _, stderr = process.communicate(timeout=2 * SECONDS)
        assert time.monotonic() - start < SECONDS
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    told = [line for line in ours(stderr) if not line.startswith("[")]
    why = "interrupted" if how == "Ctrl-C" else "another process has ended"
    assert len(told) == 1 and why in told[0] and process.returncode == 1, stderr


def test_one_thread_lets_the_other_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal may come while another thread asks who speaks first: the sentence is not lost."""
    asking, answer, said = threading.Event(), threading.Event(), list[str]()

    def first() -> bool:
        asking.set()
        return answer.wait(SECONDS)

    monkeypatch.setattr(ranks, "_spoken", threading.Event())
    monkeypatch.setattr(ranks, "first_to_speak", first)
    monkeypatch.setattr(ranks.streams, "complain", said.append)
    crew = Crew(0, 2, 0, 2)
    threads = [threading.Thread(target=crew.complain, args=("r1", why)) for why in ("one", "two")]
    threads[0].start()
    assert asking.wait(SECONDS)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive() and not said
    answer.set()
    for thread in threads:
        thread.join()
    assert said == ["r1: one"]


# ---------------------------- without a command
def test_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ranks.NAMES:
        monkeypatch.delenv(name, raising=False)
    assert ranks.crew() == Crew() and ranks.crew().leads
    for name, value in zip(ranks.NAMES, ("3", "4", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = ranks.crew()
    assert found == Crew(3, 4, 1, 2) and not found.leads
    assert found.among(4, "arm-1") == Crew(3, 4, 1, 2, "arm-1")
    with pytest.raises(InputError, match="2 of 4 processes are on others"):
        team.check_host(found)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match=r"RANK='first', .*torchrun"):
        ranks.crew()


@pytest.mark.parametrize(("count", "tp", "ep"), [(1, 2, 1), (2, 1, 1), (2, 2, 2)])
def test_as_many_processes_as_devices(count: int, tp: int, ep: int) -> None:
    Crew(count=4).check(2, 2)
    Crew(count=8).check(2, 2, 2)
    with pytest.raises(InputError, match="2 processes were .*pp=2 use 4: .*--nproc-per-node 4"):
        Crew(count=2).check(2, 1, 2)
    with pytest.raises(
        InputError, match=f"torchrun --nproc-per-node {tp * ep}, or give tp={count}"
    ):
        Crew(count=count).check(tp, ep)


def test_devices_share_what_one_can_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they do in the baseline too; else the baseline is one device's."""
    given = {"tp": 2, "moe": "grouped"}
    work = Workload(None, "tiny", None, 1, 8, 8, 0, 0)
    for free, shared in ((10**12, {}), (10**6, {"tp": 2})):
        monkeypatch.setattr(plan, "available_bytes", lambda _, free=free: free)
        assert plan.shared_by_all(given, Machine(), work) == shared
        base, *others = arms.from_switches(given, shared=shared)
        names = [arm.name for arm in others]
        assert base.backend.tp == shared.get("tp", 1) and ("tp=2" in names) == (not shared)
        rungs = ablation.ablation({"tp": 2}, Machine(), 1, ("ladder",), shared)
        assert [arm.backend.tp for arm in (rungs[0], rungs[-1])] == [base.backend.tp, 2]
    assert plan.shared_by_all({"moe": "grouped"}, Machine(), work) == {}


class MadeUp:
    """Stands in for a child process: answers after some time, or never."""

    answers: ClassVar[dict[int, Answer | None]] = {}
    """By rank; None: it hangs until it is killed."""

    def __init__(self, _target: Any, *arguments: Any) -> None:
        self.answer, self.killed = self.answers[arguments[-1].rank], threading.Event()
        self.process = self

    def begin(self, *_: object) -> None:
        self.begun = True

    def kill(self) -> None:
        self.killed.set()

    def ready(self, seconds: float) -> bool:
        return self.answer is not None or self.killed.wait(seconds)

    def finish(self) -> Answer:
        killed: Answer = {"refused": "killed", "crashed": True}
        return killed if self.answer is None else dict(self.answer)

    def quit(self) -> None:
        self.kill()


@pytest.fixture
def lead(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lead]:
    """Rank 0 of three; the others are threads that follow it. All children are made up."""
    store = dist.HashStore()
    monkeypatch.setattr(Crew, "store", lambda _: store)
    monkeypatch.setattr(team, "Process", MadeUp)
    monkeypatch.setattr(team, "LATE", 1.0)
    monkeypatch.setattr(team, "AGAIN", 0.02)
    crews = [Crew(rank, 3, rank, 3) for rank in range(3)]
    lines = [Line(crew) for crew in crews]
    following = [
        threading.Thread(target=team.follow, args=(crews[rank], lines[rank])) for rank in (1, 2)
    ]
    for thread in following:
        thread.start()
    yield Lead(crews[0], lines[0])
    lines[0].end()
    for thread in following:
        thread.join(10)
        assert not thread.is_alive(), "it follows until the end"


FINE: Answer = {"seconds": 1.0, "memory": {"allocated": None, "host": 5}}
MORE: Answer = {"seconds": 9.0, "memory": {"allocated": None, "host": 7}}
REFUSED: Answer = {"refused": "no room"}
TOLD: Answer = {"refused": "rank 2: no room", "crashed": False}
SILENT: Answer = {"refused": "rank 1: it does not answer", "crashed": True}
RESET = "[gloo] Read error: Connection reset by peer"
LOST: Answer = {
    "refused": f"another rank's process has ended ({RESET})", "crashed": True, "lost": True,
}  # fmt: skip
KILLED: Answer = {"refused": "its process was ended by signal 9", "crashed": True}
DEAD: Answer = {"refused": f"rank 2: {KILLED['refused']}", "crashed": True}
BROKEN: Answer = {"refused": "measure failed with ValueError: no", "crashed": True}
TEAMS: dict[str, tuple[list[Answer | None], Answer]] = {
    "all answer": ([FINE, MORE, FINE], {"seconds": 1.0, "memory": MORE["memory"]}),
    "all refuse": ([REFUSED] * 3, REFUSED),
    "rank 2 refuses": ([FINE, FINE, REFUSED], TOLD),
    "rank 0 waits for it": ([None, FINE, REFUSED], TOLD),
    "rank 0 refuses": ([REFUSED, None, None], REFUSED),
    "rank 1 hangs": ([FINE, None, FINE], SILENT),
    "rank 2 dies": ([LOST, LOST, KILLED], DEAD),
    "rank 2 dies, rank 0 waits": ([None, LOST, KILLED], DEAD),
    "rank 0 dies": ([KILLED, LOST, LOST], KILLED),
    "rank 0 breaks down": ([BROKEN, LOST, LOST], BROKEN),
}


@pytest.mark.parametrize("case", TEAMS)
def test_an_arms_children_answer_as_one(lead: Lead, case: str) -> None:
    answers, right = TEAMS[case]
    MadeUp.answers = dict(enumerate(answers))
    child = lead.start(3, print)
    assert isinstance(child, Team) and child.ask("measure") == right
    child.quit()
    MadeUp.answers = {0: FINE, 1: FINE}
    again = lead.start(2, print)  # rank 2 has no part in it
    assert again.ask("measure") == FINE
    again.quit()


def test_a_child_that_has_lost_another_rank_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    """In one sentence; a defect shows its traceback."""
    ours, theirs = Pipe()
    errors = {
        "lost": RuntimeError(RESET),
        "no": KeyError(1),
    }

    def fail(which: str) -> Answer:
        raise errors[which]

    for asked in (("run", "lost"), ("run", "no"), "quit"):
        ours.send(asked)
    before = signal.getsignal(signal.SIGUSR1)
    answer_commands(theirs, {"run": fail})
    signal.signal(signal.SIGUSR1, before)
    assert ours.recv() == LOST
    assert ours.recv() == {"refused": "run failed with KeyError: 1", "crashed": True}
    assert capfd.readouterr().err.count("Traceback") == 1


def test_words_of_another_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank raises it, so that none waits for another; rank 0 tells it."""
    store = dist.HashStore()
    monkeypatch.setattr(Crew, "store", lambda _: store)
    raised: list[str] = []

    def start(rank: int, words: list[str]) -> None:
        try:
            Line(Crew(rank, 2)).check_words(words)
        except InputError as error:
            raised.append(str(error))

    other = threading.Thread(target=start, args=(1, ["--tp", "4"]))
    other.start()
    start(0, ["--tp", "2"])
    other.join()
    assert raised == ["rank 1 was started with --tp 4, and rank 0 with --tp 2: "
                      "give every rank the same command"] * 2  # fmt: skip
    assert pickle.loads(store.get("line/1")) == ["--tp", "2"]
