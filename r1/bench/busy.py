"""How busy other programs keep this machine, sampled while r1 itself waits.

Linux's "load average" is of the last minute, so after one measurement it would call the next one
disturbed. The number of threads that run or wait for a CPU right now has no such memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

SAMPLES, SECONDS = 30, 0.3
"""How often `load` looks, and in how much time."""


def load(read: Callable[[], str] | None = None) -> float:
    """The average number of threads of other programs that run, or wait for a CPU.

    Call it when no process of ours works. `read` returns the content of /proc/loadavg. Where there
    is no such file, the load average of the last minute has to do.
    """
    try:
        counts = [_running(read or _loadavg) for _ in range(SAMPLES)]
    except (OSError, ValueError, IndexError):
        return os.getloadavg()[0]
    return sum(counts) / len(counts)


def _running(read: Callable[[], str]) -> int:
    """Threads that are running or runnable: "1.01 0.97 0.85 3/212 4711" means 3, with our own."""
    time.sleep(SECONDS / SAMPLES)
    return int(read().split()[3].partition("/")[0]) - 1


def _loadavg() -> str:
    with open("/proc/loadavg", encoding="ascii") as file:
        return file.read()
