"""The page to read first: R1 is a stack of blocks, and a block is attention and a feed-forward.

No switch is read here. A switch acts through an object in a slot (`attend`, `dispatch`, the sums),
through a matrix object that holds a weight (r1/storage), or the code that calls the model (r1/run).

Shapes: B rows, S tokens of a row, D hidden_size, R rope dim, W vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from r1.model.cache import LayerCache
from r1.model.config import AttentionShape, Config, GroupedShape
from r1.model.gqa import GQA
from r1.model.layers import MLP, Embedding, Linear, RMSNorm
from r1.model.mla import MLA
from r1.model.moe import MoE
from r1.model.rope import angles, frequencies
from r1.model.step import Step, bias_of, visible

ATTENTION: dict[type, type[MLA] | type[GQA]] = {AttentionShape: MLA, GroupedShape: GQA}
"""The attention that a config's shape describes."""


class Block(nn.Module):
    """One decoder layer: each half is a norm, a layer, and a sum with its input."""

    sum_heads: Callable[[Tensor], Tensor] = staticmethod(lambda y: y)  # devices may share a layer,
    sum_inner: Callable[[Tensor], Tensor] = staticmethod(lambda y: y)  # and add up: r1/placement
    leads_heads: bool = True  # of these devices one leads: where all else is added up as well, it
    leads_inner: bool = True  # adds the block's input (kernels/block.py)

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn: Any = ATTENTION[type(config.attention)](config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.sparse = config.is_moe(layer)
        sizes = config.hidden_size, config.intermediate_size
        self.mlp = MoE(config) if self.sparse else MLP(*sizes)

    def forward(self, x: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.sum_heads(self.self_attn(self.input_layernorm(x), step, cache))  # (B, S, D)
        h = self.post_attention_layernorm(x)  # (B, S, D)
        multiply = step.multiply
        y = self.mlp(h, step.phase, multiply) if self.sparse else self.mlp(h, multiply)  # (B, S, D)
        return x + self.sum_inner(y)


class Transformer(nn.Module):
    """R1's decoder. Weights carry the checkpoint's names, without its leading `model.`."""

    # Layers may be spread over devices, which hand hidden states on: r1/placement/stages.py
    receive: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)
    send: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)
    first_layer = 0  # the checkpoint's number of layers[0]

    frequency: Tensor  # fp32 (R/2,): the angle of one position for each rotated pair, see rope.py

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.matrix = self.embed_tokens.matrix
        self.mtp = nn.ModuleList()  # build.py adds the layers of mtp.py on request
        yarn = config.attention.yarn
        self.table_factor = yarn.table_factor if yarn else 1.0

    def derive(self) -> None:
        """Compute `frequency`, which the checkpoint does not hold, on the device of the weights."""
        frequency = frequencies(self.config.attention).to(self.norm.weight.device)
        self.register_buffer("frequency", frequency, persistent=False)

    def step(self, phase: str, positions: Tensor, keys: int) -> Step:
        """Prepare a call for tokens at int64 `positions` (B, S).

        keys > 0: each token sees the cache's slots from 0 to its own, of the first `keys` slots.
        keys = 0: the tokens are the first of their rows. Each sees itself and the earlier ones.
        """
        interleave = self.config.attention.rope_interleave
        cos, sin = angles(positions, self.frequency, self.table_factor, interleave)
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        step = Step(phase, positions, cos, sin, rows, starts_rows=keys == 0)
        # All layers have the same strategy, so the first one tells what they need.
        needs = cast(Block, self.layers[0]).self_attn.attend[phase].needs
        if keys and needs:
            mask = visible(positions, keys)  # (B, 1, S, keys)
            step.mask = mask if needs == "mask" else None
            step.bias = bias_of(mask) if needs == "bias" else None
        return step

    def forward(
        self, tokens: Tensor, step: Step, cache: Sequence[LayerCache] | None = None,
        blocks: Sequence[Callable[..., Tensor]] | None = None, normed: bool = True,
    ) -> Tensor:  # fmt: skip
        """int64 (B, S) -> normed hidden states (B, S, D); `lm_head` makes logits (B, S, W) of them.

        `cache` has one entry for each layer. Unless the step starts its rows, it has as many slots
        as the step has keys. `blocks` stand in for `layers`: the same ones compiled, or fused ones.
        Without `normed` the last norm is left out: the output head has it.
        """
        x = self.receive(self.embed_tokens(tokens))  # (B, S, D)
        calls: Sequence[Callable[..., Tensor]] = blocks or list(self.layers)
        for layer, block in enumerate(calls):
            x = block(x, step, cache[layer] if cache is not None else None)  # (B, S, D)
        x = self.send(x)
        return self.norm(x) if normed else x
