"""The four commands of bench.py: measure, --show, --compare and --explain."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from r1 import streams
from r1.bench import measure, merge
from r1.bench.load_result import load
from r1.bench.plot import figure
from r1.bench.process import Answer
from r1.bench.progress import say
from r1.bench.report.render import render
from r1.errors import InputError
from r1.switches.machine import Machine, explain


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run the command that `arguments`, parsed from `argv`, ask for. Returns the exit status.

    Raises InputError for bad input.
    """
    machine = Machine.here()
    if arguments.explain:
        streams.write(explain(machine))
        return 0
    if arguments.compare:
        streams.write(merge.compare(arguments.compare, arguments.price))
        return 0
    if arguments.price:
        raise InputError("--price goes with --compare")
    if arguments.plot:
        figure.check(arguments.plot)
    if arguments.profile:
        _check_profile(arguments.profile)
    if arguments.show:
        present(load(arguments.show, complete=True), arguments)
        return 0
    result, interrupted = measure.run(arguments, argv, machine)
    say("")
    try:
        present(result, arguments, measured=True)
    except InputError as error:
        if not interrupted:
            raise
        streams.complain(f"bench: {error}")
    failed = any(
        row.get("parity") is False or row.get("crashed") for row in result["rows"] + result["pairs"]
    )
    return 130 if interrupted else int(failed)


def _check_profile(profile: Path) -> None:
    """Raise InputError if no trace could be written to this folder, or no such folder be made."""
    above = next(f for f in (profile, *profile.absolute().parents) if os.path.lexists(f))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(
            f"--profile {profile}: no folder can be made there, or written to: name another"
        )


def present(result: Answer, arguments: argparse.Namespace, *, measured: bool = False) -> None:
    """Print the result in the form that `-o` names, and draw it for `--plot`.

    A result that was just measured is kept in a file if it can't be printed.
    """
    try:
        streams.write(render(result, arguments.output))
    except InputError as error:
        kept = f"; the result is in {_keep(result)}" if measured else ""
        raise InputError(f"{error}{kept}") from None
    if arguments.plot and any(row["refused"] is None for row in result["rows"]):
        drawn = " ".join(map(str, figure.draw(result, arguments.plot)))
        streams.complain(f"drawn: {drawn}")


def _keep(result: Answer) -> str:
    """Write a result that can't be printed to a new file. Returns the file's name."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="r1-bench-", suffix=".json")
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(render(result, "json") + "\n")
    except OSError as error:
        return f"no file, for none can be written ({error.strerror})"
    return name
