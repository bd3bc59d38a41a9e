"""tools: every command starts from any folder, without an installed r1, and records no path."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import shared

TOOLS = Path(__file__).parents[1] / "tools"
FILES = [*TOOLS.glob("*.py"), *TOOLS.glob("*/*.py")]
COMMANDS = sorted(path for path in FILES if "__main__" in path.read_text())

RUN = """
import os, runpy, sys
found = lambda p: os.path.isdir(os.path.join(p or ".", "r1"))
sys.path = [p for p in sys.path if not found(p)]
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
clean, loaded = list(sys.path), set(sys.modules)
for tool in sys.argv[1:]:
    sys.path[:] = [os.path.dirname(tool), *clean]
    sys.argv = [tool, "--help"]
    for name in set(sys.modules) - loaded:
        if getattr(sys.modules[name], "__file__", None) and ROOT in sys.modules[name].__file__:
            del sys.modules[name]
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as error:
        assert error.code == 0, (tool, error.code)
"""


def test_every_command_has_help_from_any_folder(tmp_path: Path) -> None:
    """In one process, because each start of torch takes seconds. No r1 is on the path before."""
    script = f"ROOT = {str(shared.ROOT)!r}\n{RUN}"
    command = [sys.executable, "-c", script, *map(str, COMMANDS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(COMMANDS) == 19 and done.stdout.count("usage: ") == 19
    assert "not built yet" not in done.stdout


def test_the_page_lists_every_command() -> None:
    page = (TOOLS / "README.md").read_text(encoding="utf-8")
    assert all(f"python {path.relative_to(TOOLS.parent)}" in page for path in COMMANDS)
    assert page.count("\n") <= 80


def test_records_hold_no_path() -> None:
    tool = str(TOOLS / "measure" / "bench_kernels.py")
    words = ["--batch", "1,8", "-o", "/root/out/a.json", "--model=/data/tiny/", "-x", "a b"]
    assert shared.command(tool, words) == (
        "python tools/measure/bench_kernels.py --batch 1,8 -o a.json --model=tiny -x 'a b'"
    )
    given = argparse.Namespace(batch=1, output=Path("/root/out/a.json"), model=Path("x/tiny/"))
    assert shared.recorded(given) == {"batch": 1, "output": "a.json", "model": "tiny"}


def test_run_says_what_is_wrong_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: argparse.Namespace) -> int:
        raise shared.InputError("no such thing: name another")

    assert shared.run("tools/x/some_tool.py", refuse, argparse.Namespace()) == 2
    assert capsys.readouterr().err == "some_tool: no such thing: name another\n"
