"""Tests what may lie in a checkpoint's folder in place of its files, or change under a reader.

Holds to account: r1/reading.py, r1/files and r1/errors.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import CPU, refused
from safetensors.torch import load_file, save_file

import r1
from r1 import InputError
from r1.files import load as loading
from r1.files.folder import SMALL_FILES
from r1.files.shards import INDEX, SINGLE
from r1.reading import MOST_BYTES, read_bytes, read_json

NESTED = b'{"a":' * 100_000


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A test of this file that waits for ever fails after a minute."""

    def late(*_: Any) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def load(folder: Path) -> r1.Engine:
    return r1.load(folder, CPU, quiet=True)


def single(sound: Path) -> Path:
    """The checkpoint in one file; returns this file."""
    whole = {k: t for p in sorted(sound.glob("*.safetensors")) for k, t in load_file(p).items()}
    for path in [*sound.glob("*.safetensors"), sound / INDEX]:
        path.unlink()
    save_file(whole, sound / SINGLE)
    return sound / SINGLE


# ---------------------------- special files
def put_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a socket": put_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a link to a file that is missing": lambda path: path.symlink_to("gone"),
}


@pytest.mark.parametrize("what", SPECIAL)
@pytest.mark.parametrize("name", [*SMALL_FILES, SINGLE])
def test_a_special_file_is_not_opened(name: str, what: str, sound: Path) -> None:
    """In place of any file that is read, or as one that the folder never had."""
    single(sound)
    (sound / name).unlink(missing_ok=True)
    SPECIAL[what](sound / name)
    with refused(rf"{name} is {what}" if name != "config.json" else "config.json"):
        load(sound)


@pytest.mark.parametrize("what", SPECIAL)
def test_a_special_file_in_place_of_a_shard(what: str, sound: Path) -> None:
    path = min(sound.glob("*.safetensors"))
    path.unlink()
    SPECIAL[what](path)
    with refused(f"names {path.name}, which the folder lacks"):
        load(sound)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Not even where it takes a file's place after the look at the folder."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe"):
        read_bytes(tmp_path / "pipe")


def test_a_file_larger_than_such_files_are(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with refused("config.json can't be read", "256 MiB"):
        load(tmp_path)


@pytest.mark.parametrize("name", [n for n in SMALL_FILES if n.endswith(".json")])
@pytest.mark.parametrize(
    "content",
    [NESTED, b"[" * 200_000, b"", b"\xff\xfe", b"\x00" * 99, b"[1]", b"7", b"1" * 9999, b'"a"'],
    ids=["deep", "deeper", "empty", "UTF-16", "zeros", "list", "number", "digits", "text"],
)
def test_a_json_file_of_other_content(name: str, content: bytes, sound: Path) -> None:
    from r1.bench.exam import load as load_exam

    (sound / name).write_bytes(content)
    with refused(name):
        load_exam(sound)
        load(sound)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


# ---------------------------- names
@pytest.mark.parametrize(
    "name",
    ["x" * 300, "\ud800", "a\0b", "x\n\x1b[2J", "\u202egnp", "é" * 200],
    ids=lambda name: ascii(name)[:12],
)
def test_a_shard_of_an_impossible_name(name: str, sound: Path) -> None:
    index = json.loads((sound / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = f"{name}.safetensors"
    (sound / INDEX).write_text(json.dumps(index))
    with refused("index.json names", "which the folder lacks"):
        load(sound)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x\n\x1b[2J", "\u202egnp"], ids=ascii)
def test_a_folder_of_an_impossible_name(name: str, tmp_path: Path) -> None:
    with refused("there is no folder|can't be read"):
        load(tmp_path / name)


def test_messages_are_one_line_without_control_characters() -> None:
    message = str(InputError("names x\n\x1b[2J\x9b\u2028\u202e\ud800 ▁｜é.safetensors"))
    assert message == r"names x\n\x1b[2J\x9b\u2028\u202e\ud800 ▁｜é.safetensors"
    assert str(InputError(message)) == message
    assert len(str(InputError("x" * 10**7))) < 5000


def test_a_folder_that_may_not_be_listed(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    (sound / INDEX).unlink()
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, denied)
    with refused(r"sound can't be read \(Permission denied\)"):
        load(sound)


# ---------------------------- files that change under the reader
def other_weights(path: Path) -> None:
    """Put a file of the same size, shapes and times, and of other values, in the shard's place."""
    status = path.stat()
    key = "model.embed_tokens.weight"
    changed = {k: t * 2 if k == key else t for k, t in load_file(path).items()}
    save_file(changed, path.with_suffix(".new"), metadata={"format": "pt"})
    os.utime(path.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(path.with_suffix(".new"), path)


def in_place(path: Path) -> None:
    """Write other values into the same file, and set its time back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "replaced": (other_weights, "was changed while it was read"),
    "written to": (in_place, "was changed while it was read"),
    "cut": (lambda path: os.truncate(path, 100), "was changed while it was read"),
    "removed": (Path.unlink, "was there and is missing now"),
    "a pipe": (pipe_instead, "is a pipe"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_after_its_header_is_read(
    change: str, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (apply, said) = single(sound), CHANGES[change]
    check = loading._check_keys

    def check_and_change(*arguments: Any) -> None:
        check(*arguments)
        apply(path)

    monkeypatch.setattr(loading, "_check_keys", check_and_change)
    with refused(rf"model\.safetensors {said}"):
        load(sound)


@pytest.mark.parametrize("change", ["replaced", "written to"])
def test_a_shard_that_changes_while_its_weights_are_read(
    change: str, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (apply, said) = single(sound), CHANGES[change]
    stream = loading.stream
    changed: list[Path] = []

    def stream_and_change(*arguments: Any) -> Iterator[Any]:
        for number, part in enumerate(stream(*arguments)):
            if number == 3 and not changed:
                apply(path)
                changed.append(path)
            yield part

    monkeypatch.setattr(loading, "stream", stream_and_change)
    with refused(rf"model\.safetensors {said}"):
        load(sound)


def test_what_changes_elsewhere_is_no_hindrance(sound: Path, made: Path) -> None:
    """A file that is new since the last load, and a copy of it."""
    shutil.copytree(sound, sound.parent / "copy")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(load(sound.parent / "copy").logits(ids), load(made).logits(ids))
