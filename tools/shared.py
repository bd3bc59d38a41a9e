"""What the tools share: the import path, the command line, and how results are recorded.

Importing this file puts the checkout's own r1 and the tools' folders on the import path. So a tool
runs from any folder, and without installing r1:

    sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is
    import shared
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "check"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "draw"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "measure"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "train"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from r1 import InputError, __version__, streams
from r1.errors import flags_spelling, hung_up
from r1.model.config import Config
from r1.model.shapes import SHAPES, shape
from r1.switches.flags import Parser

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""
Work = Callable[[argparse.Namespace], int]
"""A tool's work: from its arguments to the exit status."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose `--help` begins with the first line of the tool's docstring.

    What is wrong it says in one sentence, as bench.py does.
    """
    speaker, first_line = Path(sys.argv[0]).stem, (doc or "").splitlines()[0]
    return Parser(speaker, __version__, description=first_line)


def add_output(parser: argparse.ArgumentParser, text: str) -> None:
    """The flag of a result file. `check_output` refuses one that can't be written."""
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=text)


def add_shapes_and_batches(parser: argparse.ArgumentParser, shapes: str, batches: str) -> None:
    """The flags of the kernels' tools. `shapes` and `numbers` read them; the texts are defaults."""
    known = f"of {', '.join(SHAPES)} (default {shapes})"
    rows = f"rows in a decode step (default {batches})"
    parser.add_argument("--shape", default=shapes, metavar="NAME,..", help=known)
    parser.add_argument("--batch", default=batches, metavar="N,..", help=rows)


def shapes(text: str) -> dict[str, Config]:
    """A comma list of published shapes. Raises InputError."""
    return {name: shape(name) for name in text.split(",")}


def run(tool: str, work: Work, arguments: argparse.Namespace) -> int:
    """Do the work. Returns its exit status, or 2 after one sentence about input that can't be used.

    Returns 1 where the reader of the output has gone, as in `... | head`, and 130 after Ctrl-C.
    """
    streams.prepare()
    try:
        with flags_spelling():
            return work(arguments)
    except BrokenPipeError:
        return hung_up()
    except InputError as error:
        streams.complain(f"{Path(tool).stem}: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


def numbers(flag: str, text: str) -> list[int]:
    """A comma list of whole numbers. Raises InputError."""
    words = text.split(",")
    if not all(each.isdecimal() and len(each) <= 6 and int(each) for each in words):
        raise InputError(f"{flag} {text}: give whole numbers from 1 to 999999, such as 1,32")
    return list(map(int, words))


def names(flag: str, text: str, known: Collection[str]) -> list[str]:
    """A comma list of known names; an empty text gives none. Raises InputError."""
    chosen = [name for name in text.split(",") if name]
    if unknown := [name for name in chosen if name not in known]:
        raise InputError(f"{flag} {unknown[0]}: choose of {', '.join(known)}")
    return chosen


def check_output(path: Path | None) -> None:
    """Raises InputError where `--output` can't be written: before the work, not after it."""
    if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise InputError(f"-o {path}: no file can be written there")


def command(tool: str, argv: Sequence[str] | None = None) -> str:
    """The command line as a result file records it. A path is cut to its last part.

    `tool` is the tool's `__file__`; `argv` are its arguments (default: this process's).
    """
    words = [word.rstrip("/") for word in (sys.argv[1:] if argv is None else argv)]
    short = [re.sub(r"[^=]*/", "", word) for word in words]  # --model=/data/x -> --model=x
    return shlex.join(["python", Path(tool).resolve().relative_to(ROOT).as_posix(), *short])


def recorded(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments as a result file records them: a path by its last part alone."""
    return {
        name: value.resolve().name if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
    }
