"""What experts off the device did in one repetition: visits, hits, and bytes that moved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from r1.bench.worker.subject import Subject
from r1.placement.streamed import StreamedExperts


def begin(subject: Subject) -> None:
    """Count from here."""
    for layer in _layers(subject):
        layer.traffic.clear()


def fetched(subject: Subject) -> dict[str, Any] | None:
    """The sums over layers, of decode steps; of all other calls the bytes. None: nothing streams.

    A step is told from a prompt by its number of tokens.
    """
    layers, w = list(_layers(subject)), subject.workload
    if not layers:
        return None
    tokens = w.batch * subject.engine.backend.step_tokens
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


def _layers(subject: Subject) -> Iterator[StreamedExperts]:
    for module in subject.engine.model.modules():
        if isinstance(module, StreamedExperts):
            yield module
