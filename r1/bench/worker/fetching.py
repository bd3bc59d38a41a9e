"""What experts off the device did in one repetition: visits, hits, and bytes that moved.

Afterwards the reads of files are repeated without the model. Their rate tells how fast the drive
was just then: it may be twice as fast some minutes later.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from itertools import chain
from typing import Any

from r1.bench.worker.subject import Subject
from r1.model.moe import EXPERT_MATRICES
from r1.placement.sources import THREADS, InFiles, Logged
from r1.placement.streamed import StreamedExperts


@contextlib.contextmanager
def counted(subject: Subject) -> Iterator[list[Logged]]:
    """Count while this lasts. Gives a list that gets the reads of files, in order."""
    reads: list[Logged] = []
    for layer in _layers(subject):
        layer.traffic.clear()
    files = list(_files(subject))
    try:
        for source in files:
            source.log = reads
        yield reads
    finally:
        for source in files:
            source.log = None


def fetched(subject: Subject) -> dict[str, Any] | None:
    """The sums over layers, of decode steps; of all other calls the bytes. None: nothing streams.

    A step is told from a prompt by its number of tokens.
    """
    layers = list(_layers(subject))
    if not layers:
        return None
    tokens = _step_tokens(subject)
    steps = [layer.traffic[tokens] for layer in layers]
    names = ("visits", "hits", "copied", "read", "guessed", "right", "computed", "multiplied")
    sums: dict[str, Any] = {name: sum(getattr(s, name) for s in steps) for name in names}
    notes = [note for layer in layers for note in layer.traffic.values()]
    return sums | {
        "calls": max(step.calls for step in steps),
        "prompt": sum(note.copied for note in notes) - sums["copied"],
        "prompt_read": sum(note.read for note in notes) - sums["read"],
        "slots": max(layer.count for layer in layers),
    }


def disk_rate(subject: Subject, reads: Sequence[Logged]) -> float | None:
    """Bytes a second of the reads of decode steps, repeated. None where these read nothing.

    The same threads read the same ranges in the same order. But they never wait: no choice is
    awaited, and nothing is put into the cache. Raises InputError where files can't be read.
    """
    tokens = _step_tokens(subject)
    again = [(each.source, each.expert) for each in reads if each.tokens == tokens]
    if not again:
        return None
    guesses = chain.from_iterable(each for s in _files(subject) for each in s.reading.values())
    wait(list(guesses))  # that no step took
    left = iter([(*each, matrix) for each in again for matrix in EXPERT_MATRICES])

    def work() -> None:
        for source, expert, matrix in left:  # each thread takes the next one
            assert source.read is not None, "no files are known"
            source.read(expert, matrix)

    pool = again[0][0].pool
    start = time.perf_counter()
    for done in [pool.submit(work) for _ in range(THREADS)]:
        done.result()
    seconds = time.perf_counter() - start
    return sum(source.nbytes for source, _ in again) / seconds


def _step_tokens(subject: Subject) -> int:
    """Tokens of a decode step, of all rows."""
    return subject.workload.batch * subject.engine.backend.step_tokens


def _files(subject: Subject) -> Iterator[InFiles]:
    """Of the layers whose experts lie in files."""
    for layer in _layers(subject):
        source = layer.outside[1]
        if isinstance(source, InFiles):
            yield source


def _layers(subject: Subject) -> Iterator[StreamedExperts]:
    for module in subject.engine.model.modules():
        if isinstance(module, StreamedExperts):
            yield module
