"""Tests the house itself: imports point downwards, no files import each other in a circle, and
lines, files and functions stay short.

Holds to account: every room of r1/, and bench.py.

The checks read source code and run none of it. KNOWN lists the violations that are still there. It
is strict: an entry that is no longer a violation fails too, and must be removed.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ROOMS = (
    "bench.py",
    "r1/guide/",
    "r1/bench/",
    "r1/tour/",
    "r1/__main__.py",
    "r1/conversation.py",
    "r1/__init__.py",
    "r1/roofline.py",
    "r1/threads.py",
    "r1/drafting.py",
    "r1/build.py",
    "r1/footprint.py",
    "r1/run/",
    "r1/files/",
    "r1/switches/",
    "r1/kernels/",
    "r1/placement/",
    "r1/text/",
    "r1/model/",
    "r1/storage/",
    "r1/device.py",
    "r1/reading.py",
    "r1/writing.py",
    "r1/streams.py",
    "r1/errors.py",
    "r1/starting.py",
)
"""The rooms from the top to the ground. A file may import from its own room and from rooms below.

r1/bench stands above r1/__init__.py, because it loads models as a user does: through `import r1`.
An import of `r1.model.config` also runs r1/__init__.py, as Python always does. That is not counted:
only a file that takes a name from r1/__init__.py imports it.
"""

KNOWN: dict[str, set[str]] = {
    "long functions": {
        "r1/kernels/attention_kernels.py: split_kernel",
    },
    "paths": {"tests/test_bench_plot.py", "tests/test_bench_results.py", "tests/test_tools.py"},
}
"""The exceptions, by check: Triton kernels that are one piece, and tests about paths."""

LINE, FILE, FUNCTION = 100, 300, 50
"""The most characters of a line, lines of a file, and lines of a function."""


def check(kind: str, found: set[str]) -> None:
    """Fail on a violation that KNOWN does not list, and on an entry of KNOWN that is none."""
    known = KNOWN.get(kind, set())
    assert not found - known, f"{kind}: not allowed"
    assert not known - found, f"{kind}: no violations, so remove them from KNOWN"


# ---------------------------- the import graph
@dataclass(frozen=True)
class Import:
    """One import of a file of the house by another. `line` is where it stands."""

    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer} -> {self.imported}"


@cache
def house() -> dict[str, str]:
    """The source of each file of r1/ and of bench.py, by its path below the root."""
    paths = [ROOT / "bench.py", *sorted((ROOT / "r1").rglob("*.py"))]
    return {str(path.relative_to(ROOT).as_posix()): path.read_text("utf-8") for path in paths}


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def file_of(module: str, files: dict[str, str]) -> str | None:
    """The file that holds a module of the house; None for a module of another package."""
    stem = module.replace(".", "/")
    return next((name for name in (f"{stem}.py", f"{stem}/__init__.py") if name in files), None)


def imports(name: str, files: dict[str, str]) -> Iterator[Import]:
    """Every import of one file: at its top, inside functions and under TYPE_CHECKING."""
    package = Path(name).parent.parts
    for node in ast.walk(parsed(files[name])):
        wanted: list[str] = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *((node.module or "").split(".") if node.module else ())))
            # `from r1.run import graphs` imports the file graphs.py; of another name, its package.
            modules = (f"{module}.{alias.name}" for alias in node.names)
            wanted = [each if file_of(each, files) else module for each in modules]
        for module in wanted:
            if (imported := file_of(module, files)) and imported != name:
                yield Import(name, imported, getattr(node, "lineno", 0))


def graph(files: dict[str, str]) -> list[Import]:
    return [each for name in files for each in imports(name, files)]


def room(name: str) -> int:
    """The number of a file's room, counted from the top."""
    found = [n for n, each in enumerate(ROOMS) if name == each or name.startswith(each)]
    assert len(found) == 1, f"{name} belongs to no room: add it to ROOMS"
    return found[0]


def upward(files: dict[str, str]) -> set[str]:
    """The imports from a room above."""
    return {str(e) for e in graph(files) if room(e.imported) < room(e.importer)}


def circles(files: dict[str, str]) -> set[str]:
    """The sets of files of which each imports each other one, directly or through others."""
    below: dict[str, set[str]] = {name: set() for name in files}
    for each in graph(files):
        below[each.importer].add(each.imported)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in below[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    reach = {name: reached(name) for name in files}
    return {
        " <-> ".join(sorted(other for other in reach[name] if name in reach[other]))
        for name in files
        if name in reach[name]
    }


def test_imports_point_downwards() -> None:
    check("upward", upward(house()))


def test_no_files_import_each_other() -> None:
    check("circles", circles(house()))


UPWARD = "r1/model/moe.py -> r1/run/runner.py"
TOP = "from r1.run.runner import Runner"


@pytest.mark.parametrize(
    ("added", "wrong"),
    [
        (TOP, UPWARD),
        (f"def f():\n    {TOP}", UPWARD),
        (f"if TYPE_CHECKING:\n    {TOP}", UPWARD),
        ("from r1.run import runner", UPWARD),
        ("import r1.run.runner as x", UPWARD),
        ("from ..run.runner import Runner", UPWARD),
        ("from ..run import runner", UPWARD),
        ("from r1 import Engine", "r1/model/moe.py -> r1/__init__.py"),
        ("import r1", "r1/model/moe.py -> r1/__init__.py"),
    ],
)
def test_an_import_from_above_is_found(added: str, wrong: str) -> None:
    """However it is written."""
    moe = "r1/model/moe.py"
    assert upward({**house(), moe: f"{house()[moe]}\n{added}\n"}) - upward(house()) == {wrong}


def test_a_circle_is_found() -> None:
    """Of three files, one of whose imports is for types alone; a chain of imports is no circle."""
    files = {
        "r1/model/a.py": "from r1.model import b",
        "r1/model/b.py": "if TYPE_CHECKING:\n    from r1.model.c import C",
        "r1/model/c.py": "def f():\n    from r1.model.a import A",
        "r1/model/d.py": "from r1.model.a import A",
    }
    assert circles(files) == {"r1/model/a.py <-> r1/model/b.py <-> r1/model/c.py"}
    assert not circles({**files, "r1/model/c.py": "import torch"})


# ---------------------------- sizes
def python_files() -> list[Path]:
    """Every Python file of the repository, hidden folders left out."""
    return [
        path
        for path in sorted(ROOT.rglob("*.py"))
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Every function of a file: its name, with its classes' in front, and how many lines it has."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}."
                if not isinstance(child, ast.ClassDef):
                    yield name[:-1], (child.end_lineno or 0) - child.lineno + 1
            yield from walk(child, name)

    yield from walk(parsed(source), "")


def test_lines_are_short() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in python_files()
        if any(len(line) > LINE for line in path.read_text("utf-8").splitlines())
    }
    check("long lines", found)


def test_files_are_short() -> None:
    check("long files", {name for name, text in house().items() if len(text.splitlines()) > FILE})


def test_functions_are_short() -> None:
    found = {
        f"{name}: {function}"
        for name, source in house().items()
        for function, lines in functions(source)
        if lines > FUNCTION
    }
    check("long functions", found)


def test_a_long_function_is_found() -> None:
    """A method too, and a function within one; each line counts once for each that holds it."""
    source = "class A:\n  def f(self):\n    def g():\n      pass\n      pass\n    return g\n"
    assert list(functions(source)) == [("A.f", 5), ("A.f.g", 3)]


# ---------------------------- paths
ABSOLUTE = re.compile(r"(?<![\w.}~-])/(?:work|root|home)\b")


def test_no_file_names_a_folder_of_one_machine() -> None:
    """Committed files other than *.md hold no absolute path such as a home folder's."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("which files are committed is known in a git checkout only")
    found = set()
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name.endswith(".md") or not path.is_file():
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # weights
        if ABSOLUTE.search(text):
            found.add(name)
    check("paths", found)


def test_an_absolute_path_is_found() -> None:
    for folder in ("work", "root", "home"):
        assert ABSOLUTE.search(f'"/{folder}/x"') and ABSOLUTE.search(f"cd /{folder}")
        assert not ABSOLUTE.search(f"a/{folder}/x") and not ABSOLUTE.search(f"/{folder}er")
