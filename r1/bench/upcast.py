"""The reference for models whose fp32 weights would not fit: bf16 storage, every product in fp32.

A bf16 number is an fp32 number, so the results are those of fp32 weights; one matrix at a time is
widened."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from r1.model.transformer import Transformer


class UpcastLinear(nn.Module):
    """A Linear without bias whose weight is widened at each call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float())


class UpcastEmbedding(nn.Module):
    """An embedding whose rows come out in fp32."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).float()


def upcast(model: Transformer) -> None:
    """Swap every Linear and the embedding; the experts' `loop`, the norms and the router follow
    their input's dtype."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, UpcastLinear(child))
            elif isinstance(child, nn.Embedding):
                setattr(module, name, UpcastEmbedding(child))
