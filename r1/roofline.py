"""What the hardware allows: bytes that must move and operations that must be done in one step.

Counted from the model as it is stored, each input read once: the weights of what is active (of the
routed experts only those really hit), the cache that attention reads, one new entry written.
Activations are left out: where memory bounds a step they are small beside the weights. So the time
that results is a floor. Where devices share the model, all numbers are one device's, the one with
the largest share; what devices exchange is not counted. Stages that hold a range of layers each
(`pp`) compute a token one after the other, so a decode step's work is that of all stages. A prompt
keeps them busy at a time, so its work is divided by them.

Shapes: B rows of a step, S tokens of a row, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

from torch import nn

from r1.build import sketch
from r1.device import DTYPES
from r1.model.cache import bytes_per_token
from r1.model.config import Config
from r1.model.layers import Linear
from r1.model.moe import Experts
from r1.model.router import Router
from r1.model.transformer import Block, Transformer
from r1.storage.matrix import Matrix
from r1.switches.backend import Backend
from r1.switches.strategies import attention_of


@dataclass(frozen=True)
class Work:
    """One step's bytes and floating-point operations (a multiply-add is two)."""

    weight_bytes: float
    cache_bytes: float
    flops: float
    link_bytes: float = 0.0
    """Experts that are copied from host memory."""
    disk_bytes: float = 0.0
    """Experts that are read from files."""
    host_bytes: float = 0.0
    """Experts that the host multiplies, where they lie in its memory."""

    @property
    def nbytes(self) -> float:
        return self.weight_bytes + self.cache_bytes

    def __add__(self, other: Work) -> Work:
        return Work(
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
            self.flops + other.flops,
            self.link_bytes + other.link_bytes,
            self.disk_bytes + other.disk_bytes,
            self.host_bytes + other.host_bytes,
        )

    def __sub__(self, other: Work) -> Work:
        return Work(
            self.weight_bytes - other.weight_bytes,
            self.cache_bytes - other.cache_bytes,
            self.flops - other.flops,
            self.link_bytes - other.link_bytes,
            self.disk_bytes - other.disk_bytes,
            self.host_bytes - other.host_bytes,
        )


@dataclass(frozen=True)
class Weights:
    """Bytes, as stored, and elements of the weights that a part of the model multiplies by."""

    always: int = 0
    """Bytes of the weights that every token uses: attention, dense and shared feed-forward,
    router."""
    elements: int = 0
    """The elements of those."""
    expert: int = 0
    """Bytes of one routed expert in each sparse layer, summed over these layers."""
    expert_elements: int = 0


def weights_of(module: nn.Module) -> Weights:
    """The weights of a module's matrices. Embeddings are left out: a token reads one row."""
    always = elements = expert = expert_elements = 0
    for each in module.modules():
        if isinstance(each, Linear):
            always, elements = always + each.matrix.nbytes, elements + each.matrix.shape.numel()
        elif isinstance(each, Router):
            always, elements = always + each.weight.nbytes, elements + each.weight.numel()
        elif isinstance(each, Experts):
            stacks: list[Matrix] = [each.gate_proj, each.up_proj, each.down_proj]
            expert += sum(stack.nbytes for stack in stacks) // each.count
            expert_elements += sum(stack.shape.numel() for stack in stacks) // each.count
    return Weights(always, elements, expert, expert_elements)


def model_of(config: Config, backend: Backend, mtp: bool) -> Transformer:
    """The model as `backend` stores it, without memory. Nobody may change it: it is kept."""
    return _sketch(config, replace(backend, **HOW), mtp)


HOW: dict[str, Any] = {
    name: getattr(Backend, name)
    for name in (
        "device", "amp", "compile", "cuda_graphs", "prefill_graphs", "attention",
        "prefill_attention", "moe", "prefill_moe", "memory", "kernels", "tune", "speculate",
        "draft_tokens",
    )
}  # fmt: skip
"""Switches that say where and how a model is called, not how it is stored."""


@cache
def _sketch(config: Config, backend: Backend, mtp: bool) -> Transformer:
    return sketch(config, backend, mtp=mtp)


@cache
def _layers(model: Transformer) -> Weights:
    """The weights of a kept model's layers, counted once."""
    return weights_of(model.layers)


def step_work(
    config: Config, backend: Backend, rows: int, tokens: int, context: float, experts_hit: float,
    *, verify: bool = False,
) -> Work:  # fmt: skip
    """The work of one step: `rows` rows of `tokens` tokens each, after `context` cached ones.

    `experts_hit` is how many different experts a MoE layer uses in the step, on average. `backend`
    is resolved. `verify`: a decode step over drafts (speculate.py), in which every token gets
    logits; otherwise only the last of each row does.
    """
    # Of all stages. Where devices share a layer, one device's part.
    model = model_of(config, replace(backend, pp=1), False)
    layers, head = _layers(model), model.lm_head.matrix
    # A model without layers stands for what is left when its only one is taken away.
    first = cast(Block, model.layers[0]) if len(model.layers) else None
    shape = first.self_attn.shape if first else config.attention
    experts_hit /= backend.ep
    decode = tokens == 1 or verify
    table = attention_of(config.attention)
    attention = table[backend.attention if decode else backend.prefill_attention]
    n = rows * tokens
    weight_bytes = layers.always + head.nbytes + experts_hit * layers.expert
    weight_bytes += n * embedding_row_bytes(model)
    chosen = config.experts.num_experts_per_tok * layers.expert_elements / backend.ep
    flops = 2.0 * n * (layers.elements + chosen)
    flops += 2.0 * rows * (tokens if verify else 1) * head.shape.numel()
    pairs = n * (context + (tokens + 1) / 2) * config.num_hidden_layers  # of query and key
    flops += pairs * attention.flops(shape)
    entry = attention.entry(shape)
    per_token = bytes_per_token(entry, DTYPES[backend.dtype], config.num_hidden_layers)
    share = 1 if decode else backend.pp
    cache_bytes = (rows * context + n) * per_token
    return Work(weight_bytes / share, cache_bytes / share, flops / share)


def embedding_row_bytes(model: Transformer) -> float:
    """Bytes of one token's row."""
    matrix = model.embed_tokens.matrix
    return matrix.nbytes / matrix.shape[0]


def expected_experts(config: Config, rows: int) -> float:
    """How many experts `rows` tokens hit if each chooses uniformly: E (1 - (1 - K / E)^B)."""
    experts, chosen = config.experts.n_routed_experts, config.experts.num_experts_per_tok
    return experts * (1 - (1 - chosen / experts) ** rows) if experts else 0.0


def fetched_bytes(
    config: Config, backend: Backend, experts_hit: float, slots: int, found: float | None = None
) -> float:
    """Bytes of experts that a step copies to a device with so many slots a layer; or, with
    `experts=cpu`, that the host reads to multiply.

    `found`: the share of visited experts that lie in a slot. None: as for choices that are even
    and independent, of which slots hold their share whatever the policy, slots / E.
    """
    experts = config.experts.n_routed_experts
    found = min(1.0, slots / experts) if found is None else found
    each = weights_of(model_of(config, backend, False).layers).expert
    return experts_hit / backend.ep * (1 - found) * each


@dataclass(frozen=True)
class Speculation:
    """The work of a turn of speculation, beside that of a step of one token a row."""

    plain: Work
    verify: Work
    draft: Work
    drafts: int

    @property
    def turn(self) -> Work:
        return self.verify + self.draft

    def speedup(self, tokens: float) -> float:
        """What a turn that gives `tokens` tokens a row is worth by its bytes alone."""
        return tokens * self.plain.nbytes / self.turn.nbytes

    def pays_from(self) -> float | None:
        """The acceptance above which turns are worth more than steps, by bytes alone.

        None where even 1 is not enough.
        """
        if self.speedup(self.drafts + 1) <= 1:
            return None
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            pays = self.speedup(expected_tokens(middle, self.drafts)) > 1
            low, high = (low, middle) if pays else (middle, high)
        return high


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens that a turn gives: 1 + a + ... + a^k.

    Each draft is accepted with probability a if those before it were.
    """
    return sum(acceptance**number for number in range(drafts + 1))


def speculation(
    config: Config, backend: Backend, rows: int, context: float,
    draft: tuple[Config, Backend] | None = None,
) -> Speculation:  # fmt: skip
    """The byte model of a backend that speculates, with `context` tokens cached in each row.

    It assumes that each token chooses its experts uniformly and by itself. In truth neighbours
    share some, and the verification reads less. `draft`: the model that drafts, and its switches;
    None for the MTP layer.
    """
    drafts = backend.draft_tokens
    tokens = drafts + 1
    if draft:
        drafted = draft_model_work(*draft, drafts, rows, context)
    else:
        drafted = draft_work(config, backend, rows, context)
    one, all_hit = expected_experts(config, rows), expected_experts(config, rows * tokens)
    return Speculation(
        step_work(config, backend, rows, 1, context, one),
        step_work(config, backend, rows, tokens, context, all_hit, verify=True),
        drafted,
        drafts,
    )


def draft_work(config: Config, backend: Backend, rows: int, context: float) -> Work:
    """A turn's drafts, each with the output head.

    The MTP layer reads the k + 1 judged tokens in one pass, and one token in each of k - 1 more.
    """
    model = model_of(config, replace(backend, pp=1), True)
    layer, head = weights_of(model.mtp[0]), model.lm_head.matrix
    attention = attention_of(config.attention)[backend.attention]
    shape = cast(Block, model.layers[0]).self_attn.shape
    entry = attention.entry(shape)
    per_token = bytes_per_token(entry, DTYPES[backend.dtype], layers=1)
    chosen = config.experts.num_experts_per_tok * layer.expert_elements / backend.ep
    weight_bytes = cache_bytes = flops = 0.0
    for tokens in [backend.draft_tokens + 1] + [1] * (backend.draft_tokens - 1):
        n = rows * tokens
        hit = expected_experts(config, n) / backend.ep
        weight_bytes += layer.always + hit * layer.expert + head.nbytes
        weight_bytes += n * embedding_row_bytes(model)
        cache_bytes += (rows * context + n) * per_token
        flops += 2.0 * n * (layer.elements + chosen) + 2.0 * rows * head.shape.numel()
        flops += n * (context + (tokens + 1) / 2) * attention.flops(shape)
    return Work(weight_bytes, cache_bytes, flops)


def draft_model_work(
    config: Config, backend: Backend, drafts: int, rows: int, context: float
) -> Work:
    """A turn's `drafts`, by a model of its own: a pass over two tokens a row, then over one."""
    hit, one = (expected_experts(config, n * rows) for n in (2, 1))
    work = step_work(config, backend, rows, 2, context, hit, verify=True)
    head = model_of(config, backend, False).lm_head.matrix.shape.numel()
    work -= Work(0.0, 0.0, 2.0 * rows * head)  # only the second token needs logits
    for _ in range(drafts - 1):
        work += step_work(config, backend, rows, 1, context, one)
    return work
