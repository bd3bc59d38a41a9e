"""`--import FILE.py`: strategies of a user's own, by name, in every command.

Holds to account: r1/switches/own_files.py. test_readme.py measures one with bench.py.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_rows import WORK
from refusals import check_sentence, refused

import bench
from r1 import Backend, InputError
from r1.__main__ import main
from r1.bench.worker.serve import Setup, serve
from r1.placement.ranks import Crew
from r1.switches import own_files
from r1.switches.strategies import ATTENTION
from r1.tour.__main__ import main as tour

HEAD = """from r1.model.attend import Absorbed
from r1.switches.strategies import ATTENTION
class Mine(Absorbed):
    name = "mine"
"""
MINE = f"{HEAD}ATTENTION['mine'] = Mine()\n"
ASKED = ["--attention", "mine", "--device", "cpu", "--new", "2"]


@pytest.fixture(autouse=True)
def as_before(own_tables: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tables, the modules and their path are afterwards as they were."""
    modules = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("imported_"):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(text: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return written


def test_a_question_and_a_tour_with_ones_own(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The flag may stand behind the switch that names the strategy."""
    path = write(MINE + "print('it runs')")
    assert main([*ASKED, "--import", str(path), "2+3=?"]) == 0
    assert capsys.readouterr().out.startswith("it runs\n")
    del ATTENTION["mine"]
    assert tour([f"--import={path}", *ASKED]) == 0
    assert "The attention is `mine`" in capsys.readouterr().out


def test_a_file_is_a_module(write: Callable[..., Path]) -> None:
    """Its classes can be looked up, as the compiler does, and it imports what lies beside it."""
    write("number = 7\n", "beside_mine.py")
    path = write(f"from beside_mine import number\nassert __name__ != '__main__'\n{MINE}")
    before = set(path.parent.iterdir())
    own_files.run([path])
    entry: Any = ATTENTION["mine"]
    assert inspect.getsource(type(entry)).startswith("class Mine")
    module = sys.modules[type(entry).__module__]
    assert module.number == 7 and module.__file__ == str(path)
    assert {each.name for each in set(path.parent.iterdir()) - before} <= {"__pycache__"}


def test_only_the_flag_runs_a_file(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a question that looks like it; and `--import` without a value is the parser's to tell."""
    path = write("raise RuntimeError")
    monkeypatch.setattr(sys, "argv", ["r1", "--import", str(path)])
    for argv in (["hi"], ["--", "--import", str(path)], [str(path)], ["--import"], []):
        own_files.run_given(argv)
    with refused("line 1 raised RuntimeError"):
        own_files.run_given(None)


WRONG: dict[str, tuple[str, str]] = {
    "a name": (f"{MINE}nothing_like_it\n", "line 6 raised NameError: name 'nothing_like_it' is"),
    "a module": ("\nimport no_such_module", "line 2 raised ModuleNotFoundError: No module named"),
    "no Python": ("x = 1\n% no Python\n", "line 2 raised SyntaxError: invalid syntax"),
    "a zero": ("x = '\0'", "raised (SyntaxError|ValueError): source code .* null bytes"),
    "an exit": ("import sys\nsys.exit(3)", "line 2 raised SystemExit: 3"),
    "no words": ("\nassert 1 == 2", "line 2 raised AssertionError$"),
    "two lines": ("raise KeyError('a')", "line 1 raised KeyError: 'a'"),
    "taken": (f"{HEAD}ATTENTION['naive'] = Mine()", "'naive' of ATTENTION is taken: give your"),
    "removed": (f"{HEAD}del ATTENTION['naive']", "the name 'naive' of ATTENTION is taken"),
    "a class": (f"{HEAD}ATTENTION['mine'] = Mine", "is the class Mine: enter an instance of it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_in_a_file_is_one_sentence(
    case: str, write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = WRONG[case]
    path = write(text)
    with refused(f"^--import {path}: ", said):
        own_files.run([path])
    ATTENTION.pop("mine", None)
    for command, speaker in ((main, "r1"), (bench.main, "bench"), (tour, "r1.tour")):
        assert command(["--import", str(path), "--attention", "mine"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.strip().startswith(f"{speaker}: --import {path}: ")
        assert err.strip().count("\n") == 0
        ATTENTION.pop("mine", None)
        if case == "removed":
            break  # it is gone, so it can't be removed again


def test_what_is_no_file_to_run(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")
    for name, said in (
        ("missing.py", r"it can't be read \(No such file or directory\): give a Python file$"),
        ("folder.py", r"it can.t be read \(Is a directory\)"),
        ("pipe.py", "it is a pipe, not a file"),
        ("notes.txt", r"give a Python file, whose name ends in \.py$"),
    ):
        with refused(f"^--import {tmp_path / name}: ", said):
            own_files.run([tmp_path / name])


def test_a_name_belongs_to_the_first_file(write: Callable[..., Path]) -> None:
    first = write(MINE)
    second = write("from r1.switches.strategies import EXPERTS\n", "second.py")
    with refused(f"^--import {first}: the name 'mine' of ATTENTION is taken"):
        own_files.run_given([f"--import={path}" for path in (first, second, first)])


class Pipe:
    """A pipe on which commands come, and which keeps the answers."""

    def __init__(self, *commands: str) -> None:
        self.asked: Iterator[Any] = iter([*((command,) for command in commands), "quit"])
        self.answers: list[dict[str, Any]] = []

    def recv(self) -> Any:
        return next(self.asked)

    def send(self, answer: dict[str, Any]) -> None:
        self.answers.append(answer)


def test_an_arms_process_runs_the_file(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, before its first command; what goes wrong there is the arm's refusal."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    backend = Backend(device="cpu")
    object.__setattr__(backend, "attention", "mine")  # as it comes out of the pipe
    pipe: Any = Pipe("build", "warm")
    serve(pipe, backend, WORK, tmp_path, "c", Setup(imports=(write(MINE),)), Crew())
    assert pipe.answers[0]["backend"]["attention"] == "mine" and "refused" not in pipe.answers[1]
    pipe = Pipe("build")
    serve(pipe, backend, WORK, tmp_path, "c", Setup(imports=(tmp_path / "gone.py",)), Crew())
    (answer,) = pipe.answers
    assert "gone.py: it can't be read" in answer["refused"] and "crashed" not in answer
    check_sentence(str(InputError(answer["refused"])))
