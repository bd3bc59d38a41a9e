"""How much memory a model needs: weights, cache, and what a prompt and a step make on the way.

The loader's check before it allocates (build.py), bench.py's check of its sizes and the guide
(r1/guide) ask here. The parts are counted from the model as it is stored and from the strategies'
own facts (`scratch`), so they are an estimate: the allocator rounds, and libraries keep workspaces.
On an H100 the sum is within 1% of the measured peak of every committed row in bf16
(tests/test_footprint.py).

Shapes: B rows, S tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from r1.device import DTYPES
from r1.model.cache import bytes_per_token
from r1.model.dispatch import Dispatch
from r1.model.layers import MLP
from r1.model.moe import MoE
from r1.model.transformer import Block, Transformer
from r1.run.runner import chunk_of, round_capacity, round_rows
from r1.storage.kinds import kind_of
from r1.switches.backend import Backend
from r1.switches.strategies import EXPERTS, attention_of

HEADROOM = 256 * 2**20
"""The least bytes that must be free beside the weights: libraries, and a short prompt."""
WORKSPACE = 32 * 2**20
"""What the GPU's library of matrix products keeps for itself. A graph's pool has one more."""
POOL_LOSS = 2
"""A captured prompt's pool, in units of what it holds at a time: it gives nothing back while it is
recorded, so blocks of many sizes lie side by side. Measured on an H100: 2.0 eager, 1.5 compiled."""
SHORT = 128
"""Tokens of a short prompt."""


@dataclass(frozen=True)
class Sizes:
    """What is asked of a model: rows, and tokens of each."""

    rows: int = 1
    prompt: int = SHORT
    new: int = 0
    depth: int = 0
    """Tokens in the cache before the prompt."""

    @property
    def tokens(self) -> int:
        """How many tokens a row of the cache holds at the end."""
        return self.depth + self.prompt + self.new


@dataclass(frozen=True)
class Footprint:
    """Bytes on one device at the peak, by what they hold."""

    weights: int
    cache: int
    activations: int
    """Of a prompt or of a decode step, whichever needs more at a time."""
    graphs: int
    """What captured steps and prompts keep between calls."""
    libraries: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.cache + self.beside

    @property
    def beside(self) -> int:
        """All but weights and cache."""
        return self.activations + self.graphs + self.libraries


def footprint(model: Transformer, backend: Backend, sizes: Sizes, weights: int = 0) -> Footprint:
    """The estimate for a model, or its sketch, under a resolved `backend`.

    `weights`: the model's bytes on this device, where they are known; 0 counts all of them.
    """
    gpu = backend.device != "cpu"
    work = Work(model, backend)
    prompt, step = work.prompt(sizes), work.step(sizes)
    graphs = step + WORKSPACE if backend.cuda_graphs else 0
    if backend.prefill_graphs:
        graphs += POOL_LOSS * prompt + WORKSPACE
    alive = [0 if backend.prefill_graphs else prompt, 0 if backend.cuda_graphs else step]
    return Footprint(
        weights or module_bytes(model),
        cache_bytes(model, backend, sizes),
        max(alive),
        graphs,
        WORKSPACE if gpu else 0,
    )


def least(model: Transformer, backend: Backend) -> int:
    """Bytes beside the weights without which the model can't even read a short prompt."""
    short = footprint(model, backend, Sizes(), weights=1)
    return max(HEADROOM, short.beside + short.cache)


def module_bytes(module: nn.Module) -> int:
    """Bytes of all tensors of a module."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def cache_bytes(model: Transformer, backend: Backend, sizes: Sizes) -> int:
    """Bytes of the cache, with the rows and the capacity that the runner rounds up to."""
    rows = round_rows(sizes.rows) if backend.cuda_graphs else sizes.rows
    layers = len(model.layers) + (backend.speculate == "mtp")
    shape = _block(model).self_attn.shape
    entry = attention_of(model.config.attention)[backend.attention].entry(shape)
    slots = rows * round_capacity(sizes.tokens)
    return slots * bytes_per_token(entry, DTYPES[backend.dtype], layers)


def _block(model: Transformer) -> Any:
    return model.layers[0]


class Work:
    """The tensors that one call makes on the way, at most, as bytes."""

    def __init__(self, model: Transformer, backend: Backend) -> None:
        self.model, self.backend = model, backend
        self.itemsize = DTYPES[backend.compute].itemsize
        table = attention_of(model.config.attention)
        self.attention = {
            "prefill": table[backend.prefill_attention], "decode": table[backend.attention],
        }  # fmt: skip
        self.moe = {"prefill": backend.prefill_moe, "decode": backend.moe}

    def prompt(self, sizes: Sizes) -> int:
        """Reading the prompts, a chunk of their tokens at a time, and their last logits."""
        longest = chunk_of(self.attention["prefill"], sizes.rows)
        tokens = min(max(sizes.prompt, sizes.depth), longest)
        keys = sizes.depth + sizes.prompt
        return max(self.layers("prefill", sizes.rows, tokens, keys), self.logits(sizes.rows))

    def step(self, sizes: Sizes) -> int:
        """A decode step of all rows, and its logits."""
        rows = round_rows(sizes.rows) if self.backend.cuda_graphs else sizes.rows
        tokens = self.backend.step_tokens
        layers = self.layers("decode", rows, tokens, round_capacity(sizes.tokens))
        return max(layers, self.logits(rows * tokens))

    def logits(self, tokens: int) -> int:
        """In the dtype of the product, and in fp32."""
        return tokens * self.model.config.vocab_size * (self.itemsize + 4)

    def layers(self, phase: str, rows: int, tokens: int, keys: int) -> int:
        """The layer that needs most: its attention or its feed-forward, beside the hidden states.

        These are the layer's input, its sum with attention, and the normed one.
        """
        stream = 3 * rows * tokens * self.model.config.hidden_size * self.itemsize
        blocks = {type(block.mlp): block for block in self.model.layers if isinstance(block, Block)}
        most = 0
        for block in blocks.values():
            shape = block.self_attn.shape
            attend = self.attention[phase].scratch(shape, rows, tokens, keys, self.itemsize)
            most = max(most, attend, self.feed_forward(phase, block.mlp, rows * tokens))
        return stream + most

    def feed_forward(self, phase: str, part: nn.Module, tokens: int) -> int:
        """An MLP's, or the experts'."""
        if isinstance(part, MoE):
            chosen = self.model.config.experts.num_experts_per_tok
            strategy = EXPERTS[self.moe[phase]]
            # A CPU multiplies by packed experts, which a GPU's grouped product wants dense.
            kind = kind_of(self.backend.quant)
            cpu = self.backend.device == "cpu" and kind in ("int8", "int4")
            scratch = partial(Dispatch.scratch, strategy) if cpu else strategy.scratch
            compiled = self.backend.compile
            return scratch(part.experts, tokens, chosen, self.itemsize, compiled=compiled)
        if not isinstance(part, MLP):
            return 0
        gate = part.gate_proj.matrix
        inner, inputs = gate.shape
        compiled, kernels = self.backend.compile, self.backend.kernels == "triton"
        values = (3 if compiled else 4) * tokens * inner * self.itemsize
        if not gate.unpacked_bytes or (kernels and phase == "decode"):
            return values
        # A kernel makes a prompt's matrix dense in one pass: there is nothing beside the result.
        beside = 0 if kernels else gate.unpacked_bytes
        return values + 2 * inner * inputs * (beside + self.itemsize)
