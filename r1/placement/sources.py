"""Where a layer's experts come from: host memory, or files with a cache in host memory before them.

A layer asks for some experts (`begin`), takes one after the other (`row`), and tells when its copy
to the device is on its way (`sent`).

Shapes: E experts of a layer; W bytes of an expert (storage/rows.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from torch import Tensor

from r1.model.moe import EXPERT_MATRICES, Experts
from r1.placement.link import Event
from r1.placement.slots import Slots

THREADS = 8
"""Threads that read files: a drive is fast only if it has several requests to work on."""


class InMemory:
    """The experts of a layer that are not resident on the device, in host memory."""

    def __init__(self, rows: Tensor, experts: Iterable[int]) -> None:
        """`rows`: uint8 (n, W), of these n experts."""
        self.hold(rows)
        self.place = {expert: row for row, expert in enumerate(experts)}
        """By expert: its row."""

    def hold(self, rows: Tensor) -> None:
        """The experts lie in these rows, uint8 (n, W)."""
        self.rows, self.views = rows, rows.unbind()  # a copy doesn't wait until a view is made

    def begin(self, experts: Collection[int]) -> list[int]:
        """These experts are wanted. Returns the order in which they are to be taken."""
        return list(experts)

    def ahead(self, experts: Collection[int]) -> list[int]:
        """Those of these experts that are worth asking for before it is known who is chosen."""
        return list(experts)

    def ready(self, expert: int) -> bool:
        """Whether `row` would not wait."""
        return True

    def row(self, expert: int) -> Tensor:
        """The bytes of one of them, (W,)."""
        return self.views[self.home(expert)]

    def sent(self, expert: int, arrived: Event | None) -> None:
        """Its copy to the device is done when `arrived` has happened."""

    def home(self, expert: int) -> int:
        """Its place in the layer's stack outside the device."""
        return self.place[expert]

    def read_bytes(self, tokens: int) -> int:
        """Bytes that were read from files since this was last asked: for a call of `tokens`."""
        return 0


class InFiles(InMemory):
    """A layer's experts in files. Some rows of host memory hold those that were used last.

    What is wanted and lies in a row already comes first. Meanwhile threads read the others, as many
    as there are rows. Each matrix of an expert is read by itself: while one thread moves what it
    has read to its row, the drive reads for the other threads.
    """

    def __init__(
        self, held: Experts, rows: Tensor, cache: Slots, device: Slots, pool: ThreadPoolExecutor
    ) -> None:
        """`held`: a stack of the cache's experts, whose bytes are `rows`, uint8 (n, W).

        `cache` tells which expert lies in which row, `device` which ones lie there too.
        """
        self.hold(rows)
        self.held, self.cache, self.device, self.pool = held, cache, device, pool
        self.cache.counts = device.counts
        self.fill: Callable[[int, int, str], None] | None = None
        """Reads a matrix of an expert into a row. Set when the files are known
        (files/experts.py)."""
        self.read: Callable[[int, str], object] | None = None
        """Reads it, and does nothing with it."""
        self.nbytes = 0
        """Bytes of files that an expert takes."""
        self.reading: dict[int, list[Future[None]]] = {}
        """By row: the reads of its matrices."""
        self.left: dict[int, Event | None] = {}
        """By row: until then the device copies from it."""
        self.wanted: list[int] = []
        self.queue: list[int] = []
        """Wanted experts that are not being read yet."""
        self.started: list[int] = []
        """Experts whose reads were begun since `read_bytes` was last asked."""
        self.log: list[Logged] | None = None
        """A list that all layers share gets each read, in order. None: nobody keeps a list."""

    def begin(self, experts: Collection[int]) -> list[int]:
        held = self.cache.slot
        self.queue = [expert for expert in experts if expert not in held]
        self.wanted = [expert for expert in experts if expert in held] + self.queue
        self._start()
        return list(self.wanted)

    def ahead(self, experts: Collection[int]) -> list[int]:
        """Those in rows, and as many as rows are empty: another's row is as likely to be needed."""
        held = [expert for expert in experts if expert in self.cache.slot]
        empty = len(self.rows) - len(self.cache.slot)
        others = [expert for expert in experts if expert not in self.cache.slot]
        return held + others[:empty]

    def ready(self, expert: int) -> bool:
        row = self.cache.slot.get(expert)
        return row is not None and all(read.done() for read in self.reading.get(row, ()))

    def row(self, expert: int) -> Tensor:
        """Waits until it is read. Raises InputError where that failed; then a later call reads it
        again.
        """
        row = self.cache.slot[expert]
        reads = self.reading.get(row, [])
        try:
            for read in reads:
                read.result()
        except BaseException:
            self.cache.forget(expert)  # the row's next expert waits for these reads
            raise
        self.reading.pop(row, None)
        return self.views[row]

    def sent(self, expert: int, arrived: Event | None) -> None:
        row = self.cache.slot[expert]
        self.left[row] = arrived
        self.cache.use([row])
        self.wanted.remove(expert)
        self._start()

    def home(self, expert: int) -> int:
        return expert

    def read_bytes(self, tokens: int) -> int:
        started, self.started = self.started, []
        if self.log is not None:
            self.log += [Logged(tokens, self, expert) for expert in started]
        return len(started) * self.nbytes

    def _start(self) -> None:
        """Begin to read what is wanted, into rows whose experts are not."""
        while self.queue:
            keep = {self.cache.slot[each] for each in self.wanted if each in self.cache.slot}
            if len(keep) == len(self.rows):
                return
            expert = self.queue.pop(0)
            row = self.cache.take(expert, keep, self.device.slot)
            before, left = self.reading.get(row, []), self.left.pop(row, None)
            self.reading[row] = [
                self.pool.submit(self._read, expert, row, matrix, before, left)
                for matrix in EXPERT_MATRICES
            ]
            self.started.append(expert)

    def _read(
        self, expert: int, row: int, matrix: str, before: list[Future[None]], left: Event | None
    ) -> None:
        """In a thread: read a matrix of an expert, once nobody needs what the row held."""
        wait(before)  # an expert that was guessed, and is not wanted any more
        if left is not None:
            left.synchronize()
        assert self.fill is not None, "no files are known"
        self.fill(expert, row, matrix)


class Logged(NamedTuple):
    """A read of an expert that has been begun."""

    tokens: int
    """Of the call that it was for."""
    source: InFiles
    expert: int
