"""Hugging Face's config.json <-> Config.

All families with latent attention share this code: families.py says how each spells the fields.
Those of R1's distilled models are in grouped_json.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from r1.errors import InputError
from r1.files import grouped_json
from r1.files.families import spelled, text_part
from r1.files.foreign import check_gguf, no_folder
from r1.files.json_fields import Fields
from r1.files.layouts import tensors_of
from r1.files.quantized import methods
from r1.files.quantized.recognize import recognize, stored
from r1.files.rope_fields import read_rope
from r1.files.shards import has_shards
from r1.model.config import AttentionShape, Config, ExpertShape, FileFormat, Llama3
from r1.reading import read_object

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
}
"""Config's `model_type`, which tells the router -> what a saved copy is called."""
# The values that transformers and the published modeling files assume for missing fields.
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
    # transformers' groups of it work otherwise than V2's; its models have one group.
    "mistral4": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": True},
}
# Fields and their supported values. Other values would need arithmetic that no published checkpoint
# of these families uses.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleave": (True,),
    "moe_layer_freq": (1,),
    "partial_rotary_factor": (1, 1.0),
    "is_causal": (True,),
}


def load_config(directory: str | Path) -> Config:
    """Read `directory/config.json`, and of quantized weights the headers of the shards.

    Raises InputError that names the wrong folder or field.
    """
    directory = Path(directory)
    path = directory / "config.json"
    holds = "a checkpoint's folder holds config.json and *.safetensors"
    try:
        exists = path.is_file()
    except OSError as error:
        raise InputError(
            f"{directory} can't be read ({error.strerror}): give a folder that you may read"
        ) from None
    if not directory.is_dir():
        raise no_folder(directory)
    if not exists:
        check_gguf(directory)
        raise InputError(f"{directory} has no config.json: {holds}")
    config = parse_config(read_object(path), str(path))
    declared = methods.declared_in(directory)
    if declared is None or not has_shards(directory):
        return config
    entries = tensors_of(directory, unlisted=declared.unlisted)
    return config.change(stored=stored(recognize(entries, declared).found.values()))


def parse_config(raw: dict[str, Any], where: str = "config") -> Config:
    """Build a Config from config.json's fields, and check it.

    `where` names the file in error messages. Raises InputError that names the wrong field.
    """
    text, where, left_out = text_part(raw, where)
    kind = text.get("model_type")
    if isinstance(kind, str) and kind in grouped_json.FAMILIES:
        f = Fields(text, where)
        config = grouped_json.read(f, FileFormat(read_fp8_block(f)))
        check_tokens(f, config)
        f.unknown()
        return config
    f, family, read = spelled(text, where)
    raw = f.raw
    for name, allowed in {**ONLY, **family.only}.items():
        if f.get(name, allowed[0]) not in allowed:
            raise f.fail(name, f"is {raw[name]!r}, but r1 implements only {allowed[0]!r}")
    for name in ("swa", "sliding_window"):
        if f.get(name):
            raise f.fail(name, "asks for windowed attention, which r1 does not implement")
    # transformers 5 writes num_mtp_layers, DeepSeek num_nextn_predict_layers.
    mtp = "num_mtp_layers" if "num_mtp_layers" in raw else "num_nextn_predict_layers"
    bos = f.token_ids("bos_token_id")
    for name in ("q_lora_rank", "n_routed_experts"):  # required; null means none
        if name not in raw:
            raise f.fail(name, "is missing: it is part of the model's shape (null for none)")
    context = f.integer("max_position_embeddings", most=10**9)
    shorter = read.context is not None and read.context < context
    config = Config(
        model_type=family.arithmetic,
        vocab_size=f.integer("vocab_size"),
        hidden_size=f.integer("hidden_size"),
        intermediate_size=f.integer("intermediate_size"),
        num_hidden_layers=f.integer("num_hidden_layers", most=1000),
        max_position_embeddings=min(context, read.context or context),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        attention=read_attention(f),
        experts=read_experts(f, family.arithmetic),
        files=FileFormat(read_fp8_block(f), left_out=(*left_out, *read.left_out)),
        tie_word_embeddings=f.boolean("tie_word_embeddings", False),
        num_nextn_predict_layers=f.integer(mtp, 0, least=0, most=1000),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=f.token_ids("eos_token_id"),
        shortened=read.why if shorter else "",
    )
    check(f, config)
    f.unknown()
    return config


def dump_config(config: Config) -> dict[str, Any]:
    """A Config as the fields of a published config.json: `parse_config(dump_config(c)) == c`.

    Not kept: what `files` tells of the tensors, and why a context is shorter than the model's own.
    """
    out = dataclasses.asdict(config)
    grouped = config.model_type in grouped_json.FAMILIES
    for part in ("attention", "experts", "files"):
        out |= out.pop(part)
    yarn, block, eos = out.pop("yarn"), out.pop("fp8_block"), config.eos_token_ids
    for name in ("eos_token_ids", "stored", "left_out", "shortened"):
        del out[name]
    out |= {"hidden_act": "silu", "attention_dropout": 0.0}
    if yarn and config.model_type != "mistral4":
        del yarn["llama_4_scaling_beta"]
    out["rope_scaling"] = {"type": "yarn", **yarn} if yarn else None
    if grouped:
        out = grouped_json.dump(config, out)
    else:
        out["architectures"] = [ARCHITECTURES[config.model_type]]
        out["num_key_value_heads"] = config.attention.num_attention_heads
        out |= {"attention_bias": False, "moe_layer_freq": 1}
    if config.model_type == "mistral4" and yarn:  # the one spelling that transformers reads of it
        rope = {"rope_theta": out.pop("rope_theta"), **out.pop("rope_scaling")}
        out["rope_parameters"] = {"rope_type": rope.pop("type"), **rope}
    out["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    if block:
        out["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": list(block),
        }  # fmt: skip
    return out


def read_attention(f: Fields) -> AttentionShape:
    """Read the fields of latent attention."""
    theta, yarn = read_rope(f)
    if isinstance(yarn, Llama3):
        raise f.fail("rope_scaling", "has type 'llama3', but latent attention takes only yarn")
    return AttentionShape(
        num_attention_heads=f.integer("num_attention_heads"),
        q_lora_rank=f.integer("q_lora_rank") if f.get("q_lora_rank") is not None else None,
        kv_lora_rank=f.integer("kv_lora_rank"),
        qk_nope_head_dim=f.integer("qk_nope_head_dim"),
        qk_rope_head_dim=f.integer("qk_rope_head_dim"),
        v_head_dim=f.integer("v_head_dim"),
        rope_theta=theta,
        yarn=yarn,
    )


def read_experts(f: Fields, family: str) -> ExpertShape:
    """Read the fields of the router and the experts."""
    v3, defaults = family == "deepseek_v3", DEFAULTS[family]
    methods = ("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")
    scoring = defaults["scoring_func"]
    experts = f.integer("n_routed_experts", 0, least=0)
    groups = None if v3 and experts else 1  # None: the field is required
    return ExpertShape(
        n_routed_experts=experts,
        n_shared_experts=f.integer("n_shared_experts", 0, least=0),
        num_experts_per_tok=f.integer("num_experts_per_tok", None if experts else 1),
        moe_intermediate_size=f.integer("moe_intermediate_size", None if experts else 1),
        n_group=f.integer("n_group", groups),
        topk_group=f.integer("topk_group", groups),
        first_k_dense_replace=f.integer("first_k_dense_replace", None if experts else 0, least=0),
        topk_method=f.choice("topk_method", defaults["topk_method"], methods, family),
        scoring_func=f.choice("scoring_func", scoring, (scoring,), family),
        norm_topk_prob=f.boolean("norm_topk_prob", defaults["norm_topk_prob"]),
        routed_scaling_factor=f.number("routed_scaling_factor", groups and float(groups)),
    )


def read_fp8_block(f: Fields) -> tuple[int, int] | None:
    """Read the shape of R1's FP8 blocks. None if the weights are in another format, or in none."""
    f.get("quantization_config")
    f.get("compression_config")
    where, description = methods.find(f.raw, f.where)
    if description is None:
        return None
    declared = methods.parse(description, where)
    return declared.block if declared.method == "fp8" else None


def check(f: Fields, c: Config) -> None:
    """Raise InputError if fields contradict each other."""
    a = c.latent
    if a.yarn and a.yarn.llama_4_scaling_beta and c.model_type != "mistral4":
        raise f.fail("rope_scaling", "has llama_4_scaling_beta, which r1 reads of mistral4 only")
    heads = f.get("num_key_value_heads", a.num_attention_heads)
    if heads != a.num_attention_heads:
        problem = f"is {heads}, but latent attention has as many as num_attention_heads, "
        raise f.fail("num_key_value_heads", f"{problem}{a.num_attention_heads}")
    if f.get("qk_head_dim", a.qk_head_dim) != a.qk_head_dim:
        problem = f"is {f.raw['qk_head_dim']}, not qk_nope_head_dim + qk_rope_head_dim"
        raise f.fail("qk_head_dim", problem)
    if f.get("head_dim", a.qk_rope_head_dim) not in (a.qk_rope_head_dim, a.qk_head_dim):
        problem = f"is {f.raw['head_dim']}, but the rotated part has {a.qk_rope_head_dim}"
        raise f.fail("head_dim", problem)
    if a.qk_rope_head_dim % 2:
        problem = f"is {a.qk_rope_head_dim}, but rotation takes pairs: it must be even"
        raise f.fail("qk_rope_head_dim", problem)
    check_tokens(f, c)
    check_experts(f, c.experts)


def check_tokens(f: Fields, c: Config) -> None:
    """Raise InputError for a token outside the vocabulary."""
    for name, value in (("bos_token_id", (c.bos_token_id,)), ("eos_token_id", c.eos_token_ids)):
        if any(i is not None and i >= c.vocab_size for i in value):
            raise f.fail(name, f"is {f.raw[name]}, outside the vocabulary of {c.vocab_size}")


def check_experts(f: Fields, e: ExpertShape) -> None:
    """Raise InputError if the router could not choose among these experts and groups."""
    if f.get("num_local_experts", e.n_routed_experts) != e.n_routed_experts:
        problem = f"is {f.raw['num_local_experts']}, not n_routed_experts, {e.n_routed_experts}"
        raise f.fail("num_local_experts", problem)
    if not e.n_routed_experts:
        return
    grouped = e.topk_method != "greedy"
    if grouped and e.n_routed_experts % e.n_group:
        problem = f"is {e.n_group}, which does not divide the {e.n_routed_experts} routed experts"
        raise f.fail("n_group", problem)
    if grouped and e.topk_group > e.n_group:
        problem = f"is {e.topk_group}, more than the {e.n_group} groups there are"
        raise f.fail("topk_group", problem)
    if e.topk_method == "noaux_tc" and e.n_routed_experts < 2 * e.n_group:
        problem = f"is {e.n_group}: noaux_tc scores a group by its two best experts, and it has one"
        raise f.fail("n_group", problem)
    per_group = e.n_routed_experts // e.n_group
    reachable = per_group * e.topk_group if grouped else e.n_routed_experts
    if e.num_experts_per_tok > reachable:
        problem = f"is {e.num_experts_per_tok}, but only {reachable} experts can be chosen"
        raise f.fail("num_experts_per_tok", problem)
