"""Mistral 4's queries grow with their positions, so that attention stays sharp in long contexts.

The query at position p is multiplied by `1 + beta ln(1 + floor(p / original))`, where `original` is
the length of the first training (YaRN's `original_max_position_embeddings`). Within it the factor
is 1. The rule is Llama 4's attention temperature (Hugging Face's config.json calls beta
`llama_4_scaling_beta`).

Shapes: B rows, S tokens of a row, H heads, P nope dim, R rope dim, V value dim, C latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.model.attend import Attend, UpProjection
from r1.model.cache import Entry, LayerCache
from r1.model.config import AttentionShape, Yarn
from r1.model.step import Step


def query_factor(positions: Tensor, yarn: Yarn) -> Tensor:
    """int64 positions (B, S) -> fp32 factors of their queries (B, S, 1, 1)."""
    lengths = torch.div(
        positions, yarn.original_max_position_embeddings, rounding_mode="floor"
    )  # how often the first training's length fits before the token
    return (1 + yarn.llama_4_scaling_beta * (1 + lengths).log())[..., None, None]


class Tempered(Attend):
    """Another strategy, which gets the queries multiplied by their factors."""

    def __init__(self, inner: Attend, yarn: Yarn) -> None:
        self.inner, self.yarn = inner, yarn
        self.name, self.phases = inner.name, inner.phases
        self.needs, self.keeps = inner.needs, inner.keeps

    def prepare(self) -> None:
        self.inner.prepare()

    def entry(self, shape: AttentionShape) -> Entry:
        return self.inner.entry(shape)

    def flops(self, shape: AttentionShape) -> float:
        return self.inner.flops(shape)

    def __call__(
        self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, up: UpProjection,
        scale: float, step: Step, cache: LayerCache | None,
    ) -> Tensor:  # fmt: skip
        factor = query_factor(step.positions, self.yarn).to(q_nope.dtype)  # (B, S, 1, 1)
        # (B, S, H, P), (B, S, H, R)
        q_nope, q_pe = q_nope * factor, q_pe * factor.to(q_pe.dtype)
        return self.inner(q_nope, q_pe, c_kv, k_pe, up, scale, step, cache)


def tempered(strategy: Attend, shape: AttentionShape) -> Attend:
    """The strategy as models of this shape need it: itself, or with their queries' factors."""
    yarn = shape.yarn
    return Tempered(strategy, yarn) if yarn and yarn.llama_4_scaling_beta else strategy
