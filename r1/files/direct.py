"""Large aligned reads of files, past the page cache where the file system allows it.

Mapped files are read page by page, as a program touches them: each fault waits for a few KiB. Here
a thread asks for MiBs at once, and several threads keep a drive busy.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from r1.errors import InputError

BLOCK = 4096
"""Bytes: direct reads begin and end at multiples of it, in files and in memory."""
CHUNK = 2**23
"""The most bytes that one call asks the system for."""
GAP = 2**16
"""Ranges of a file with fewer bytes between them are read as one."""

Range = tuple[Path, int, int]
"""A file, the first byte, and the one after the last."""


class Files:
    """Open files, and a buffer for each thread that reads them. Closed with their last user."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Raises InputError for a file that can't be opened."""
        self.descriptors: dict[Path, int] = {}
        self.direct: dict[Path, bool] = {}
        self.buffers = threading.local()
        for path in paths:
            self.descriptors[path], self.direct[path] = _open(path)

    def __del__(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def read(self, ranges: list[Range]) -> list[Tensor]:
        """The bytes of each range, uint8 (n,). They are valid until this thread reads again.

        Raises InputError where a file ends too early, or can't be read.
        """
        order = sorted(range(len(ranges)), key=lambda i: ranges[i])
        runs = [[order[0]]]
        for before, i in pairwise(order):
            (path, _, stop), (other, first, _) = ranges[before], ranges[i]
            if path == other and first - stop < GAP:
                runs[-1].append(i)
            else:
                runs.append([i])
        spans = [
            (ranges[run[0]][0], _down(ranges[run[0]][1]), max(ranges[i][2] for i in run))
            for run in runs
        ]
        buffer = self._buffer(sum(_up(stop - first) for _, first, stop in spans))
        memory, begin = torch.frombuffer(buffer, dtype=torch.uint8), 0
        out: dict[int, Tensor] = {}
        for run, (path, first, stop) in zip(runs, spans, strict=True):
            self._fill(buffer, begin, path, first, stop)
            for i in run:
                at = begin + ranges[i][1] - first
                out[i] = memory[at : at + ranges[i][2] - ranges[i][1]]
            begin += _up(stop - first)
        return [out[i] for i in range(len(ranges))]

    def _buffer(self, size: int) -> mmap.mmap:
        """Memory that begins at a page, of at least so many bytes."""
        buffer: mmap.mmap | None = getattr(self.buffers, "memory", None)
        if buffer is None or len(buffer) < size:
            buffer = self.buffers.memory = mmap.mmap(-1, max(size, BLOCK))
        return buffer

    def _fill(self, buffer: mmap.mmap, begin: int, path: Path, first: int, stop: int) -> None:
        """Read from `first`, a multiple of BLOCK, to `stop` or beyond it, to `begin` of buffer."""
        descriptor, size, done = self.descriptors[path], stop - first, 0
        try:
            with memoryview(buffer) as view:
                while done < size:
                    some = view[begin + done : begin + min(_up(size), done + CHUNK)]
                    got = os.preadv(descriptor, [some], first + done)
                    done += got
                    if done < size and (got == 0 or got % BLOCK):
                        raise InputError(
                            f"{path} ends before byte {stop}, where it was longer: load the model "
                            "again when nothing writes to its folder"
                        )
        except OSError as error:
            raise InputError(
                f"{path} can't be read ({error.strerror}): look at its drive, and load the model "
                "again"
            ) from None
        if not self.direct[path]:  # what is kept for us need not stay in the page cache too
            os.posix_fadvise(descriptor, first, _up(size), os.POSIX_FADV_DONTNEED)


def _open(path: Path) -> tuple[int, bool]:
    """A file's descriptor, and whether its reads pass the page cache."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        for more in (getattr(os, "O_DIRECT", 0), 0):
            try:
                descriptor = os.open(path, flags | more)
            except OSError as error:
                if more and error.errno == errno.EINVAL:
                    continue  # a file system without direct reads
                raise
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError(errno.EINVAL, "it is no file")
            if more and not _reads(descriptor):
                os.close(descriptor)
                continue
            return descriptor, more != 0
    except OSError as error:
        raise InputError(f"{path} can't be opened ({error.strerror}): make it readable") from None
    raise AssertionError("the second try returns or raises")


def _reads(descriptor: int) -> bool:
    """Whether a file that was opened for direct reads can be read in blocks of ours."""
    try:
        os.preadv(descriptor, [mmap.mmap(-1, BLOCK)], 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def _down(place: int) -> int:
    return place // BLOCK * BLOCK


def _up(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
