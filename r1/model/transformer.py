"""The page to read first: a block is attention and a feed-forward, each behind a norm; the model is
a stack of them.

No switch is read here. What differs between configurations of the *machine* stands in slots
(mla.py's `attend`, moe.py's `dispatch`), in swapped modules, or around the call (runner.py).

Shapes: B batch, S sequence, T keys, D hidden_size, R rope, W vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from r1.model.cache import LayerCache
from r1.model.config import Config
from r1.model.layers import MLP, RMSNorm
from r1.model.mla import MLA
from r1.model.moe import MoE
from r1.model.rope import angles, frequencies


@dataclass
class Step:
    """What every layer of one call needs to know of it, computed once."""

    phase: str
    """"prefill" or "decode": which of the two strategies in each slot runs."""
    positions: Tensor
    """int64 (B, S): where the step's tokens stand in their rows."""
    cos: Tensor
    sin: Tensor
    """fp32 (B, S, 1, R): the rotation of each position, as rope.py makes it."""
    mask: Tensor | None
    """bool (B, 1, S, T): which keys a query sees; None: the keys are the step's own tokens, seen
    causally."""
    bias: Tensor | None
    """The same as fp32 numbers to add to the scores: 0 where it sees, -inf where not."""
    rows: Tensor
    """int64 (B, 1): each row's number, which with `positions` addresses the cache."""

    def remember(self, cache: LayerCache, *new: Tensor) -> tuple[Tensor, ...]:
        """Write each `new` (B, S, ...) to its buffer (B, T, ...), and return what to attend to."""
        for buffer, tensor in zip(cache, new, strict=True):
            buffer.index_put_((self.rows, self.positions), tensor.to(buffer.dtype))
        return new if self.mask is None else cache


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sparse = config.is_moe(layer)
        self.mlp = MoE(config) if self.sparse else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.self_attn(self.input_layernorm(x), step, cache)
        h = self.post_attention_layernorm(x)
        return x + (self.mlp(h, step.phase) if self.sparse else self.mlp(h))


class Transformer(nn.Module):
    """R1's decoder. Parameters carry the checkpoint's names, without its leading `model.`."""

    frequency: Tensor
    """fp32 (R/2,): derived from the config by `derive`, not part of the checkpoint."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.mtp = nn.ModuleList()  # build.py adds the MTP layers where they are wanted
        self.table_factor = config.attention.yarn.table_factor if config.attention.yarn else 1.0

    def derive(self) -> None:
        """Compute what the checkpoint doesn't hold, where the weights are."""
        self.register_buffer(
            "frequency", frequencies(self.config).to(self.norm.weight.device), persistent=False
        )

    def step(self, phase: str, positions: Tensor, keys: int) -> Step:
        """Prepare a call for tokens at `positions` (B, S), which see the first `keys` slots of the
        cache, up to themselves.

        `keys=0` says that nothing lies before these tokens: they start their rows, and see but one
        another."""
        cos, sin = angles(positions, self.frequency, self.table_factor)
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        if not keys:
            return Step(phase, positions, cos, sin, None, None, rows)
        slots = torch.arange(keys, device=positions.device)  # (T,)
        mask = (slots <= positions[..., None])[:, None]  # (B, 1, S, T)
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
        return Step(phase, positions, cos, sin, mask, bias, rows)

    def forward(
        self,
        tokens: Tensor,
        step: Step,
        cache: Sequence[LayerCache] | None = None,
        blocks: Sequence[Callable[..., Tensor]] | None = None,
    ) -> Tensor:
        """int64 (B, S) -> the final hidden states (B, S, D), normed; `lm_head` makes logits of
        those that are wanted.

        `cache` has as many slots as the step's mask has keys. `blocks` are the layers as the runner
        wants them called."""
        x = self.embed_tokens(tokens)
        calls: Sequence[Callable[..., Tensor]] = blocks or list(self.layers)
        for layer, block in enumerate(calls):
            x = block(x, step, cache[layer] if cache is not None else None)
        return self.norm(x)
