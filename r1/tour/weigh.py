"""The bytes that a decode step reads, part by part.

They are counted as r1/roofline.py counts them: weights as they are stored, each read once.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import cast

from r1 import roofline
from r1.build import sketch
from r1.device import DTYPES
from r1.model.cache import bytes_per_token
from r1.model.config import Config
from r1.model.moe import MoE
from r1.model.transformer import Block
from r1.roofline import weights_of
from r1.switches.backend import Backend
from r1.switches.strategies import attention_of

LATENT, FULL = "absorbed", "naive"
"""The strategies that keep the latent, and full keys and values.

Grouped-query attention has no latent. Its strategies keep the keys and values of its U heads."""


def kinds(config: Config) -> list[str]:
    """Those of LATENT and FULL that a model has, the one that keeps less first."""
    return [name for name in (LATENT, FULL) if name in attention_of(config.attention)]


def entry_numbers(config: Config, attention: str) -> int:
    """Numbers that one token leaves in the cache of one layer."""
    entry = attention_of(config.attention)[attention].entry(config.attention)
    return sum(math.prod(shape) for shape in entry)


def cache_bytes(config: Config, attention: str, dtype: str) -> int:
    """Bytes that one token occupies in the cache of all layers."""
    entry = attention_of(config.attention)[attention].entry(config.attention)
    return bytes_per_token(entry, DTYPES[dtype], config.num_hidden_layers)


def held(config: Config, attention: str, dtype: str) -> tuple[float | None, ...]:
    """What a cache holds under a strategy: numbers of a token and layer, bytes of a token, and
    megabytes of a full context. None where the model has no such strategy.
    """
    if attention not in kinds(config):
        return (None, None, None)
    token = cache_bytes(config, attention, dtype)
    return entry_numbers(config, attention), token, token * config.max_position_embeddings / 1e6


def step_bytes(config: Config, dtype: str, context: int, rows: int = 1) -> dict[str, int]:
    """Bytes that a decode step of `rows` rows reads, by part, after `context` tokens in each.

    Several rows are taken to choose their experts uniformly.
    """
    model = sketch(config, Backend(dtype=dtype, join="off", quant="none"))
    hit = roofline.expected_experts(config, rows)
    parts = Counter[str]()
    for layer in model.layers:
        block = cast(Block, layer)
        parts["attention"] += weights_of(block.self_attn).always
        if isinstance(block.mlp, MoE):
            parts["chosen experts"] += round(hit * weights_of(block.mlp.experts).expert)
            parts["routers"] += weights_of(block.mlp.gate).always
            if block.mlp.shared_experts is not None:
                parts["shared experts"] += weights_of(block.mlp.shared_experts).always
        else:
            parts["dense feed-forwards"] += weights_of(block.mlp).always
    parts["output head"] = model.lm_head.matrix.nbytes
    parts["embedding"] = rows * int(roofline.embedding_row_bytes(model))
    parts["cache"] = rows * context * cache_bytes(config, kinds(config)[0], dtype)
    return dict(parts)
