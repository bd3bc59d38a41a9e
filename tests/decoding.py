"""A small model with sharp logits, how it reads a text step by step, and captures without a GPU:
what tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from r1.build import from_shape
from r1.model.cache import Cache
from r1.model.shapes import shape
from r1.run.graphs import Call
from r1.run.runner import Runner
from r1.switches.backend import Backend, resolve

CONFIG = shape("tiny")
PROMPTS = [[5, 9, 200, 7], [11, 3], [40, 41, 42, 43, 44, 45, 46]]
STEPS = 6


def runner(**switches: Any) -> Runner:
    """A model of always the same weights, as these switches run it. Raises InputError where they
    can't be had."""
    backend = resolve(Backend(**{"dtype": "fp32", **switches}), CONFIG, batch=len(PROMPTS))
    model = from_shape(CONFIG, backend)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith("mtp"):
            parameter.mul_(3)  # calm random weights hide everything in flat logits
        elif name.endswith("e_score_correction_bias"):
            # No rounding flips an expert (traps.md 14): a flip moves logits by more than all
            # rounding does.
            parameter.copy_(torch.randperm(len(parameter), generator=generator) * 2.0)
    return Runner(model, backend)


def read(run: Runner, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prefill the ragged prompts and decode `text` (P, B), as many tokens at a time as a step of
    `run` has; or what is likeliest. Returns the text and the logits (P + 1, B, W)."""
    cache = run.cache(len(PROMPTS), 64)
    logits, chosen = [run.prefill(PROMPTS, cache).clone()], []
    if text is None:
        for _ in range(STEPS):
            chosen.append(logits[-1].argmax(dim=-1))
            logits.append(run.decode(chosen[-1][:, None], cache)[:, -1].clone())
        return torch.stack(chosen), torch.stack(logits)
    for tokens in text.split(run.backend.step_tokens):
        logits += run.decode(tokens.T.contiguous(), cache).clone().unbind(1)
    return text, torch.stack(logits)


class Recorded:
    """What graphs.capture makes, without a GPU: inputs and outputs keep their addresses, warm-ups
    run before."""

    def __init__(self, step: Call, inputs: tuple[Tensor, ...], cache: Cache, pool: Any) -> None:
        lengths = cache.lengths.clone()
        self.step, self.cache, self.shared = step, cache, pool
        self.beside: list[Recorded] = pool.beside if pool else []
        self.beside.append(self)
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        for _ in range(3):
            self.outputs = step(*self.inputs, cache)
            cache.lengths.copy_(lengths)

    def replay(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for other in self.beside:
            for output in other.outputs if other is not self else ():
                output.fill_(
                    float("nan") if output.is_floating_point() else -1
                )  # which isn't safe from those of its memory
        for static, given in zip(
            (*self.inputs, *self.outputs), (*inputs, *self.step(*inputs, self.cache)), strict=True
        ):
            assert static.shape == given.shape and static.dtype == given.dtype
            static.copy_(given)
        return self.outputs

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

    monkeypatch.setattr("r1.run.runner.capture", capture)
    return made
