"""The processes that torchrun started for one command: how they meet, speak, listen and end.

torchrun tells each process its number in the environment, and ends all of them when one fails. The
processes meet at its store, a table of keys and bytes that all of them reach. A command says one
sentence when it ends early, however many processes notice: who asks the store first may speak.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from r1 import streams
from r1.errors import InputError, setting
from r1.placement.mesh import SharedError

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COMMAND = "command"
MEETING = timedelta(minutes=5)
"""How long processes wait for one that starts later."""
EXCHANGE = timedelta(minutes=30)
"""How long a rank waits for another one in a sum: loading may take one that much longer."""
GRACE = 1.0
"""Seconds for which the other ranks let rank 0 speak first."""
SILENCE = timedelta(days=30)
"""How long the others wait for what is asked next."""
_speaking, _spoken = threading.Lock(), threading.Event()
"""Held while this process says why it ends, and set when it has tried. Two of its threads may
notice, and then one must not end the process while the other speaks."""


@dataclass(frozen=True)
class Crew:
    """A command's processes, and this one's number among them. Alone: 0 of 1."""

    rank: int = 0
    count: int = 1
    local: int = 0
    """The number among those on this host, which is the number of its GPU."""
    here: int = 1
    """How many are on this host."""
    part: str = COMMAND
    """Begins the keys in the store: several groups of processes can meet there."""

    @property
    def leads(self) -> bool:
        """Whether this process talks with the user."""
        return self.rank == 0

    def store(self) -> Any:
        """The store that all processes of this command reach. Raises InputError for none."""
        hosts = self.part == COMMAND and self.rank == 0 and not _has_agent()
        return dist.PrefixStore(f"{_prefix()}/{self.part}", _store(hosts, MEETING))

    def connect(self, kind: str) -> None:
        """Connect the processes for torch.distributed; each has its GPU then.

        `kind`: "cpu" or "cuda". Raises InputError for fewer GPUs than processes.
        """
        if self.count == 1 or dist.is_initialized():
            return
        backend = "gloo"
        if kind == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            if (gpus := torch.cuda.device_count()) < self.here:
                has = f"this host has {gpus} GPUs for {self.here} processes"
                raise InputError(f"{has}: start fewer, or use {setting('device', 'cpu')}")
            torch.cuda.set_device(self.local)
        dist.init_process_group(
            backend, store=self.store(), rank=self.rank, world_size=self.count, timeout=EXCHANGE
        )

    @contextmanager
    def connected(self, kind: str) -> Iterator[None]:
        """Inside this context the processes are connected."""
        self.connect(kind)
        yield
        disconnect()  # not after an error: it would wait for ranks that are gone

    def among(self, count: int, part: str) -> Crew:
        """This process as one of the first `count`, which meet by themselves."""
        return replace(self, count=count, here=min(count, self.here), part=part)

    def check(self, tp: int, ep: int, pp: int = 1) -> None:
        """Raise InputError unless the switches use as many processes as there are."""
        ranks = tp * ep * pp
        if self.count == ranks:
            return
        use = f"{setting('tp', tp)}, {setting('ep', ep)} and {setting('pp', pp)} use {ranks}"
        were = "process was" if self.count == 1 else "processes were"
        raise InputError(
            f"{self.count} {were} started, and {use}: start the command with torchrun "
            f"--nproc-per-node {ranks}, or give {setting('tp', self.count)}"
        )

    def complain(self, speaker: str, why: object) -> None:
        """Say on stderr why the command ends, unless another process has said why.

        Rank 0 goes first: what all ranks find is not told as another one's finding.
        """
        if not self.leads:
            time.sleep(GRACE)
            if isinstance(why, SharedError):
                return
        with _speaking:
            if self.count == 1 or (not _spoken.is_set() and first_to_speak()):
                where = f"rank {self.rank}: " if self.rank else ""
                streams.complain(f"{speaker}: {where}{why}")
            _spoken.set()

    def ends_together(self, speaker: str) -> None:
        """End this process at once when a signal comes, wherever it waits.

        torchrun sends SIGTERM when another process has ended, and a terminal SIGINT. A process that
        waits in a sum for others runs no Python, so a thread of its own takes the signals.
        """
        if self.count == 1:
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # without a handler no byte would be written

        def wait() -> None:
            number = 0
            while number not in (signal.SIGINT, signal.SIGTERM):  # others may have a handler, too
                number = os.read(reading, 1)[0]
            why = "interrupted"
            if number != signal.SIGINT:
                why = "another process has ended, or torchrun was told to"
            if sys.stdout.isatty():
                streams.complain("\x1b[0m")  # text may be dimmed
            self.complain(speaker, f"{why}, so all {self.count} end")
            os._exit(128 + number)

        threading.Thread(target=wait, daemon=True).start()


def crew() -> Crew:
    """The processes of this command, from torchrun's environment."""
    if not all(name in os.environ for name in NAMES):
        return Crew()
    try:
        rank, count, _ = (int(os.environ[name]) for name in NAMES if name != "MASTER_ADDR")
        local = int(os.environ.get("LOCAL_RANK", rank))
        return Crew(rank, count, local, int(os.environ.get("LOCAL_WORLD_SIZE", count)))
    except ValueError:
        numbers = ", ".join(f"{name}={os.environ[name]!r}" for name in NAMES)
        raise InputError(f"{numbers}: start several processes with torchrun") from None


def disconnect() -> None:
    """Take the processes apart, where they are connected."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _has_agent() -> bool:
    """Whether torchrun's agent has the store. Else rank 0 has it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _prefix() -> str:
    """Begins all keys. After a failure torchrun may start everything once more."""
    return f"r1/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


@cache
def _store(hosts: bool, patience: timedelta) -> Any:
    """The table itself. Raises InputError."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(
            address, port, None, hosts, timeout=patience, wait_for_workers=False, multi_tenant=True
        )
    except (RuntimeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise InputError(
            f"the processes can't meet at {address}:{port} ({first_line}): start them with torchrun"
        ) from None


@cache
def first_to_speak() -> bool:
    """Whether this process may say how the command ends: the first one that asks, or one alone."""
    try:
        if crew().count == 1:
            return True
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        socket.create_connection(address, timeout=2).close()  # TCPStore would trace its failure
        # With a connection of its own: the other one may be waiting.
        store = _store(False, timedelta(seconds=5))
        return int(dist.PrefixStore(_prefix(), store).add("spoken", 1)) == 1
    except (InputError, RuntimeError, OSError, ValueError):  # there is no store to ask
        return True


def lost(error: BaseException) -> bool:
    """Whether an exception says that another process of this command has ended."""
    told = isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "NCCL", "Connection", "TCPStore")
    )
    return told or isinstance(error, dist.DistError)


class Line:
    """Hands what rank 0 sends to all other processes, in order; each waits as long as it takes.

    What is sent is pickled: only processes of one command reach the store.
    """

    def __init__(self, crew: Crew) -> None:
        self.crew, self.store, self.sent = crew, crew.store(), 0

    def check_words(self, words: list[str]) -> None:
        """Raise InputError on every rank if one was started with other words than rank 0."""
        if self.crew.leads:
            self.send(words)
        else:
            first, sentence = self.receive(), ""
            if first != words:
                ours, theirs = (" ".join(each) or "no words" for each in (words, first))
                sentence = (
                    f"rank {self.crew.rank} was started with {ours}, and rank 0 with {theirs}"
                )
            self.store.set(f"words/{self.crew.rank}", sentence)
        for rank in range(1, self.crew.count):
            key = f"words/{rank}"
            self.store.wait([key], MEETING)
            if sentence := self.store.get(key).decode():
                raise SharedError(f"{sentence}: give every rank the same command")

    def send(self, thing: object) -> None:
        """On rank 0: hand a thing to all others."""
        self.store.set(self._key(), pickle.dumps(thing))

    def end(self) -> None:
        """On rank 0: nothing more will come; the others receive None."""
        with contextlib.suppress(RuntimeError):  # where the store is gone, so are they
            self.send(None)

    def receive(self) -> Any:
        """On another rank: wait for the next thing."""
        key = self._key()
        self.store.wait([key], SILENCE)
        return pickle.loads(self.store.get(key))

    @property
    def waiting(self) -> bool:
        """On another rank: whether there is a next thing already."""
        return bool(self.store.check([f"line/{self.sent + 1}"]))

    def _key(self) -> str:
        self.sent += 1
        return f"line/{self.sent}"


def together(call: Callable[[], int], speaker: str) -> int:
    """Run a command's main part; a process that is left alone in it ends with a sentence."""
    try:
        return call()
    except RuntimeError as error:
        mine = crew()
        if mine.count == 1 or not lost(error):
            raise
        mine.complain(speaker, f"another process has ended, so all {mine.count} end")
        return 1
