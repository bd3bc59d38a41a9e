"""Multi-token prediction (V3 paper, section 2.2): an extra layer predicts one more token.

From the model's hidden state at position i and the token at i + 1 it predicts the token at i + 2.
The embedding and the output head are the main model's; the checkpoint's copies are not loaded.
speculate.py in r1/run uses the prediction as a draft, which the main model then checks.

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
    """The norm before the main model's output head; the class gives it the checkpoint's name."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(nn.Module):
    """The checkpoint's layer number `num_hidden_layers + depth`. Its block is like any other."""

    def __init__(self, config: Config, depth: int = 0) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = Block(config, config.num_hidden_layers + depth)
        self.shared_head = SharedHead(config)

    def forward(
        self, embedding: Tensor, hidden: Tensor, step: Step, cache: LayerCache | None = None,
        block: Callable[..., Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Embeddings of the tokens at i + 1, hidden states at i, (B, S, D) each -> (B, S, D).

        `hidden` and the result are normed. The model's `lm_head` makes logits for i + 2 of the
        result, and another pass may take it as `hidden`. `block` stands in for `self.block`:
        compiled, or fused. The embedding comes first, though second in the paper's equation 21.
        """
        # (B, S, 2 D) -> (B, S, D)
        x = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1))
        return self.shared_head.norm((block or self.block)(x, step, cache))
