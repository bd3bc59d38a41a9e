"""Multi-token prediction (V3 paper, section 2.2): one more layer that, from the model's hidden
state at position i and the token at i + 1, predicts the token at i + 2.

The embedding and the output head are the main model's own: the copies that a checkpoint carries are
not read.

Shapes: B batch, S sequence, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from r1.model.cache import LayerCache
from r1.model.config import Config
from r1.model.layers import RMSNorm
from r1.model.transformer import Block, Step


class SharedHead(nn.Module):
    """The checkpoint's name for the norm in front of the output head that the MTP layer shares with
    the model."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(nn.Module):
    """The checkpoint's layer `num_hidden_layers`; its decoder block has the parameters of any
    other."""

    def __init__(self, config: Config, depth: int = 0) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, config.num_hidden_layers + depth)
        self.shared_head = SharedHead(config)

    def forward(
        self,
        embedding: Tensor,
        hidden: Tensor,
        step: Step,
        cache: LayerCache | None = None,
        block: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Embeddings of the tokens at i + 1 and the model's final hidden states at i, (B, S, D)
        each -> (B, S, D).

        The result is normed: the model's `lm_head` makes logits for i + 2 of it, and another pass
        takes it as `hidden`. `block` is the layer's own as the runner wants it called. The
        embedding stands first, in the checkpoint's weights; the paper's equation 21 writes it the
        other way round."""
        x = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1))
        return self.shared_head.norm((block or self.block)(x, step, cache))
