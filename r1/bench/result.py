"""A result: what a measurement writes with `-o json`.

A result is published, so it holds no path of the machine that made it. A checkpoint is recorded by
its folder's name, and a file by its own name.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from r1 import threads
from r1.bench.arms import FILES
from r1.bench.process import Answer
from r1.bench.report.fields import SCHEMA
from r1.bench.workload import Workload
from r1.files.config_json import dump_config
from r1.switches.flags import given
from r1.switches.machine import Machine

PATH = re.compile(r"""(?<![\w.~/-])(?!//)(?:~|\.{1,2})?/(?:[^\s'"()<>,;:/]+/)*([^\s'"()<>,;:/]+)""")
"""An absolute path in a sentence, or one that begins with `.`, `..` or `~`; group 1 is its name."""


def new_result(
    arguments: argparse.Namespace, argv: Sequence[str], machine: Machine, work: list[Workload]
) -> Answer:
    """A result without rows: the machine, the command and the model."""
    config, switches = work[0].config(), given(arguments)
    device = switches.get("device", "auto")
    device = machine.device if device == "auto" else device
    dtype = switches.get("dtype", "auto")
    return {
        "schema": SCHEMA,
        "machine": {
            "name": machine.name,
            "memory_gb": machine.memory / 1e9,
            "cpus": os.cpu_count(),
            "threads": threads.choose(arguments.threads, device, config, dtype),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command_line(arguments, argv),
        "config": dump_config(config),
        "repetitions": arguments.repetitions,
        "rows": [],
        "pairs": [],
        "notes": [],
        "workload": work[0].describe() if len(work) == 1 else work[0].name,
    }


def command_line(arguments: argparse.Namespace, argv: Sequence[str]) -> str:
    """The command as it was typed, with the last component of each path."""
    values = [
        value
        for given in vars(arguments).values()
        for value in (given if isinstance(given, list) else [given])
    ]
    paths = [value for value in values if isinstance(value, Path)]
    paths += [Path(value) for name in FILES if (value := getattr(arguments, name, None))]

    def shown(word: str) -> str:
        if Path(word) in paths:
            return _name(word)
        flag, equals, value = word.partition("=")
        if equals and flag.startswith("--") and Path(value) in paths:
            return f"{flag}={_name(value)}"
        return word

    return "python bench.py " + " ".join(map(shown, argv))


def without_paths(result: Answer, *folders: str | None) -> Answer:
    """The result with file names in place of paths in its sentences: refusals and notes.

    Errors name the file that they are about. `folders` are the checkpoints', where there are any:
    their paths are replaced also if they are relative.
    """
    for row in result["rows"] + result["pairs"]:
        if row.get("refused"):
            row["refused"] = _shorten(row["refused"], folders)
    result["notes"] = [_shorten(note, folders) for note in result["notes"]]
    return result


def _shorten(sentence: str, folders: Sequence[str | None]) -> str:
    """The sentence with file names in place of paths."""
    for folder in folders:
        if folder is not None and os.sep in folder:
            sentence = sentence.replace(folder, _name(folder))
    return PATH.sub(r"\1", sentence)


def _name(path: str) -> str:
    """The last component of a path."""
    return os.path.basename(os.path.abspath(path))
