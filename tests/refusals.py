"""How tests check a refusal: one sentence as `r1.InputError`, and nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import r1
from r1 import Backend, InputError
from r1.__main__ import main

CPU = Backend(device="cpu")


@contextmanager
def refused(*said: str) -> Iterator[pytest.ExceptionInfo[InputError]]:
    """What is inside raises InputError: one line, one sentence, in which each of `said` (regular
    expressions) is found.
    """
    with pytest.raises(InputError) as caught:
        yield caught
    message = str(caught.value)
    check_sentence(message)
    for pattern in said:
        assert re.search(pattern, message), f"{pattern!r} is not in {message!r}"


def check_sentence(message: str) -> None:
    assert message == message.strip() and "\n" not in message, message
    assert 20 < len(message) < 500, message
    unquoted = re.sub(r"'[^']*'", "", message)  # what a file says is not ours
    assert not message.endswith(".") and ". " not in unquoted, f"more than a sentence: {message}"
    assert "Traceback" not in message and "object at 0x" not in message, message


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder: its size, and when it was written."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if not path.is_dir()
    }


def check_refused(folder: Path, capsys: pytest.CaptureFixture[str], *said: str) -> None:
    """Through the API and through the command; the folder stays as it is."""
    before = snapshot(folder.parent)
    with refused(*said):
        r1.load(folder, CPU, quiet=True)
    assert main(["--model", str(folder), "--device", "cpu", "hi"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("r1: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert snapshot(folder.parent) == before
