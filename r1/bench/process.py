"""A process of its own for whatever is measured, and a pipe to it: commands go in, dictionaries
come out.

So nothing inherits another's allocator, caches or compiled code. Signals are the parent's to
handle: a child is deaf to them, and ends when it is told to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from r1.errors import InputError

Found = dict[str, Any]
"""What a command answered; `{"refused": sentence}` where it could not, with `"crashed": True` where
it should have."""

Handler = Callable[[int, Any], object] | signal.Handlers


class Process:
    """A child and the pipe to it. As a context it quits at the end: a child that nobody quits
    outlives SIGTERM."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        """`target(pipe, *arguments)` is the child's main: it ends in `answer`."""
        context = multiprocessing.get_context("spawn")
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=target, args=(theirs, *arguments), daemon=True
        )
        with signals(signal.SIG_IGN):  # from its first moment, before it has imported anything
            self.process.start()
        theirs.close()
        self.busy = False

    def ask(self, command: str, *arguments: object) -> Found:
        """Send a command and wait for its answer. A child that died is an answer too."""
        try:
            if (
                self.busy
            ):  # an interrupt came between a question and its answer: that one is nobody's
                self.pipe.recv()
            self.busy = True
            self.pipe.send((command, *arguments))
            found: Found = self.pipe.recv()
            self.busy = False
            return found
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            said = (
                f"its process ended with status {self.process.exitcode} (its own words are above)"
            )
            return {"refused": said, "crashed": True}

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


def answer(pipe: Connection, commands: Mapping[str, Callable[..., Found]]) -> None:
    """In the child: run the commands that come through the pipe until "quit"."""
    signal.signal(
        signal.SIGUSR1, lambda *_: sys.exit()
    )  # the parent's word in the middle of a command
    while (asked := pipe.recv()) != "quit":
        command, *arguments = asked
        try:
            pipe.send(commands[command](*arguments))
        except InputError as error:
            pipe.send({"refused": str(error)})
        except torch.OutOfMemoryError:
            pipe.send({"refused": "out of memory on the GPU: use a smaller batch, dtype or model"})
        except Exception as error:  # a defect, ours or torch's: it is told whole
            traceback.print_exc()
            first_line = str(error).strip().partition("\n")[0]
            pipe.send(
                {
                    "refused": f"{command} failed with {type(error).__name__}: {first_line}",
                    "crashed": True,
                }
            )


@contextmanager
def signals(handler: Handler) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM are `handler`'s."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def interrupt_once(_number: int, _frame: object) -> None:
    """A handler for `signals`: raises KeyboardInterrupt, and a second one doesn't disturb what is
    kept of the first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
