"""`--import FILE.py`: run a Python file of the user's, so that switches can name its strategies.

The file enters strategies into the tables of strategies.py. Only this flag runs a file, and only
the one that it names: no checkpoint and no result can name one.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from r1.errors import InputError
from r1.reading import read_bytes
from r1.switches.strategies import ATTENTION, EXPERTS, GROUPED, check_tables

FLAG = "--import"
TABLES: dict[str, Mapping[str, object]] = {
    "ATTENTION": ATTENTION,
    "GROUPED": GROUPED,
    "EXPERTS": EXPERTS,
}


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--import`, which may be given more than once."""
    text = (
        "run a Python file of yours first; switches can then name the strategies that it "
        "registers. Only this flag runs a file: a checkpoint never does"
    )
    parser.add_argument(
        FLAG, dest="imports", type=Path, action="append", default=[], metavar="FILE.py", help=text
    )


def run_given(argv: Sequence[str] | None) -> None:
    """Run the files that a command line names (None: the process's own).

    Call it before the command's parser is made: the parser's choices come from the tables. Raises
    InputError.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    add_flag(parser)
    try:
        given, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        return  # no file is named: the command's own parser says so
    run(given.imports)


def run(paths: Sequence[Path]) -> None:
    """Run the files, each as a module of its own, and check the tables after each one.

    Raises InputError for a file that can't be run, or that changes an entry that was there before.
    """
    for path in paths:
        before = {title: dict(table) for title, table in TABLES.items()}
        _run(path)
        for title, entries in before.items():
            for name, entry in entries.items():
                if TABLES[title].get(name) is not entry:
                    raise _refusal(
                        path, f"the name {name!r} of {title} is taken: give your strategy another"
                    )
        try:
            check_tables()
        except InputError as error:
            raise _refusal(path, error) from None


def _run(path: Path) -> None:
    """Run one file. Modules beside it can be imported, as by a script."""
    if path.suffix != ".py":
        raise _refusal(path, "give a Python file, whose name ends in .py")
    place = path.absolute()
    # Its classes name this module, and torch.compile and pickle look it up.
    module = ModuleType(f"imported_{path.stem}")
    module.__file__ = str(place)
    sys.modules[module.__name__] = module
    if str(place.parent) not in sys.path:
        sys.path.append(str(place.parent))  # the last place: it hides no other module
    try:
        source = read_bytes(place)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _refusal(path, f"it can't be read ({reason}): give a Python file") from None
    try:
        exec(compile(source, str(place), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:  # whatever it does, the command ends in a sentence
        raise _refusal(path, _raised(error, str(place))) from None


def _raised(error: BaseException, place: str) -> str:
    """Which line of the file at `place` raised an error, and what the error says."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == place]  # fmt: skip
    if isinstance(error, SyntaxError) and error.filename == place:
        lines = [error.lineno]
    line = f"line {lines[-1]}" if lines and lines[-1] else "it"
    said = str(error.msg if isinstance(error, SyntaxError) else error).strip().partition("\n")[0]
    return f"{line} raised {type(error).__name__}" + (f": {said}" if said else "")


def _refusal(path: Path, problem: object) -> InputError:
    return InputError(f"{FLAG} {path}: {problem}")
