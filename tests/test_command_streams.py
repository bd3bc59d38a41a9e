"""Tests the commands with other terminals: another encoding, a full disk, closed, or hung up.

Holds to account: r1/streams.py, r1/starting.py, r1/__main__.py, r1/tour/__main__.py, bench.py and
r1/bench/process.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cases import ROOT

from r1 import starting, streams
from r1.bench import progress
from r1.bench.load_result import load
from r1.bench.process import SIGNALS, deaf_children, interrupt_once, signals

SHORT = ["--device", "cpu", "--new", "2", "--prompt", "4", "-r", "1", "--problems", "0"]
QUESTION = ["--device", "cpu", "--new", "12", "--temperature", "0", "2+3=?"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "0", **more}


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    encoding = options.pop("encoding", "utf-8")
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(PYTHONIOENCODING=encoding),
        timeout=120,
        check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


# ---------------------------- encodings
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_an_answer_that_the_terminal_cant_show(encoding: str) -> None:
    """Every character arrives, some as escapes. Without this the answer ended in a traceback."""
    script = (
        "import sys, r1.__main__ as m\n"
        "def ask(self, question):\n"
        "    from r1 import streams; streams.write('é你 ✓ ' + question)\n"
        "m.Conversation.ask = ask\n"
        "sys.exit(m.main(['--device', 'cpu']))"
    )
    done = run("-c", script, encoding=encoding, input=b"hi \xe4\xff\x81\n")
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert rb"\u4f60 \u2713 hi " in done.stdout


def test_a_question_of_other_bytes_ends_no_chat() -> None:
    done = run("-m", "r1", *QUESTION[:-1], input=b"\xff\xfe\n2+3=?\n")
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert b"your question holds a byte that is no utf-8 text" in done.stderr
    assert b"tokens read" in done.stderr


def test_a_question_from_stdin() -> None:
    """`-` reads all of it, as one question."""
    done = run("-m", "r1", *QUESTION[:-1], "-", input=b"2+3\n=?\n")
    assert done.returncode == 0 and done.stderr.count(b"tokens read") == 1, done.stderr
    done = run("-m", "r1", *QUESTION[:-1], "-", input=b"\n")
    assert done.returncode == 2 and done.stderr.startswith(b"r1: stdin is empty: ask something")


def test_a_tour_in_ascii() -> None:
    done = run("-m", "r1.tour", "--layer", "0", encoding="ascii")
    assert done.returncode == 0 and rb"<\uff5cUser\uff5c>" in done.stdout, done.stderr


def test_tables_in_ascii() -> None:
    result = ROOT / "tools" / "measure" / "results" / "h100" / "ladder.json"
    done = run("bench.py", "--show", str(result), "--wide", encoding="ascii")
    assert done.returncode == 0 and rb"max \u0394logit" in done.stdout, done.stderr


def test_a_line_of_progress_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a longer one only the last part would be replaced by the next."""
    text, widths = "x" * 100, {40: 39, 0: 79, None: 79}
    for columns, shown in widths.items():
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)

        def size(_: int, columns: int | None = columns) -> os.terminal_size:
            if columns is None:
                raise OSError
            return os.terminal_size((columns, 24))

        monkeypatch.setattr(os, "get_terminal_size", size)
        for say in (streams.status, progress.say):
            say(text)
            assert capsys.readouterr().err == "\r\x1b[K" + "x" * shown
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    streams.status(text)
    assert capsys.readouterr().err == ""


# ---------------------------- a full disk, closed streams
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "r1", *QUESTION],
        ["-m", "r1.tour"],
        ["bench.py", "--explain"],
        ["bench.py", "--show", "tools/measure/results/h100/ladder.json"],
    ],
    ids=["r1", "tour", "explain", "show"],
)
def test_stdout_on_a_full_disk(command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = run(*command, stdout=full)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(b"\n") == 1 and b"No space left on device" in done.stderr


def test_a_measurement_is_kept_when_stdout_is_full(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "bench.py", *SHORT, "-o", "json"],
            cwd=ROOT,
            env=environment(TMPDIR=str(tmp_path)),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (kept,) = tmp_path.glob("r1-bench-*.json")
    *progress, sentence = done.stderr.splitlines()
    assert str(kept) in sentence and all(line.startswith("bench: ") for line in progress)
    assert load(kept, complete=True)["rows"][0]["kind"] == "baseline"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(closed: str) -> None:
    line = f"{sys.executable} -m r1 {' '.join(QUESTION)} {closed}"
    done = subprocess.run(
        ["/bin/sh", "-c", line], cwd=ROOT, env=environment(), capture_output=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


# ---------------------------- signals
def started(arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "bench.py", *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def catches(process: subprocess.Popen[bytes], number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


BEGUN = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.orig_argv, sys.argv = ["python", *COMMAND, "hi"], COMMAND[:1]
import r1
"""
"""What Python does first of `python -m r1`, with Ctrl-C when torch is imported."""


@pytest.mark.parametrize(
    ("command", "status"),
    [(["-m", "r1"], 130), (["-m", "r1.tour"], 130), (["-m", "other"], -2), (["script.py"], -2)],
)
def test_ctrl_c_while_a_command_imports(command: list[str], status: int) -> None:
    """It ends without a traceback. A program that imports r1 handles Ctrl-C as it likes."""
    done = run("-c", BEGUN.replace("COMMAND", repr(command)), start_new_session=True)
    assert done.returncode == status and (b"Traceback" in done.stderr) == (status != 130)


def test_ctrl_c_is_an_interrupt_again_after_the_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not starting.is_command()
    kept: list[Any] = []
    monkeypatch.setattr(signal, "signal", lambda _, handler: kept.append(handler))
    monkeypatch.setattr(signal, "getsignal", lambda _: kept[-1])
    for before, while_importing in (
        (signal.default_int_handler, starting._leave),
        (signal.SIG_IGN, signal.SIG_IGN),
    ):
        kept.append(before)
        starting.begin()
        assert kept[-1] is while_importing
        starting.done()
        assert kept[-1] is before


@pytest.mark.parametrize(
    ("number", "seconds"),
    [
        (signal.SIGTERM, 0.0),
        (signal.SIGHUP, 0.5),
        (signal.SIGINT, 2.0),
        (signal.SIGHUP, 6.0),
        (signal.SIGTERM, 9.0),
    ],
)
def test_a_signal_ends_a_benchmark(number: signal.Signals, seconds: float) -> None:
    """At any time: while it imports, checks, starts children, or measures."""
    process = started([*SHORT, "-r", "500", "-o", "json"])
    while not all(catches(process, each) for each in SIGNALS):  # Python itself starts
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(number)
    sent = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (process.returncode, err)
    assert time.monotonic() - sent < 20 and b"Traceback" not in err, err
    assert not out or "Interrupted" in json.loads(out)["notes"][-1]


def test_nohup_is_kept() -> None:
    """What the caller ignores stays ignored."""
    process = started(
        [*SHORT, "-o", "json"], preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    for _ in range(4):
        time.sleep(1)
        process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and len(json.loads(out)["rows"]) == 1, err


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_signal_while_a_child_starts_is_handled_afterwards(number: signal.Signals) -> None:
    order = []
    with pytest.raises(KeyboardInterrupt), signals(interrupt_once):
        with deaf_children():
            os.kill(os.getpid(), number)
            child = subprocess.Popen(["sleep", "60"])
            order.append("started")
        order.append("lost")
    assert order == ["started"]
    for each in SIGNALS:
        child.send_signal(each)
    time.sleep(0.2)
    assert child.poll() is None, "the child is deaf"
    child.kill()
    child.wait()
