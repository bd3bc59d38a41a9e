"""Read a small file whole: its bytes, its text, or its JSON.

A file that somebody else made may be a pipe, on which opening waits for ever, or larger than the
memory. Neither is read. Every reason not to read a file is an OSError or a ValueError, so a caller
catches these two and writes a sentence of its own; `read_object` writes the sentence itself.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from r1.errors import InputError

MOST_BYTES = 2**28
"""The largest file that is read. The largest tokenizer.json has about 2**25 bytes."""


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file. Raises OSError or ValueError (a name that no file can have).

    The file is opened without waiting, so a pipe can't block.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, f"it is {kind(status)}, not a file", str(path))
        if status.st_size > MOST_BYTES:
            size = f"{status.st_size / 2**20:.0f} MiB"
            raise OSError(errno.EFBIG, f"it has {size}, more than such a file has", str(path))
        return file.read(MOST_BYTES)


def read_start(path: str | Path, count: int) -> bytes:
    """The first `count` bytes of a regular file of any size; none of something else or unreadable.

    For a look at what a file is, where its content is not needed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            return file.read(count) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    except (OSError, ValueError):
        return b""


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises OSError or ValueError."""
    return read_bytes(path).decode("utf-8-sig")


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises OSError or ValueError."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def read_object(path: str | Path, advice: str = "download it again") -> dict[str, Any]:
    """The JSON object in a file. Raises InputError, which ends with the advice."""
    try:
        value = read_json(path)
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror or error}): {advice}") from None
    except ValueError as error:
        raise InputError(f"{path} can't be read as JSON ({error}): {advice}") from None
    return value


def status_of(path: str | Path) -> os.stat_result | None:
    """The status of a file, or of the file that a link leads to. None if there is no such file.

    Raises OSError where the folder may not be searched.
    """
    try:
        return os.stat(path)
    except PermissionError:
        raise
    except (OSError, ValueError):  # missing, a link to nowhere, a name that no file can have
        return None


def kind(status: os.stat_result) -> str:
    """How a sentence names a file, or what is none."""
    names = {
        stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    return names.get(stat.S_IFMT(status.st_mode), "a special file")
