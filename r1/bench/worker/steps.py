"""The subject's single steps: the only part of the benchmark that uses the inside of a Runner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from r1.bench.worker.subject import Subject
from r1.model.moe import MoE
from r1.model.rounded import Rounded
from r1.model.router import Router
from r1.run import graphs
from r1.run.sampler import Sampler
from r1.run.speculate import speculate
from r1.storage.activations import NEVER


def prefill(subject: Subject) -> Tensor:
    """Fill the cache to the depth, then read the prompts. Returns fp32 logits (B, W)."""
    subject.fill()
    return read_prompts(subject)


def read_prompts(subject: Subject) -> Tensor:
    """Read the prompts, after the depth that the cache holds. Returns fp32 logits (B, W)."""
    return subject.engine.runner.prefill(subject.prompts, subject.cache, subject.workload.depth)


def decode(subject: Subject, tokens: Tensor) -> Tensor:
    """One decode step: tokens (B, S) -> fp32 logits (B, S, W)."""
    return subject.engine.runner.decode(tokens, subject.cache)


@contextmanager
def rounded_to(subject: Subject, amp: str) -> Iterator[None]:
    """Inside this context the model's products are rounded to `amp`, by autocast."""
    caller = subject.engine.runner.plain
    before, caller.backend = caller.backend, dataclasses.replace(caller.backend, amp=amp)
    try:
        yield
    finally:
        caller.backend = before


def round_steps(subject: Subject, rounds: bool) -> None:
    """From now on decode steps have inputs of FP8, or have not, whatever their number of tokens.

    Of a subject with `quant_activations`, whose prompts always have them.
    """
    least = 1 if rounds else NEVER
    subject.engine.runner.ways["decode"].least = least
    for module in subject.engine.model.modules():
        if isinstance(module, MoE):
            cast(Rounded, module.dispatch["decode"]).least = least


@contextmanager
def noise(subject: Subject, error: float, seed: int) -> Iterator[None]:
    """Inside this context the hidden states between the layers have noise, different for each seed.

    Each number is multiplied by 1 + u, where u is drawn evenly from -error to error.
    """
    generator = torch.Generator(subject.device).manual_seed(seed)

    def disturb(_module: nn.Module, _inputs: Any, x: Tensor) -> Tensor:
        u = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return x * (1 + error * (2 * u - 1))

    model = subject.engine.model
    hooks = [m.register_forward_hook(disturb) for m in (model.embed_tokens, *model.layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def counted_experts(subject: Subject) -> Iterator[list[int]]:
    """A list that gets the number of different experts of each router call in this context."""
    hits: list[int] = []

    def count(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        hits.append(output[0].unique().numel())

    hooks = [
        module.register_forward_hook(count)
        for module in subject.engine.model.modules()
        if isinstance(module, Router)
    ]
    try:
        yield hits
    finally:
        for hook in hooks:
            hook.remove()


def cache_in_fp32(subject: Subject) -> None:
    """From the next cache on, keep keys and values in fp32, whatever the weights' dtype."""
    subject.engine.runner.cache_dtype = torch.float32


def next_turn(subject: Subject) -> Callable[[], object]:
    """Read the prompts. Returns a function that does one decode step, or one turn of speculation.

    Without speculation the function repeats the same input tokens: only its time is of interest.
    """
    engine, w = subject.engine, subject.workload
    if engine.drafter:
        subject.fill()
        sampler = Sampler(0.0, seed=w.seed)
        prompts, cache = subject.prompts, subject.cache
        turns = speculate(engine.drafter, prompts, sampler, cache, w.depth, w.assumed)
        next(turns)
        return partial(next, turns)
    tokens = prefill(subject).argmax(dim=-1)[:, None]  # (B, 1)
    return partial(engine.runner.decode, tokens, subject.cache)


def moe_chain(subject: Subject, layers: list[int]) -> Callable[[], object]:
    """Read the prompts. Returns a function that runs these layers of a decode step, in a row.

    They run as the arm runs its steps: eager, compiled or captured.
    """
    prefill(subject)
    runner, cache = subject.engine.runner, subject.cache
    # The layers' time does not depend on the hidden states: embeddings will do.
    some = torch.arange(cache.rows, device=runner.device)[:, None]  # (B, 1)
    with runner.context():
        embedding = runner.model.embed_tokens(some)  # (B, 1, D)

    def chain() -> None:
        with runner.context():
            step = runner.next_step(cache, 1)
            hidden = embedding
            for layer in layers:
                hidden = runner.blocks["decode"][layer](hidden, step, cache.layers[layer])

    if not runner.backend.cuda_graphs:
        return chain
    if runner.link is not None:
        return graphs.record_pieces(chain, lambda: None, runner.link).replay
    return graphs.record(chain).replay
