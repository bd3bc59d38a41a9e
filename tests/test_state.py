"""State that belongs to somebody else: nothing of ours changes the process around it, or needs it.

Holds r1/build.py, r1/files and r1/run to account: the caller's default dtype and device, several
engines in threads, dynamo's limits, warning filters, inference mode.
"""

from __future__ import annotations

import contextvars
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import sharp_logits
from torch import Tensor

import r1
from r1 import Backend, Engine

TINY = Path(__file__).parents[1] / "weights" / "tiny-r1"
TOKENS = torch.tensor([[0, 5, 7, 9]])


def load(**switches: Any) -> Engine:
    return r1.load(TINY, Backend(device="cpu", **switches), quiet=True)


@contextmanager
def default_device(device: str, how: str) -> Iterator[None]:
    """The caller's default device, set for all or by a context."""
    if how == "context":
        with torch.device(device):
            yield
        return
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("how", ["context", "for all"])
def test_the_callers_default_device(how: str) -> None:
    """Loading, logits and drafts where the caller's tensors would have no memory."""
    engine = load()
    logits, written = engine.logits(TOKENS), engine.generate([[0, 5, 7]], 6, 0.6, seed=1)
    with default_device("meta", how):
        again = load(speculate="mtp")
        assert torch.equal(again.logits(TOKENS), logits)
        greedy = again.generate([[0, 5, 7]], 6, 0.0)[0].tokens
        assert load().generate([[0, 5, 7]], 6, 0.6, seed=1)[0].tokens == written[0].tokens
    assert greedy == engine.generate([[0, 5, 7]], 6, 0.0)[0].tokens


def test_the_callers_default_dtype() -> None:
    """It moves no logits, and is as it was afterwards."""
    logits = load().logits(TOKENS)
    torch.set_default_dtype(torch.bfloat16)
    try:
        engine = load()
        assert torch.equal(engine.logits(TOKENS), logits)
        engine.generate([[0, 5, 7]], 4, 0.6, seed=1)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_models_loaded_in_threads() -> None:
    """Four threads, two dtypes: each model has its own, and its logits."""
    right = {dtype: load(dtype=dtype).logits(TOKENS) for dtype in ("fp32", "bf16")}
    wrong: list[object] = []

    def work(dtype: str) -> None:
        try:
            for _ in range(3):
                if not torch.equal(load(dtype=dtype).logits(TOKENS), right[dtype]):
                    wrong.append(dtype)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(dtype,)) for dtype in ("fp32", "bf16") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.get_default_dtype() == torch.float32


def decoded(run: Any, capacity: int) -> Tensor:
    cache = run.cache(2, capacity)
    run.prefill([[5, 9, 200], [11, 3]], cache)
    logits: Tensor = run.decode(torch.tensor([[4], [8]]), cache)
    return logits


def test_a_compiled_engine_in_any_thread(compiler: Any) -> None:
    """Dynamo's limits belong to a thread. More shapes than they allow, in a thread of its own."""
    run = sharp_logits(device="cpu", compile=True)
    right = sharp_logits(device="cpu")
    wrong: list[object] = []

    def work() -> None:
        try:
            with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=2):
                for capacity in (128, 256, 384, 512):
                    difference = decoded(run, capacity) - decoded(right, capacity)
                    if float(difference.abs().max()) > 1e-4:
                        wrong.append(capacity)
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not wrong and compiler.graphs > 4


def test_nothing_stays_changed(compiler: Any) -> None:
    """Dynamo's limits and the warning filters, after a second engine of the same kind."""
    decoded(sharp_logits(device="cpu", compile=True), 128)
    before = len(warnings.filters), torch._dynamo.config.recompile_limit
    decoded(sharp_logits(device="cpu", compile=True), 128)
    assert (len(warnings.filters), torch._dynamo.config.recompile_limit) == before


def test_steps_leave_nothing_in_the_thread(compiler: Any) -> None:
    """Each patch of dynamo's settings leaves a context variable, for ever: one is enough."""
    engine = load(compile=True)
    engine.generate([[0, 5, 7]], 4, 0.0, ignore_stop=True)
    before = len(contextvars.copy_context())
    engine.generate([[0, 5, 7]], 30, 0.0, ignore_stop=True)
    assert len(contextvars.copy_context()) == before


def test_logits_are_a_normal_tensor() -> None:
    """They may be changed in place, and stand in an autograd graph."""
    logits = load().logits(TOKENS)
    logits.add_(1)
    logits.requires_grad_().sum().backward()
    assert logits.grad is not None
