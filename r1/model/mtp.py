"""Multi-token prediction (V3 paper, section 2.2): one more layer, which predicts one token further.

From the model's hidden state at position i and the token at i + 1 it predicts the token at i + 2.
The embedding and the output head are the main model's: a checkpoint's copies of them are not read.

Shapes: B rows, S tokens of a row, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from r1.model.cache import LayerCache
from r1.model.config import Config
from r1.model.layers import Linear, RMSNorm
from r1.model.step import Step
from r1.model.transformer import Block


class SharedHead(nn.Module):
    """The checkpoint's name for the norm in front of the output head, which is the model's."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(nn.Module):
    """The checkpoint's layer `num_hidden_layers`; its decoder block is like any other."""

    def __init__(self, config: Config, depth: int = 0) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
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
        """Embeddings of the tokens at i + 1, hidden states at i, (B, S, D) each -> (B, S, D).

        The result is normed: the model's `lm_head` makes logits for i + 2 of it, and another pass
        takes it as `hidden`. `block` is the layer's own block as the caller wants it run. In the
        checkpoint's weights the embedding comes first; the paper's equation 21 says the opposite.
        """
        x = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1))
        return self.shared_head.norm((block or self.block)(x, step, cache))
