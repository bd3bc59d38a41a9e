"""Fixtures that several test files use, and what must be set before anything imports Triton."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import replace_language_once
from ranks import Ranks
from torch import Tensor

pytest.register_assert_rewrite("cases", "refusals")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU its kernels are run as Python
    if find_spec("triton"):
        replace_language_once()


# A suite in the background (nohup, `&`) ignores these, and so would every command that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)  # the suite goes on; its commands need not


class CountingBackend:
    """A compiler that only counts what it is asked to compile."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound FP8 checkpoint in shards, with a tokenizer: to read from, not to change."""
    from make_tokenizer import make_tokenizer
    from models import WITH_TEXT, model

    from r1.files.save import save

    folder = tmp_path_factory.mktemp("made") / "sound"
    save(model(WITH_TEXT, mtp=True), folder, shard_bytes=40_000)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Processes for tests of several devices. A test must leave them as they were."""
    with Ranks(tmp_path_factory.mktemp("ranks")) as running:
        yield running


@pytest.fixture
def sound(made: Path, tmp_path: Path) -> Path:
    """A copy of `made`, to be broken."""
    return Path(shutil.copytree(made, tmp_path / "sound"))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingBackend]:
    """Stands in for Inductor wherever torch.compile is called."""
    torch._dynamo.reset()
    counting = CountingBackend()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    yield counting
    torch._dynamo.reset()


@pytest.fixture
def own_tables() -> Iterator[None]:
    """For tests that register strategies: all tables are afterwards as they were."""
    from r1.switches.strategies import ATTENTION, EXPERTS, GROUPED

    tables: tuple[dict[str, Any], ...] = (ATTENTION, EXPERTS, GROUPED)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
