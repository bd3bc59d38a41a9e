"""The one place where tests make small models: their configs, their weights, and what runs them.

Each maker of weights serves another purpose:

| maker | weights | for |
|---|---|---|
| `model` | sharp attention, a gate bias of all 24 bits, norms that aren't 1 | files, kernels |
| `unit_gain` | every layer matters, values are of order 1 | properties, kernels |
| `sharp_logits` | random weights times 3, no near ties of experts | pairs of switches, graphs |
| `drafting_engine` | an MTP layer that is often right | speculation |
| `drafted_engine` | a small model that is the large one with noise | speculation |

tests/cases.py loads the reference cases, whose weights are files.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from r1 import Backend, Config, build
from r1.files.names import places
from r1.model.config import ExpertShape, GroupedShape, Llama3, Yarn
from r1.model.router import Router
from r1.model.shapes import R1, SHAPES, shape
from r1.model.transformer import Transformer
from r1.run.draft_model import Draft
from r1.run.engine import Engine
from r1.run.runner import Runner
from r1.switches.draft import resolve_draft
from r1.switches.resolve import resolve

# ---------------------------- configs
V3 = R1.change(
    vocab_size=48,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=20,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=12,
    intermediate_size=40,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    max_position_embeddings=64,
    yarn=Yarn(40.0, 8, mscale=1.0, mscale_all_dim=1.0),
    fp8_block=None,
)
"""R1's arithmetic, with an MTP layer, in bf16."""

FP8 = V3.change(fp8_block=(16, 16))
"""The same stored in FP8, with ragged blocks at every edge."""

WITH_TEXT = FP8.change(vocab_size=300)
"""The same with a vocabulary as large as make_tokenizer.py's."""

V2 = V3.change(
    model_type="deepseek_v2",
    topk_method="group_limited_greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=3.0,
    num_nextn_predict_layers=0,
    yarn=Yarn(40.0, 8, mscale=0.707, mscale_all_dim=0.707),
)

ROOMY = V3.change(max_position_embeddings=400)
"""Room for long answers."""

FIVE_WORDS = dataclasses.replace(ROOMY, vocab_size=5)
"""So few words that the probability of every continuation can be computed."""

VARIANTS = {
    "v3": V3,
    "v2": V2,
    "moonlight": V3.change(q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2),
    "unshared": V3.change(n_shared_experts=0),
    "glm": V3.change(num_attention_heads=3, v_head_dim=20, n_group=1, topk_group=1, yarn=None),
    "youtu": V3.change(
        experts=ExpertShape(), tie_word_embeddings=True, yarn=None, num_nextn_predict_layers=0
    ),
}
"""What differs between the published models, small."""

TINY = shape("tiny")
"""The shape of the embedded checkpoint."""

assert SHAPES["tiny"].files.fp8_block, "tiny-r1 is FP8; these are smaller still"

YARNS = [
    None,
    Yarn(40.0, 8, mscale=1.0, mscale_all_dim=1.0),
    Yarn(4.0, 8, mscale=0.7, mscale_all_dim=1.0),
]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Small shapes with everything odd that may be odd; widths that grouped_mm needs to be
    multiples of 4 are.
    """
    groups = draw(st.sampled_from([1, 2, 4]))
    kept = draw(st.integers(1, groups))
    experts = groups * draw(st.integers(2, 4))
    v3 = draw(st.booleans())
    method = "noaux_tc" if v3 else draw(st.sampled_from(["greedy", "group_limited_greedy"]))
    return TINY.change(
        model_type="deepseek_v3" if v3 else "deepseek_v2",
        topk_method=method,
        scoring_func="sigmoid" if v3 else "softmax",
        norm_topk_prob=draw(st.booleans()),
        vocab_size=31,
        hidden_size=draw(st.sampled_from([20, 24])),
        num_hidden_layers=2,
        first_k_dense_replace=draw(st.integers(0, 1)),
        num_attention_heads=draw(st.integers(1, 3)),
        q_lora_rank=draw(st.sampled_from([None, 9])),
        kv_lora_rank=draw(st.integers(5, 12)),
        qk_nope_head_dim=draw(st.integers(3, 9)),
        qk_rope_head_dim=2 * draw(st.integers(1, 4)),
        v_head_dim=draw(st.integers(3, 9)),
        intermediate_size=17,
        moe_intermediate_size=8,
        n_routed_experts=experts,
        n_shared_experts=draw(st.integers(0, 2)),
        num_experts_per_tok=draw(st.integers(1, min(4, experts // groups * kept))),
        n_group=groups,
        topk_group=kept,
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        max_position_embeddings=400,
        yarn=draw(st.sampled_from(YARNS)),
        num_nextn_predict_layers=0,
        fp8_block=None,
        tie_word_embeddings=draw(st.booleans()),
    )


TINY_GROUPED = Config(
    model_type="qwen3",
    vocab_size=320,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    max_position_embeddings=400,
    rms_norm_eps=1e-6,
    attention=GroupedShape(6, 2, 16, 1000.0, yarn=Yarn(4.0, 16), qk_norm=True),
)
"""Grouped-query attention with norms and YaRN, as R1-0528-Qwen3-8B's."""

TINY_QWEN2 = TINY_GROUPED.change(
    model_type="qwen2", yarn=None, qk_norm=False, attention_bias=True, tie_word_embeddings=True
)
TINY_LLAMA = TINY_GROUPED.change(
    model_type="llama", yarn=None, qk_norm=False, llama3=Llama3(8.0, 32)
)


@st.composite
def grouped_configs(draw: st.DrawFn) -> Config:
    """The same with grouped-query attention: every family, group and scaling."""
    heads = draw(st.integers(1, 3))
    base = draw(st.sampled_from([TINY_GROUPED, TINY_QWEN2, TINY_LLAMA]))
    return base.change(
        vocab_size=31,
        hidden_size=draw(st.sampled_from([20, 24])),
        num_hidden_layers=2,
        intermediate_size=17,
        num_attention_heads=heads * draw(st.integers(1, 3)),
        num_key_value_heads=heads,
        head_dim=2 * draw(st.integers(1, 6)),
        tie_word_embeddings=draw(st.booleans()),
    )


# ---------------------------- weights
def model(
    config: Config, *, seed: int = 0, dtype: str = "bf16", mtp: bool = False, **switches: Any
) -> Transformer:
    """Random weights that hide no mistake: sharp attention, a gate bias of all 24 bits, norms that
    aren't 1. On the CPU, unless `switches` name another device.
    """
    asked = Backend(**{"device": "cpu", "dtype": dtype, **switches})
    made = build.from_shape(config, resolve(asked, config), seed=seed, mtp=mtp)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, weight in places(made).items():
        mean, deviation = 1.0, 0.3
        if weight.dim() > 1:
            mean, deviation = 0.0, 0.2
        elif name.endswith("bias"):
            mean = 0.0
        values = torch.randn(weight.shape, generator=generator) * deviation + mean
        # The gate's weight is fp32 in memory only: what is written in `dtype` comes back the same
        # if it had no more bits.
        weight.copy_(values if name.endswith("bias") else values.to(made.norm.weight.dtype))
    return made


def unit_gain(
    config: Config, seed: int = 0, dtype: str = "fp32", device: str = "cpu"
) -> Transformer:
    """A model of unit gain, with the plainest strategies in its slots.

    Weights have a standard deviation of fan_in^-0.5, and half of it where they add to the stream,
    as at the start of a training. So every layer matters, and values are of order 1.
    """
    plain = Backend(device, dtype, attention="naive", **loop_over_experts(config))
    backend = resolve(plain, config)
    made = build.allocate(config, backend, mtp=False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in places(made).items():
        noise = torch.randn(p.shape, generator=generator)
        if "embed_tokens" in name:
            noise *= config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0
        elif p.dim() == 1:
            noise = 0.2 * noise + (0.0 if name.endswith("bias") else 1.0)
        else:
            to_stream = "o_proj" in name or "down_proj" in name
            noise *= p.shape[-1] ** -0.5 * (0.5 if to_stream else 1.0)
        p.copy_(noise)
    return build.finish(made, backend)


def gate_of(config: Config, seed: int) -> Router:
    """The router of a `unit_gain` model's first layer, which is sparse here."""
    made = unit_gain(config.change(first_k_dense_replace=0), seed)
    return next(module for module in made.modules() if isinstance(module, Router))


def loop_over_experts(config: Config) -> dict[str, Any]:
    """The plainest strategy of the experts, of a model that has some."""
    return {"moe": "loop", "prefill_moe": "loop"} if config.experts.n_routed_experts else {}


def for_experts(config: Config, switches: dict[str, Any]) -> dict[str, Any]:
    """The switches, without those of experts where a model has none: they are refused to it."""
    absent = () if config.experts.n_routed_experts else ("moe", "prefill_moe")
    return {name: value for name, value in switches.items() if name not in absent}


# ---------------------------- runners
def runner(made: Transformer, chunk: int = 2048, dtype: str = "fp32", **switches: Any) -> Runner:
    """Runs `made` on the CPU; by default through the loop over experts, if it has some.

    The model's slots are refilled: use one runner of a model at a time.
    """
    asked = for_experts(made.config, {**loop_over_experts(made.config), **switches})
    backend = resolve(Backend(device="cpu", dtype=dtype, **asked), made.config)
    return Runner(build.finish(made, backend), backend, prefill_chunk=chunk)


def unresolved_runner(made: Transformer, dtype: str, device: str, **switches: Any) -> Runner:
    """Runs `made` with switches that `resolve` would refuse: on a CPU, Triton's interpreter."""
    resolved = resolve(Backend(device=device, dtype=dtype), made.config)
    backend = dataclasses.replace(resolved, **switches)
    return Runner(build.finish(made, backend), backend)


def with_switches(plain: Runner, chunk: int | None = None, **switches: Any) -> Runner:
    """The model of another runner with switches that `resolve` would refuse: on a CPU, graphs."""
    return Runner(plain.model, dataclasses.replace(plain.backend, **switches), chunk)


def sharp_logits(batch: int = 3, config: Config = TINY, **switches: Any) -> Runner:
    """`config` with always the same weights, as these switches run it; on a GPU where there is one.

    Raises InputError where the switches can't be had.
    """
    backend = resolve(Backend(**{"dtype": "fp32", **switches}), config, batch=batch)
    made = build.from_shape(config, backend)
    generator = torch.Generator().manual_seed(0)
    mtp = f"model.layers.{config.num_hidden_layers}."
    for name, weight in places(made).items():
        if weight.dim() > 1 and not name.startswith(mtp):
            weight.mul_(3)  # calm random weights hide everything in flat logits
        elif name.endswith("e_score_correction_bias"):
            # No rounding flips an expert: a flip moves logits by more than all rounding does.
            weight.copy_(torch.randperm(len(weight), generator=generator) * 2.0)
    return Runner(made, backend)


def drafting_engine(
    config: Config,
    seed: int,
    k: int = 0,
    stops: tuple[int, ...] = (),
    blocks: float = 0.3,
    **switches: Any,
) -> Engine:
    """Random weights whose MTP layer is often right, though not always. On the CPU, unless
    `switches` name another device.

    They are the same for each number of drafts `k` (0: no speculation). The blocks add little
    (`blocks`) to what the token itself says, in the model and in the MTP layer, whose eh_proj hands
    the embedding on and adds some of the hidden state.
    """
    asked: dict[str, Any] = {"device": "cpu", "dtype": "fp32", **switches}
    asked |= {"speculate": "mtp", "draft_tokens": k} if k else {}
    made = model(config, seed=seed, mtp=True, **asked)
    for name, weight in places(made).items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(blocks)
    # Of about 1 each, as the norms leave the drafter's.
    made.embed_tokens.matrix.dense().mul_(5)
    drafter: Any = made.mtp[0]
    both = drafter.eh_proj.matrix.dense().mul_(0.3)  # (D, 2 D): of the embedding and the state
    both[:, : config.hidden_size] = torch.eye(config.hidden_size)
    drafter.enorm.weight.fill_(1.0)
    drafter.shared_head.norm.weight.copy_(made.norm.weight)
    return Engine(made, resolve(Backend(**asked), config), None, frozenset(stops))


def drafted_engine(
    config: Config,
    seed: int,
    k: int = 0,
    stops: tuple[int, ...] = (),
    draft: Config | None = None,
    noise: float = 0.0,
    ids: frozenset[int] | None = None,
    **switches: Any,
) -> Engine:
    """Random weights on the CPU, and a model of the config `draft` that drafts for them.

    The draft has the model's own weights with some `noise`, relative to them, wherever its names
    and shapes are the same; of embedding and head, the rows that both have. The rest is random.
    None: `config`. `k`: as in drafting_engine. `ids`: see Draft.
    """
    switches = {"dtype": "fp32", **switches}
    drafts: dict[str, Any] = {"speculate": "draft", "draft_tokens": k} if k else {}
    asked = Backend(device="cpu", **switches, **drafts)
    made = model(config, seed=seed, **switches)
    engine = (made, resolve(asked, config), None, frozenset(stops))
    if not k:
        return Engine(*engine)
    own = resolve_draft(asked, draft or config)
    small = model(draft or config, seed=seed + 100, **switches)
    generator, theirs = torch.Generator().manual_seed(seed), places(made)
    for name, weight in places(small).items():
        other = theirs.get(name)
        if other is not None and other.shape[1:] == weight.shape[1:]:
            rows = min(len(weight), len(other))
            random = torch.randn(weight[:rows].shape, generator=generator)
            weight[:rows] = other[:rows] * (1 + noise * random)
    return Engine(*engine, draft=Draft(build.finish(small, own), own, ids))


def random_tokens(seed: int, rows: int, length: int, vocab: int = 31) -> Tensor:
    """Token ids (rows, length), int64."""
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
