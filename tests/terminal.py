"""A command in a terminal of its own: what is typed, and what is shown."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from types import TracebackType

from cases import ROOT

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


class Terminal:
    """`python ARGUMENTS` in a pseudo-terminal, where Ctrl-C is a signal."""

    def __init__(self, *arguments: str) -> None:
        self.fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "PYTHONUTF8": "1"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.shown = ""

    def enter(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What is shown up to and with `text`. The rest stays for the next call."""
        assert self._shows(text, seconds), f"{text!r} is not in {self.shown!r}"
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def interrupt(self, until: str) -> str:
        """Press Ctrl-C, again after each 10 s in which `until` is not shown, and wait for that.

        Python's input() can miss a signal that comes while it takes in a letter.
        """
        for _ in range(6):
            self.enter(CTRL_C)
            if self._shows(until, 10):
                break
        return self.wait_for(until, 0)

    def _shows(self, text: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while text not in self.shown and time.monotonic() < end:
            if select.select([self.fd], [], [], 0.1)[0]:
                self.shown += self._read()
        return text in self.shown

    def _read(self) -> str:
        try:
            return os.read(self.fd, 65536).decode(errors="replace")
        except OSError:  # the command has ended, and with it the terminal
            raise AssertionError(f"it ended; last it showed {self.shown!r}") from None

    def end(self, seconds: float = 30) -> int:
        """The command's exit status."""
        return self.process.wait(seconds)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)
