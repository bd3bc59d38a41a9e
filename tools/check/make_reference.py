"""Make tests/reference: outputs of transformers' models, to compare r1's with.

These are DeepseekV3, DeepseekV2 and their sisters, and Qwen2, Llama and Qwen3 for R1's distilled
models.

    # write every case, or one
    python tools/check/make_reference.py
    python tools/check/make_reference.py --only v3-odd
    # make every case again and compare it with the stored one; exit status 1 if one differs
    python tools/check/make_reference.py --check

The models are tiny and random. They run in fp32, eager, on the CPU. Only this tool needs
transformers; the tests need only the files. A case is a folder:

    config.json             as published repositories spell it, or (cases *-hf5) as
                            transformers 5 writes it
    model.safetensors       fp32 weights under the published names, one tensor per expert
    reference.safetensors   tokens (B, S), logits (B, S, W), final_norm (B, S, D), and for
                            each layer i:
                            attn.{i}, mlp.{i}   (B, S, D) outputs of self_attn and mlp
                            hidden.{i}          (B, S, D) the layer's output, no final norm
                            router_indices.{i}  (B, S, K) ascending, MoE layers only
                            router_weights.{i}  (B, S, K) in the same order

(A sister's config.json is spelled as its publisher's, and Mistral4's experts lie in stacks.)

A reference proves nothing if a wrong formula gives it too. So each case asserts that no routing
decision is a near tie, that attention is far from uniform, and that each known mistake would change
the result: `check_routing`, `check_attention`, `check_rope`. If one fails, change the case's seed
or sizes, not the assertion.

transformers 5.24 departs from DeepSeek's own code. The cases keep to where both agree:

- DeepseekV2's gate ignores norm_topk_prob. Case v2-norm normalizes by a hook: `normalize_v2_gate`.
  DeepSeek's V2 file then skips routed_scaling_factor, and its VL2 file applies it. With factor 1
  they agree.
- DeepseekV3's gate also normalizes the weight of a single expert. DeepSeek's does so only for
  K > 1. Here K > 1.
- If only one of mscale and mscale_all_dim is given, transformers has another factor on cos and sin.
  Here both are given.
- transformers does not read moe_layer_freq, scoring_func and (V3) topk_method. Here they have the
  values that it implements.
- DeepSeek's VL2 file masks the excluded groups with 0, transformers with -inf. They differ where
  biased scores are negative. Case v3-negative takes -inf as right.

- Mistral4 scores a group of experts by its two best, though it has no bias. Its models have one
  group; so have the cases.
- DeepseekV32 has an indexer, which chooses all keys of so few tokens as the case has.

Qwen3 with YaRN: R1-0528-Qwen3-8B's config.json has an `attn_factor`, which transformers does not
read. Case qwen3-yarn has one too, and takes transformers' reading as right.

Both agree on a surprising point: the norms of the latents (q_a, kv_a) have eps 1e-6, whatever
rms_norm_eps is (see v3-odd).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from r1 import InputError

OUTPUT = shared.ROOT / "tests" / "reference"
SIZE_LIMIT = 3_400_000
"""Bytes of all cases together, because they are committed."""
MARGIN = 1e-4
"""The least distance between the last chosen score and the first rejected one."""
TOLERANCE = 1e-4
"""For --check. Other CPUs sum in another order; a wrong formula is off by 1e-2 and more."""
FILES = ("config.json", "model.safetensors", "reference.safetensors")

YARN = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
YARN_V2 = dict(YARN, mscale=0.707, mscale_all_dim=0.707)


@dataclass(frozen=True)
class Case:
    name: str
    family: str  # a key of FAMILY
    seed: int
    config: dict[str, Any] = field(default_factory=dict)  # changes to a base and FAMILY
    batch: int = 2
    length: int = 20
    bias: tuple[float, float] = (0.0, 0.3)  # mean and deviation of e_score_correction_bias
    hf5: bool = False  # config.json spelled by transformers 5's save_pretrained

    @property
    def biased(self) -> bool:
        """Whether the router's scores are sigmoids, with a bias for the choice."""
        return self.family not in ("v2", "mistral4")


# As in DeepSeek's config.json, but tiny. num_nextn_predict_layers is 0: these checkpoints hold no
# MTP layer.
BASE: dict[str, Any] = dict(
    attention_bias=False, attention_dropout=0.0, aux_loss_alpha=0.001, bos_token_id=0,
    eos_token_id=1, first_k_dense_replace=1, hidden_act="silu", hidden_size=26,
    initializer_range=0.02, intermediate_size=36, kv_lora_rank=16, max_position_embeddings=128,
    moe_intermediate_size=7, moe_layer_freq=1, n_group=1, n_routed_experts=8, n_shared_experts=1,
    norm_topk_prob=True, num_attention_heads=2, num_experts_per_tok=3, num_hidden_layers=2,
    num_key_value_heads=2, pretraining_tp=1, q_lora_rank=14, qk_nope_head_dim=12,
    qk_rope_head_dim=8, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=10000,
    routed_scaling_factor=2.5, seq_aux=True, tie_word_embeddings=False, topk_group=1,
    torch_dtype="float32", use_cache=True, v_head_dim=10, vocab_size=40,
)  # fmt: skip
GROUPED_BASE: dict[str, Any] = dict(
    attention_dropout=0.0, bos_token_id=0, eos_token_id=1, hidden_act="silu", hidden_size=24,
    initializer_range=0.02, intermediate_size=28, max_position_embeddings=128,
    num_attention_heads=6, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-6,
    rope_scaling=None, rope_theta=10000, tie_word_embeddings=False, torch_dtype="float32",
    use_cache=True, vocab_size=40, head_dim=10,
)  # fmt: skip
"""For models with grouped-query attention."""
FAMILY: dict[str, dict[str, Any]] = {
    "v3": dict(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3",
        num_nextn_predict_layers=0, scoring_func="sigmoid", topk_method="noaux_tc",
    ),
    "v2": dict(
        architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", norm_topk_prob=False,
        routed_scaling_factor=1.0, scoring_func="softmax", topk_method="greedy",
    ),
    "glm": dict(
        architectures=["Glm4MoeLiteForCausalLM"], model_type="glm4_moe_lite", rms_norm_eps=1e-5,
        num_nextn_predict_layers=0, topk_method="noaux_tc", partial_rotary_factor=1.0,
        rope_theta=1e6, routed_scaling_factor=1.8, eos_token_id=[1, 2, 3],
    ),
    "youtu": dict(
        architectures=["YoutuForCausalLM"], model_type="youtu", tie_word_embeddings=True,
        rope_theta=1.6e6, rope_interleave=True, mlp_bias=False, embedding_initializer_range=0.02,
    ),
    "sarvam": dict(
        architectures=["SarvamMLAForCausalLM"], model_type="sarvam_mla", num_experts=8,
        num_shared_experts=1, q_head_dim=20, head_dim=24, q_lora_rank=None,
    ),
    "mistral4": dict(
        architectures=["Mistral4ForCausalLM"], model_type="mistral4", routed_scaling_factor=1.0,
        first_k_dense_replace=0, rope_interleave=True,
    ),
    "v32": dict(
        architectures=["DeepseekV32ForCausalLM"], model_type="deepseek_v32", index_head_dim=12,
        index_n_heads=3, index_topk=40, num_nextn_predict_layers=0, scoring_func="sigmoid",
        topk_method="noaux_tc",
    ),
    "qwen2": dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=False,
        sliding_window=4, max_window_layers=1,
    ),
    "llama": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False,
        mlp_bias=False, pretraining_tp=1,
    ),
    "qwen3": dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=False,
        use_sliding_window=False, sliding_window=None, max_window_layers=2, head_dim=12,
    ),
}  # fmt: skip
CLASSES = {
    "v3": "DeepseekV3", "v2": "DeepseekV2", "glm": "Glm4MoeLite", "youtu": "Youtu",
    "sarvam": "SarvamMLA", "mistral4": "Mistral4", "v32": "DeepseekV32", "qwen2": "Qwen2",
    "llama": "Llama", "qwen3": "Qwen3",
}  # fmt: skip
"""How transformers' classes of a family are called."""
TRAINING = {"aux_loss_alpha", "moe_layer_freq", "scoring_func", "seq_aux"}
EXPERTS = {
    "moe_intermediate_size", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob",
    "num_experts_per_tok", "routed_scaling_factor", "topk_group", "first_k_dense_replace",
}  # fmt: skip
LACKS: dict[str, set[str]] = {
    "glm": TRAINING,
    "youtu": TRAINING | EXPERTS,
    "sarvam": TRAINING | {"n_routed_experts", "n_shared_experts", "n_group", "topk_group"},
    "mistral4": TRAINING | {"rope_theta", "rope_scaling"},
}
"""Fields of BASE that a family's files do not have."""
GROUPED = ("qwen2", "llama", "qwen3")
"""The families with grouped-query attention. All their layers are dense."""


def yarn(original: int, base: dict[str, Any] = YARN, **changes: Any) -> dict[str, Any]:
    """The two config fields of YaRN. `original` is the length of the first training."""
    scaling = dict(base, original_max_position_embeddings=original)
    scaling.update(changes)
    return dict(rope_scaling=scaling, max_position_embeddings=original * scaling["factor"])


CASES = (
    # Plain: the full query matrix, one group, no dense layer, no YaRN.
    Case("v3-plain", "v3", 4, dict(q_lora_rank=None, first_k_dense_replace=0), bias=(0.0, 0.2)),
    # 3 of 8 groups of 3 experts: the two best of three differ from the best one, and from all.
    Case("v3-groups", "v3", 36, dict(
        n_routed_experts=24, n_group=8, topk_group=3, num_experts_per_tok=4,
        moe_intermediate_size=3), bias=(0.0, 0.1)),
    # Weights not normalized, and yet scaled.
    Case("v3-unnormed", "v3", 1, dict(
        norm_topk_prob=False, n_group=4, topk_group=2, n_shared_experts=2, rope_theta=100),
        bias=(0.0, 0.2)),
    # R1's own YaRN. 72 tokens run past the original 32.
    Case("v3-yarn", "v3", 1, dict(**yarn(32), n_group=4, topk_group=3, qk_rope_head_dim=16),
        batch=1, length=72),
    # The factor on cos/sin is not 1; theta 100 puts a frequency halfway up the ramp.
    Case("v3-mscale", "v3", 1, dict(
        **yarn(32, mscale=1.3, mscale_all_dim=0.6), rope_theta=100, qk_rope_head_dim=12,
        q_lora_rank=None), batch=1, length=44),
    # Nothing is a multiple of anything; and rms_norm_eps is not the latent norms' eps.
    Case("v3-odd", "v3", 1, dict(
        hidden_size=37, intermediate_size=41, moe_intermediate_size=19, kv_lora_rank=23,
        q_lora_rank=17, v_head_dim=11, qk_nope_head_dim=13, qk_rope_head_dim=6,
        num_attention_heads=3, num_key_value_heads=3, n_routed_experts=6, n_group=3, topk_group=2,
        n_shared_experts=2, vocab_size=53, rms_norm_eps=0.01, **yarn(7)), batch=1, length=17),
    # R1's three dense layers first.
    Case("v3-dense3", "v3", 1, dict(
        first_k_dense_replace=3, num_hidden_layers=4, hidden_size=20, intermediate_size=22),
        batch=1, length=24, bias=(0.0, 0.15)),
    # Biased scores below 0: a mask of 0 would choose from the excluded groups.
    Case("v3-negative", "v3", 1, dict(
        n_group=4, topk_group=2, first_k_dense_replace=0, num_hidden_layers=1), bias=(-0.8, 0.3)),
    # The same architecture as transformers 5 spells it: rope_parameters, no scoring_func, no
    # topk_method.
    Case("v3-hf5", "v3", 2, dict(**yarn(16), n_group=2), batch=1, length=36, hf5=True),
    # DeepSeek-V2-Lite: greedy top-k, full query matrix, YaRN with mscale 0.707.
    Case("v2-lite", "v2", 1, dict(**yarn(16, YARN_V2), q_lora_rank=None, n_shared_experts=2),
        batch=1, length=40),
    # DeepSeek-V2: the best expert stands for its group; factor 16, nothing normalized.
    Case("v2-groups", "v2", 2, dict(
        **yarn(16, YARN_V2), topk_method="group_limited_greedy", n_routed_experts=12, n_group=4,
        topk_group=2, n_shared_experts=2, routed_scaling_factor=16.0), batch=1, length=40),
    # Normalized weights: see `normalize_v2_gate`.
    Case("v2-norm", "v2", 1, dict(
        norm_topk_prob=True, first_k_dense_replace=0, num_hidden_layers=1)),
    # As transformers 5 spells it.
    Case("v2-hf5", "v2", 1, dict(
        **yarn(16, YARN_V2), topk_method="group_limited_greedy", n_group=4, topk_group=2,
        routed_scaling_factor=16.0), batch=1, length=32, hf5=True),
    # Biases on q, k and v; a sliding window that is turned off, and shorter than the text.
    Case("qwen2-biases", "qwen2", 1),
    # One head of keys and values for all; the embedding is the output head. As transformers 5
    # spells it.
    Case("qwen2-hf5", "qwen2", 2, dict(num_key_value_heads=1, tie_word_embeddings=True), hf5=True),
    # As many heads of keys and values as of queries, whose size no field states.
    Case("llama-plain", "llama", 1, dict(
        num_key_value_heads=6, head_dim=None, hidden_size=36), batch=1),
    # Llama 3's scaling: 44 tokens run past the original 32, and a frequency is on the ramp.
    Case("llama-scaled", "llama", 1, dict(
        rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=32), rope_theta=100,
        tie_word_embeddings=True, head_dim=16), batch=1, length=44),
    # Norms of each head's query and key.
    Case("qwen3-norms", "qwen3", 1, dict(rope_theta=1000)),
    # R1-0528-Qwen3-8B's YaRN, with the field that transformers does not read.
    Case("qwen3-yarn", "qwen3", 1, dict(
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16,
            attn_factor=0.8782488562869419), rope_theta=100, max_position_embeddings=64,
        head_dim=16), batch=1, length=44),
    # GLM-4.7-Flash: no YaRN, one group, V larger than P.
    Case("glm", "glm", 1, dict(v_head_dim=14), bias=(0.0, 0.2)),
    # As transformers 5 spells it: a list says which layers are dense.
    Case("glm-hf5", "glm", 3, dict(
        num_hidden_layers=3, mlp_layer_types=["dense", "dense", "sparse"]), bias=(0.0, 0.2),
        hf5=True),
    # Youtu-LLM: dense, and the output head is the embedding.
    Case("youtu", "youtu", 1),
    # sarvam-105b, in its own words: deepseek_yarn, num_experts, the latent's size as head_dim.
    Case("sarvam", "sarvam", 1, yarn(16, type="deepseek_yarn"), batch=1, length=40,
         bias=(0.0, 0.2)),
    # Mistral-Small-4: queries grow with their positions, to four times the original 16 and past.
    Case("mistral4", "mistral4", 2, dict(
        n_routed_experts=12, num_experts_per_tok=4, max_position_embeddings=640,
        rope_parameters=dict(
            {key: value for key, value in YARN.items() if key != "type"}, rope_type="yarn",
            rope_theta=10000.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.3,
            max_position_embeddings=640, partial_rotary_factor=0.4)), batch=1, length=72),
    # DeepSeek-V3.2 within its indexer's 40 keys.
    Case("v32", "v32", 1, dict(**yarn(16), n_group=4, topk_group=2), batch=1, length=40,
         bias=(0.0, 0.2)),
)  # fmt: skip


# ----------------------------------------------------------------------------------- the checkpoint
def write_checkpoint(case: Case, folder: Path) -> None:
    """Write config.json and model.safetensors: random weights under save_pretrained's names."""
    lacks = LACKS.get(case.family, set())
    base = GROUPED_BASE if case.family in GROUPED else BASE
    published = {key: value for key, value in base.items() if key not in lacks}
    published |= FAMILY[case.family] | case.config
    if case.hf5:  # a model saved by transformers 5 has no field that its config class doesn't know
        unknown = TRAINING | ({"topk_method"} if case.family == "v3" else set())
        unknown |= {"topk_method", "first_k_dense_replace"} if case.family == "glm" else set()
        published = {key: value for key, value in published.items() if key not in unknown}
    (folder / "config.json").write_text(json.dumps(published, indent=2, sort_keys=True) + "\n")
    weights = random_weights(case, published_shapes(case, folder))
    if case.family not in GROUPED:
        layers = published["num_hidden_layers"]
        gates = sum(name.endswith(".mlp.gate.weight") for name in weights)
        experts = published.get("n_routed_experts", published.get("num_experts", 0))
        kinds = published.get("mlp_layer_types")
        dense = published.get("first_k_dense_replace", kinds.count("dense") if kinds else layers)
        assert gates == layers - dense
        matrices = sum(".mlp.experts." in name for name in weights)
        assert matrices == gates * (2 if case.family == "mistral4" else 3 * experts)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def published_shapes(case: Case, folder: Path) -> dict[str, torch.Size]:
    """The names and shapes of the weights that save_pretrained writes.

    For a case spelled by transformers 5, its config.json replaces the folder's.
    """
    config_class, model_class = classes(case.family)
    with tempfile.TemporaryDirectory() as scratch:
        model = model_class(config_class.from_pretrained(folder))
        model.save_pretrained(scratch)
        saved = load_file(Path(scratch) / "model.safetensors")
        if case.hf5:
            text = (Path(scratch) / "config.json").read_text()
            (folder / "config.json").write_text(text)
    return {name: tensor.shape for name, tensor in saved.items()}


def random_weights(case: Case, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """fp32 weights that make a mistake in any of them visible."""
    generator = torch.Generator().manual_seed(case.seed)
    weights = {}
    for name in sorted(shapes):  # so the random numbers depend on names and shapes only
        noise = torch.randn(shapes[name], generator=generator)
        if name.endswith("e_score_correction_bias"):
            mean, deviation = case.bias
            weights[name] = mean + deviation * noise
        elif name.endswith("q_norm.weight"):
            weights[name] = 2 + 0.6 * noise  # sharper attention
        elif name.endswith("norm.weight"):
            weights[name] = 1 + 0.3 * noise  # 1 would hide a forgotten weight of a norm
        elif ".q_proj." in name or ".q_b_proj." in name:
            weights[name] = 0.4 * noise  # sharper attention
        else:
            weights[name] = 0.2 * noise
    return weights


def classes(family: str) -> tuple[Any, Any]:
    import transformers

    prefix = CLASSES[family]
    # transformers runs sarvam_mla by DeepseekV3's class.
    model = "DeepseekV3" if family == "sarvam" else prefix
    return getattr(transformers, prefix + "Config"), getattr(transformers, model + "ForCausalLM")


# ------------------------------------------------------------------------------------ the reference
def normalize_v2_gate(gate: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
    """Forward hook: norm_topk_prob as DeepSeek's V2 gate has it, which transformers leaves out."""
    logits, weights, indices = output
    return logits, weights / (weights.sum(-1, keepdim=True) + 1e-20), indices


@dataclass
class Trace:
    """The tensors that the hooks kept."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Those of reference.safetensors."""
    logits: dict[int, Tensor] = field(default_factory=dict)
    """The router's logits of layer i, (B*S, E)."""
    attention: dict[int, Tensor] = field(default_factory=dict)
    """The attention probabilities of layer i, (B, H, S, S)."""


def attach(model: Any, trace: Trace, shape: tuple[int, int]) -> None:
    """Register the hooks that fill `trace`."""

    def keep(key: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            trace.tensors[key] = output.detach().clone().contiguous()

        return hook

    def keep_router(i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            logits, weights, indices = output
            indices, order = indices.sort(-1)
            trace.logits[i] = logits.detach()
            trace.tensors[f"router_indices.{i}"] = indices.view(*shape, -1).clone()
            trace.tensors[f"router_weights.{i}"] = (
                weights.gather(-1, order).view(*shape, -1).clone()
            )

        return hook

    def keep_attention(i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            trace.attention[i] = output[1].detach()

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep(f"hidden.{i}"))
        layer.self_attn.register_forward_hook(keep(f"attn.{i}"))
        layer.self_attn.register_forward_hook(keep_attention(i))
        layer.mlp.register_forward_hook(keep(f"mlp.{i}"))
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(keep_router(i))
    model.model.norm.register_forward_hook(keep("final_norm"))


def run(case: Case, folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Load the checkpoint with transformers and run it -> (tensors to store, numbers to print)."""
    config_class, model_class = classes(case.family)
    model, report = model_class.from_pretrained(
        folder,
        config=config_class.from_pretrained(folder),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        report
    )
    config = model.config
    assert (config._attn_implementation, config._experts_implementation) == ("eager", "eager")
    model.eval()
    if case.family == "v2" and config.norm_topk_prob:
        assert config.routed_scaling_factor == 1
        for layer in model.model.layers[config.first_k_dense_replace :]:
            layer.mlp.gate.register_forward_hook(normalize_v2_gate)

    generator = torch.Generator().manual_seed(case.seed + 1_000_000)
    tokens = torch.randint(config.vocab_size, (case.batch, case.length), generator=generator)
    trace = Trace(tensors={"tokens": tokens})
    attach(model, trace, (case.batch, case.length))
    with torch.no_grad():
        trace.tensors["logits"] = model(tokens, use_cache=False).logits.contiguous()
    numbers = {"margin": math.inf}
    for i in trace.logits:
        check_routing(case, model, trace, i, numbers)
    if case.family == "mistral4":
        check_temper(case, model)
    check_attention(trace, numbers)
    (check_grouped_rope if case.family in GROUPED else check_rope)(case, model, numbers)
    return trace.tensors, numbers


# --------------------------------------------------------------------------------------- the checks
def choose(
    scores: Tensor, k: int, groups: int, kept: int, best: int, fill: float = -math.inf
) -> tuple[Tensor, float]:
    """Grouped top-k of scores (N, E) -> ascending indices (N, k), and the least margin.

    A group's score is the sum of its `best` best experts. All groups but the `kept` best ones are
    masked with `fill`. The margin is that of the closest decision.
    """
    n, experts = scores.shape
    margin = math.inf
    if kept < groups:
        group_scores = scores.view(n, groups, -1).topk(best, -1).values.sum(-1)  # (N, G)
        ranked = group_scores.sort(-1, descending=True)
        margin = float((ranked.values[:, kept - 1] - ranked.values[:, kept]).min())
        mask = torch.zeros_like(group_scores).scatter_(1, ranked.indices[:, :kept], 1).bool()
        scores = scores.masked_fill(~mask.repeat_interleave(experts // groups, 1), fill)
    top = scores.topk(k + 1, -1)
    margin = min(margin, float((top.values[:, k - 1] - top.values[:, k]).min()))
    return top.indices[:, :k].sort(-1).values, margin


def check_routing(case: Case, model: Any, trace: Trace, i: int, numbers: dict[str, float]) -> None:
    """Check for near ties, and that each known mistake chooses other experts for some token."""
    c, gate, logits = model.config, model.model.layers[i].mlp.gate, trace.logits[i]
    k, groups, kept = c.num_experts_per_tok, c.n_group, c.topk_group
    if case.biased:
        unbiased, best = logits.sigmoid(), 2
        scores = unbiased + gate.e_score_correction_bias
    else:
        scores = unbiased = logits.softmax(-1)
        best = 1
        if case.family == "mistral4" or c.topk_method == "greedy":
            groups = kept = 1
    chosen, margin = choose(scores, k, groups, kept, best)
    assert torch.equal(
        chosen.view(case.batch, case.length, k), trace.tensors[f"router_indices.{i}"]
    )
    assert margin > MARGIN, f"{case.name}: layer {i} has a near tie, {margin:.1e}: change the seed"
    numbers["margin"] = min(numbers["margin"], margin)

    mistakes = {}
    if case.biased:
        mistakes["no bias"] = choose(unbiased, k, groups, kept, best)
    if kept < groups:
        mistakes["no groups"] = choose(scores, k, 1, 1, best)
        mistakes["other group score"] = choose(scores, k, groups, kept, 3 - best)
    if case.bias[0] < 0:
        mistakes["masked with 0"] = choose(scores, k, groups, kept, best, 0.0)
    for name, (wrong, _) in mistakes.items():
        share = float((wrong != chosen).any(-1).float().mean())
        assert share > 0, (
            f"{case.name}: layer {i} cannot show the mistake {name!r}: change the seed"
        )
        numbers[name] = min(numbers.get(name, 1.0), share)
    # Every expert is hit, so that every expert's weights matter.
    hit = len(chosen.unique())
    assert hit == c.n_routed_experts, (
        f"{case.name}: layer {i} hits {hit} experts only: change the seed"
    )


def check_attention(trace: Trace, numbers: dict[str, float]) -> None:
    """Check that attention is neither uniform nor one-hot, by its entropy relative to uniform."""
    ratios = []
    for p in trace.attention.values():
        entropy = -(p * p.clamp_min(1e-30).log()).sum(-1)  # (B, H, S)
        entropy = entropy[..., 4:]  # (B, H, S-4): the first queries see too few keys
        ratios.append(float((entropy / torch.arange(5, p.shape[-1] + 1).log()).mean()))
    assert min(ratios) > 0.1 and max(ratios) < 0.9, f"attention entropy {ratios}"
    numbers["entropy"] = max(ratios)


def check_rope(case: Case, model: Any, numbers: dict[str, float]) -> None:
    """Check YaRN: positions beyond the original length, mscale^2 in the scale, new frequencies."""
    c = model.config
    attn, rope = model.model.layers[0].self_attn, model.model.rotary_emb
    scale = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5
    plain = c.rope_parameters["rope_theta"] ** -(
        torch.arange(0, c.qk_rope_head_dim, 2) / c.qk_rope_head_dim
    )
    r = c.rope_parameters
    if r["rope_type"] == "default":
        assert math.isclose(attn.scaling, scale) and rope.attention_scaling == 1
        return
    assert case.length > r["original_max_position_embeddings"]
    m = {key: 0.1 * r[key] * math.log(r["factor"]) + 1 for key in ("mscale", "mscale_all_dim")}
    assert math.isclose(attn.scaling, scale * m["mscale_all_dim"] ** 2), (
        "the softmax scale lacks mscale^2"
    )
    assert math.isclose(rope.attention_scaling, m["mscale"] / m["mscale_all_dim"])
    kept = rope.inv_freq / plain  # 1: as trained, 1/factor: stretched, between: on the ramp
    assert math.isclose(float(kept[0]), 1, rel_tol=1e-5)
    assert math.isclose(float(kept[-1]) * r["factor"], 1, rel_tol=1e-5)
    numbers["on ramp"] = int(((kept < 0.999) & (kept * r["factor"] > 1.001)).sum())


def check_grouped_rope(case: Case, model: Any, numbers: dict[str, float]) -> None:
    """Check a scaled rope: positions beyond the original length, the factor, new frequencies."""
    c, rope = model.config, model.model.rotary_emb
    size, r = 2 * len(rope.inv_freq), c.rope_parameters
    assert math.isclose(model.model.layers[0].self_attn.scaling, size**-0.5)
    if r["rope_type"] == "default":
        assert rope.attention_scaling == 1
        return
    assert case.length > r["original_max_position_embeddings"]
    yarn = r["rope_type"] == "yarn"
    factor = 0.1 * math.log(r["factor"]) + 1 if yarn else 1
    assert math.isclose(rope.attention_scaling, factor)
    kept = rope.inv_freq * r["rope_theta"] ** (torch.arange(0, size, 2) / size)
    assert math.isclose(float(kept[0]), 1, rel_tol=1e-5), "the fastest pair is not kept"
    assert math.isclose(float(kept[-1]) * r["factor"], 1, rel_tol=1e-5)
    numbers["on ramp"] = int(((kept < 0.999) & (kept * r["factor"] > 1.001)).sum())
    assert numbers["on ramp"] > 0, f"{case.name}: no frequency is on the ramp"


def check_temper(case: Case, model: Any) -> None:
    """Check that the last queries' factor is far from 1."""
    r = model.config.rope_parameters
    lengths = (case.length - 1) // r["original_max_position_embeddings"]
    assert r["llama_4_scaling_beta"] * math.log(1 + lengths) > 0.3


# -------------------------------------------------------------------------------------- the command
def make(case: Case, folder: Path) -> dict[str, float]:
    """Write one case to `folder` -> the checks' numbers."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(case, folder)
    tensors, numbers = run(case, folder)
    # One metadata key only: safetensors writes several in random order, and git would see a change.
    versions = dict(transformers=transformers.__version__, torch=torch.__version__)
    save_file(
        tensors, folder / "reference.safetensors", metadata={"versions": json.dumps(versions)}
    )
    return numbers


def compare(new: Path, old: Path) -> str:
    """Compare two case folders -> a description of the difference, or ''."""
    if missing := [f for f in FILES if not (old / f).is_file()]:
        return f"{', '.join(missing)} missing"
    configs = [json.loads((folder / "config.json").read_text()) for folder in (new, old)]
    for config in configs:
        config.pop("transformers_version", None)
    if configs[0] != configs[1]:
        return "config.json differs"
    for name in FILES[1:]:
        a, b = load_file(new / name), load_file(old / name)
        if a.keys() != b.keys():
            return f"{name}: keys differ: {sorted(a.keys() ^ b.keys())}"
        for key in a:
            if a[key].shape != b[key].shape or a[key].dtype != b[key].dtype:
                return f"{name}: {key} has another shape or dtype"
            off = float((a[key].double() - b[key].double()).abs().max())
            if off > (TOLERANCE if a[key].is_floating_point() else 0):
                return f"{name}: {key} differs by {off:.2e}"
    return ""


def largest_difference(new: Path, old: Path) -> float:
    """The largest absolute difference of any tensor of two references with the same names."""
    a, b = (load_file(folder / "reference.safetensors") for folder in (new, old))
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


def stored_versions(folder: Path) -> str:
    """The versions recorded in a stored case."""
    with safe_open(folder / "reference.safetensors", "pt") as f:
        return str((f.metadata() or {}).get("versions", "no versions recorded"))


def size_of(folder: Path) -> int:
    return sum((folder / f).stat().st_size for f in FILES)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a difference or too many bytes, 2 without transformers."""
    parser = shared.parser(__doc__)
    parser.add_argument("--only", choices=[case.name for case in CASES], help="only this case")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; compare with the stored cases"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=OUTPUT,
        metavar="DIR",
        help="where the cases are stored (default: tests/reference)",
    )
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    if find_spec("transformers") is None:
        raise InputError("transformers is not installed: pip install -e '.[peers]'")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cases = [case for case in CASES if arguments.only in (None, case.name)]
    if arguments.check:
        return int(any([not check(case, arguments.output / case.name) for case in cases]))
    for case in cases:
        folder = arguments.output / case.name
        print(line(case, folder, make(case, folder)), flush=True)
    stored = [arguments.output / case.name for case in CASES]
    total = sum(size_of(folder) for folder in stored if (folder / FILES[-1]).is_file())
    print(f"{'total':12s} {total / 1e3:6.1f} kB")
    return int(total > SIZE_LIMIT)


def check(case: Case, stored: Path) -> bool:
    """Make a case again, print how it compares with the stored one -> whether they are the same."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        numbers = make(case, folder)
        difference = compare(folder, stored)
        if not difference:
            same = f"; same within {largest_difference(folder, stored):.1e}"
            print(line(case, folder, numbers) + same, flush=True)
            return True
    kept = (stored / FILES[-1]).is_file()
    versions = f" (stored: {stored_versions(stored)})" if kept else ""
    print(f"{case.name:12s} DIFFERS: {difference}{versions}", flush=True)
    return False


def line(case: Case, folder: Path, numbers: dict[str, float]) -> str:
    """A case's size and the numbers of its checks."""
    each = ", ".join(f"{key} {value:.2g}" for key, value in numbers.items())
    return f"{case.name:12s} {size_of(folder) / 1e3:6.1f} kB  {each}"


if __name__ == "__main__":
    sys.exit(main())
