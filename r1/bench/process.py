"""A child process for each thing that is measured, and a pipe to it.

Commands go in, dictionaries come out. A process of its own inherits no allocator, no caches and no
compiled code, only imported modules: it is forked from a server that has imported torch, which
takes seconds, and has done nothing else. The parent handles signals: a child ignores them, and ends
when the parent tells it to.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from r1.errors import InputError
from r1.placement.ranks import lost

Answer = dict[str, Any]
"""The answer to a command, or `{"refused": sentence}` if the command could not run.

`"crashed": True` beside it marks a defect: the command should have run. With `"lost": True` it is
another rank's."""

Handler = Callable[[int, Any], object] | signal.Handlers


IMPORTED = "r1.bench.worker.serve"
"""What the server of children imports, with all that this imports."""
DEAD = (EOFError, BrokenPipeError, ConnectionResetError)
"""What a pipe raises when the other end is gone."""


class Process:
    """A child and the pipe to it.

    Use it as a context, so that the child quits at the end: otherwise it outlives SIGTERM.
    """

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        """Start the child, whose main is `target(pipe, *arguments)`. It calls `answer_commands`."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([IMPORTED])
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=as_here, args=(dict(os.environ), os.getcwd(), target, theirs, *arguments),
            daemon=True,
        )  # fmt: skip
        resource_tracker.ensure_running()  # its start lets signals through again
        try:
            with deaf_children():
                self.process.start()
        except KeyboardInterrupt:  # it came meanwhile: nobody else knows of the child
            self.process.kill()
            raise
        theirs.close()
        self.busy = False

    def ask(self, command: str, *arguments: object) -> Answer:
        """Send a command and wait for its answer. If the child died, the answer says so."""
        self.begin(command, *arguments)
        return self.finish()

    def begin(self, command: str, *arguments: object) -> None:
        """Send a command."""
        with contextlib.suppress(*DEAD):  # `finish` says that
            if self.busy:  # an interrupt came before the last answer: discard that answer
                self.pipe.recv()
            self.busy = True
            self.pipe.send((command, *arguments))

    def ready(self, seconds: float) -> bool:
        """Whether there is an answer, or the child has died, after so many seconds at the most."""
        try:
            return self.pipe.poll(seconds)
        except DEAD:
            return True

    def finish(self) -> Answer:
        """Wait for the answer to the command. If the child died, it says so."""
        try:
            answer: Answer = self.pipe.recv()
            self.busy = False
            return answer
        except DEAD:
            self.process.join()
            status = self.process.exitcode or 0
            refused = f"its process ended with status {status} (its own words are above)"
            if status < 0:
                refused = f"its process was ended by signal {-status}"
            return {"refused": refused, "crashed": True}

    def quit(self) -> None:
        """End the process and wait until its memory is free again."""
        if self.process.is_alive():
            if self.busy:
                os.kill(self.process.pid or 0, signal.SIGUSR1)
            else:
                self.pipe.send("quit")
            self.process.join(timeout=2 if self.busy else 30)
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.quit()


def as_here(
    environment: dict[str, str], folder: str, target: Callable[..., None], *arguments: object
) -> None:
    """In the child: go on as the parent is now. The server began as the parent was then."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    target(*arguments)


def answer_commands(
    pipe: Connection,
    commands: Mapping[str, Callable[..., Answer]],
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """In the child: run the commands that come through the pipe, until "quit".

    `prepare` runs before the first command, which is refused if it raises InputError.
    """
    # The parent sends SIGUSR1 to end the child in the middle of a command.
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit())
    prepared = False
    while (asked := pipe.recv()) != "quit":
        command, *arguments = asked
        try:
            if not prepared:
                prepare()
                prepared = True
            pipe.send(commands[command](*arguments))
        except InputError as error:
            pipe.send({"refused": str(error)})
        except torch.OutOfMemoryError:
            pipe.send({"refused": "out of memory on the GPU: use a smaller batch, dtype or model"})
        except Exception as error:
            pipe.send(_broken(command, error))


def _broken(command: str, error: Exception) -> Answer:
    """What is answered after an exception that nobody expects."""
    first_line = str(error).strip().partition("\n")[0]
    if lost(error):  # by its words, which are told: if no other rank has ended, they are the cause
        why = f"another rank's process has ended ({first_line})"
        return {"refused": why, "crashed": True, "lost": True}
    traceback.print_exc()  # a defect, of r1 or of torch
    why = f"{command} failed with {type(error).__name__}: {first_line}"
    return {"refused": why, "crashed": True}


def end_with_parent() -> None:
    """In a child: end when bench.py's process is gone, also in the middle of a sum."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a time limit, and a closed terminal."""


@contextmanager
def signals(handler: Handler) -> Iterator[None]:
    """Inside this context `handler` handles SIGNALS.

    SIGHUP stays ignored where the caller (nohup) ignores it.
    """
    before = {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started inside this context never get SIGNALS: these are blocked in them.

    A child inherits this before it has imported anything. A signal that comes meanwhile is handled
    at the context's end, so that it is not lost and no child is started by halves.
    """
    late: list[int] = []
    with signals(lambda number, _: late.append(number)):
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if late:
        signal.raise_signal(late[0])


def ignore_signals() -> None:
    """Ignore SIGNALS from now on, so that later ones do not disturb how the first one is handled.

    (A terminal sends Ctrl-C to torchrun and to all ranks, and torchrun sends it to these again.)
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def interrupt_once(_number: int, _frame: object) -> None:
    """A handler for `signals` that raises KeyboardInterrupt, once."""
    ignore_signals()
    raise KeyboardInterrupt
