"""Runs `python -m r1` as a user does."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from cases import ROOT


def command(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-m", "r1", *arguments],
        cwd=ROOT,
        env=environment,
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


TIMING = re.compile(
    r"^\[(?:start-up [^;]*; )?[\d,]+ tokens read, first of ([\d,]+) new after [\d,]+ ms"
    r"(, then [\d,.]+ tokens/s \([\d.]+ ms each\))?.*\]$",
    re.M,
)
"""The line of timings behind an answer, on stderr."""
