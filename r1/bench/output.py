"""Where a result goes: stdout, --output-file, --plot. All is checked before anything is measured.

A result that was measured for an hour is not lost to a full disk: what can't be written where it
was wanted is written elsewhere.
"""

from __future__ import annotations

import argparse
import errno
import os
import secrets
import stat
import tempfile
from pathlib import Path

from r1 import streams
from r1.bench.plot import figure
from r1.bench.process import Answer
from r1.bench.report.render import FORMS, render
from r1.errors import InputError
from r1.reading import kind, status_of
from r1.writing import new_file


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for a place that can't be written to."""
    if arguments.plot:
        figure.check(arguments.plot)
    if arguments.profile:
        _check_profile(arguments.profile)
    if arguments.output_file:
        _check_file(arguments.output_file)
        _form_of_file(arguments)


def _check_profile(profile: Path) -> None:
    """Raise InputError if no trace could be written to this folder, or no such folder be made."""
    above = next(f for f in (profile, *profile.absolute().parents) if os.path.lexists(f))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(
            f"--profile {profile}: no folder can be made there, or written to: name another"
        )


def _form_of_file(arguments: argparse.Namespace) -> str:
    """The form of --output-file: what its ending says; if it says nothing, that of -o."""
    form: str = arguments.output_file.suffix.removeprefix(".").lower()
    if form not in FORMS and arguments.output:
        return str(arguments.output)
    if form not in FORMS:
        endings = ", ".join(f".{each}" for each in FORMS)
        raise InputError(
            f"--output-file {arguments.output_file}: give it one of the endings {endings}, or say "
            "with -o what it is to hold"
        )
    return form


def _check_file(path: Path) -> None:
    """Raise InputError if no file of this name could be written now. Nothing is left behind."""
    try:
        if len(os.fsencode(path.name)) > 255:
            raise OSError(errno.ENAMETOOLONG, "the name is too long")
        if status := status_of(path):
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, f"it is {kind(status)}, not a file")
            if not os.access(path, os.W_OK):
                raise OSError(errno.EACCES, "no permission")
        with tempfile.TemporaryFile(dir=_real(path).parent) as trial:
            trial.write(bytes(ROOM))
    except OSError as error:
        raise InputError(f"{_unwritable(path, error)}: name another") from None


ROOM = 2**18
"""Bytes that a disk must have free before a measurement starts: those of a large result."""


def _real(path: Path) -> Path:
    """The path of the file that a link leads to, so that the link itself is not replaced."""
    return Path(os.path.realpath(path))


def _unwritable(path: Path, error: OSError) -> str:
    return f"--output-file {path} can't be written ({error.strerror or error})"


def present(result: Answer, arguments: argparse.Namespace, *, measured: bool = False) -> None:
    """Write the result to --output-file, print it, and draw it for --plot.

    Raises InputError if one of these fails; the others are done all the same. A result that was
    just `measured` and can't be written anywhere is then kept in a new file.
    """
    problems, kept = [], not measured
    if arguments.output_file:
        try:
            kept = _write_file(result, arguments)
        except OSError as error:
            problems.append(_unwritable(arguments.output_file, error))
    form = "md" if arguments.output_file else arguments.output or "md"
    try:
        streams.write(render(result, form, arguments.wide))
        kept = kept or form == "json"
    except InputError as error:
        problems.append(str(error))
    if arguments.plot and any(row["refused"] is None for row in result["rows"]):
        try:
            drawn = " ".join(map(str, figure.draw(result, arguments.plot)))
            streams.complain(f"drawn: {drawn}")
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("; ".join(problems + ([] if kept else [_keep(result)])))


def _write_file(result: Answer, arguments: argparse.Namespace) -> bool:
    """Write --output-file, whole or not at all. False if there is no row to write.

    Raises OSError.
    """
    path = arguments.output_file
    if not result["rows"]:
        streams.complain(f"bench: no arm was measured, so {path} is not written")
        return False
    _write(_real(path), render(result, _form_of_file(arguments), arguments.wide))
    return True


def _write(path: Path, text: str) -> None:
    """Write a file that appears when all of it is on the disk. Raises OSError."""
    with new_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())


def _keep(result: Answer) -> str:
    """Write a result to a new file, or to stderr if there is no room. Says where it is."""
    text = render(result, "json")
    for folder in (tempfile.gettempdir, os.getcwd):
        try:
            path = Path(folder()) / f"r1-bench-{secrets.token_hex(4)}.json"
            _write(path, text)
            return f"the result is in {path}"
        except OSError:
            continue
    streams.complain(text)
    return "the result is above, for no file can be written"
