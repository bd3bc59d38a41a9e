"""Fixtures that several test files use, and what must be set before anything imports Triton."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU its kernels are run as Python


class CountingBackend:
    """A compiler that only counts what it is asked to compile."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingBackend]:
    """Stands in for Inductor wherever torch.compile is called."""
    torch._dynamo.reset()
    counting = CountingBackend()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    yield counting
    torch._dynamo.reset()
