"""Stands in for CUDA graphs on a CPU: records that keep addresses and overwrite as graphs do."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from r1.model.cache import Cache
from r1.run.graphs import Step


class Recorded:
    """What graphs.capture makes, without a GPU: inputs and outputs keep their addresses, warm-ups
    run before.
    """

    def __init__(
        self, step: Step, inputs: tuple[Tensor, ...], cache: Cache, pool: Any, _link: object
    ) -> None:
        lengths = cache.lengths.clone()
        self.step, self.cache, self.shared = step, cache, pool
        self.beside: list[Recorded] = pool.beside if pool else []
        self.beside.append(self)
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        self.fed = 0  # inputs that were copied here
        for _ in range(3):
            self.outputs = step(*self.inputs, cache)
            cache.lengths.copy_(lengths)

    def replay(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for other in self.beside:
            for output in other.outputs if other is not self else ():
                if all(output is not static for static in other.inputs):
                    output.fill_(
                        float("nan") if output.is_floating_point() else -1
                    )  # which isn't safe from those of its memory
        self.fed += sum(self.into(*pair) for pair in zip(self.inputs, inputs, strict=True))
        for pair in zip(self.outputs, self.step(*self.inputs, self.cache), strict=True):
            self.into(*pair)
        return self.outputs

    @staticmethod
    def into(static: Tensor, given: Tensor) -> bool:
        """Copy what is not there already, and tell whether it had to be."""
        assert static.shape == given.shape and static.dtype == given.dtype
        if static is not given:
            static.copy_(given)
        return static is not given

    @property
    def graph(self) -> Recorded:
        return self

    def pool(self) -> Recorded:
        return self.shared or self


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Let runners capture such records, of which this list will tell."""
    made: list[Recorded] = []

    def capture(*arguments: Any) -> Recorded:
        made.append(Recorded(*arguments))
        return made[-1]

    monkeypatch.setattr("r1.run.callers.capture", capture)
    return made
