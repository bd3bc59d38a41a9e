"""Hugging Face's config.json <-> Config.

Two families share this code: `deepseek_v3` (R1, V3, V3.1, Moonlight, Kimi-K2) and `deepseek_v2`
(V2, V2-Lite).
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from r1.errors import InputError
from r1.files.json_fields import Fields
from r1.model.config import AttentionShape, Config, ExpertShape, FileFormat, Yarn

FAMILIES = {"deepseek_v3": "deepseek_v3", "kimi_k2": "deepseek_v3", "deepseek_v2": "deepseek_v2"}

# What transformers and the published modeling files assume where a config.json lacks a field.
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
}
# Known fields whose other values would need arithmetic that no published checkpoint of these
# families uses.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleave": (True,),
    "moe_layer_freq": (1,),
    "partial_rotary_factor": (1, 1.0),
}


def load_config(directory: str | Path) -> Config:
    """Read `directory/config.json`. Raises InputError that names the folder or the field at fault."""
    directory = Path(directory)
    path = directory / "config.json"
    holds = "a checkpoint's folder holds config.json and *.safetensors"
    try:
        found = path.is_file()
    except OSError as error:
        raise InputError(
            f"{directory} can't be read ({error.strerror}): give a folder that you may read"
        ) from None
    if not directory.is_dir():
        raise InputError(
            f"there is no folder {directory}: give a checkpoint's folder (config.json + *.safetensors)"
        )
    if not found:
        raise InputError(f"{directory} has no config.json: {holds}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} can't be read as JSON ({error}): download it again") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds no JSON object: download it again")
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], where: str = "config") -> Config:
    """Build and check a Config from `config.json`'s fields. Raises InputError that names the field."""
    f = Fields(raw, where)
    model_type = f.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise f.fail("model_type", f"is {model_type!r}, but r1 runs only {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    for name, allowed in ONLY.items():
        if f.get(name, allowed[0]) not in allowed:
            raise f.fail(name, f"is {raw[name]!r}, but r1 implements only {allowed[0]!r}")
    for name in ("swa", "sliding_window"):
        if f.get(name):
            raise f.fail(name, "asks for windowed attention, which r1 does not implement")
    # transformers 5 writes num_mtp_layers, DeepSeek num_nextn_predict_layers.
    mtp = "num_mtp_layers" if "num_mtp_layers" in raw else "num_nextn_predict_layers"
    bos = f.token_ids("bos_token_id")
    for name in ("q_lora_rank", "n_routed_experts"):  # null says none; a missing field says nothing
        if name not in raw:
            raise f.fail(name, "is missing: it is part of the model's shape (null for none)")
    config = Config(
        model_type=family,
        vocab_size=f.integer("vocab_size"),
        hidden_size=f.integer("hidden_size"),
        intermediate_size=f.integer("intermediate_size"),
        num_hidden_layers=f.integer("num_hidden_layers", most=1000),
        max_position_embeddings=f.integer("max_position_embeddings", most=10**9),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        attention=read_attention(f),
        experts=read_experts(f, family),
        files=FileFormat(read_fp8_block(f)),
        tie_word_embeddings=f.boolean("tie_word_embeddings", False),
        num_nextn_predict_layers=f.integer(mtp, 0, least=0, most=1000),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=f.token_ids("eos_token_id"),
    )
    check(f, config)
    f.unknown()
    return config


def dump_config(config: Config) -> dict[str, Any]:
    """The published `config.json` fields: `parse_config(dump_config(c)) == c`."""
    out = dataclasses.asdict(config)
    for part in ("attention", "experts", "files"):
        out |= out.pop(part)
    yarn, block, eos = out.pop("yarn"), out.pop("fp8_block"), config.eos_token_ids
    del out["eos_token_ids"]
    version = "V3" if config.model_type == "deepseek_v3" else "V2"
    out["architectures"] = [f"Deepseek{version}ForCausalLM"]
    out["num_key_value_heads"] = config.attention.num_attention_heads
    out |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
    out["moe_layer_freq"] = 1
    out["rope_scaling"] = {"type": "yarn", **yarn} if yarn else None
    out["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    if block:
        out["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": list(block),
        }  # fmt: skip
    return out


def read_attention(f: Fields) -> AttentionShape:
    """The fields of latent attention."""
    theta, yarn = read_rope(f)
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
    """The fields of router and experts."""
    v3, defaults = family == "deepseek_v3", DEFAULTS[family]
    methods = ("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")
    scoring = defaults["scoring_func"]
    experts = f.integer("n_routed_experts", 0, least=0)
    groups = None if v3 and experts else 1  # None: the field must be there
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


def read_rope(f: Fields) -> tuple[float, Yarn | None]:
    """Both spellings: `rope_theta` with `rope_scaling` (published), `rope_parameters` (newer)."""
    scaling, parameters = f.get("rope_scaling"), f.get("rope_parameters")
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, dict):
            raise f.fail(name, f"is {value!r}, which is no JSON object")
    if parameters is not None and "full_attention" in parameters:
        said = "has one entry per layer type, but every layer of this family is alike"
        raise f.fail("rope_parameters", said)
    both = {**(scaling or {}), **(parameters or {})}
    for key, value in (scaling or {}).items():
        if both[key] != value:
            said = f"says {key} = {value!r} and rope_parameters {both[key]!r}"
            raise f.fail("rope_scaling", said)
    theta = f.number("rope_theta", both.get("rope_theta", 10000.0))
    if both.get("rope_theta", theta) != theta:
        raise f.fail("rope_theta", f"is {theta}, but rope_parameters says {both['rope_theta']}")
    if theta <= 1:
        said = f"is {theta}, but the rotation's wavelengths are its powers: more than 1"
        raise f.fail("rope_theta", said)

    kind = both.get("rope_type", both.get("type", "default"))
    if "type" in both and both["type"] != kind:
        raise f.fail("rope_scaling", f"has type {both['type']!r} and rope_type {kind!r}")
    if kind == "default":
        rest = {k: v for k, v in both.items() if k != "partial_rotary_factor" or v != 1}
        f.no_more("rope_parameters", rest, {"type", "rope_type", "rope_theta"})
        return theta, None
    if kind != "yarn":
        raise f.fail("rope_scaling", f"has type {kind!r}, but r1 implements only yarn")
    return theta, read_yarn(f, both)


def read_yarn(f: Fields, both: dict[str, Any]) -> Yarn:
    """YaRN's settings, from the two objects that may hold them."""
    known = {"type", "rope_type", "rope_theta", "truncate", "attention_factor"}
    known |= {"partial_rotary_factor"} | {field.name for field in dataclasses.fields(Yarn)}
    f.no_more("rope_scaling", both, known)
    if both.get("truncate", True) is not True:
        said = "has truncate = false, but r1 implements only YaRN's truncated range"
        raise f.fail("rope_scaling", said)
    if both.get("partial_rotary_factor", 1) != 1:
        said = f"has partial_rotary_factor = {both['partial_rotary_factor']}, not 1"
        raise f.fail("rope_scaling", said)
    original = both.get("original_max_position_embeddings")
    if isinstance(original, bool) or not isinstance(original, int) or not 0 < original <= 10**9:
        said = f"has original_max_position_embeddings = {original!r}, not 1 to 1000000000"
        raise f.fail("rope_scaling", said)
    yarn = Yarn(
        factor=f.number("factor", source=both),
        original_max_position_embeddings=original,
        beta_fast=f.number("beta_fast", 32.0, both),
        beta_slow=f.number("beta_slow", 1.0, both),
        mscale=f.number("mscale", 1.0, both),
        mscale_all_dim=f.number("mscale_all_dim", 0.0, both),
    )
    if yarn.factor < 1:
        said = f"has factor = {yarn.factor}, but YaRN stretches: at least 1"
        raise f.fail("rope_scaling", said)
    if not 0 < yarn.beta_slow <= yarn.beta_fast:
        betas = f"beta_slow = {yarn.beta_slow} and beta_fast = {yarn.beta_fast}"
        raise f.fail("rope_scaling", f"has {betas}, but YaRN wants 0 < beta_slow <= beta_fast")
    given = both.get("attention_factor") is not None
    stated = f.number("attention_factor", source=both) if given else yarn.table_factor
    if not math.isclose(stated, yarn.table_factor, rel_tol=1e-6):
        said = f"has attention_factor = {stated}, but its mscales give {yarn.table_factor:.6g}"
        raise f.fail("rope_scaling", said)
    return yarn


def read_fp8_block(f: Fields) -> tuple[int, int] | None:
    """The shape of FP8 blocks; None where there is no quantization_config."""
    name = "quantization_config"
    quantization = f.get(name)
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise f.fail(name, f"is {quantization!r}, which is no JSON object")
    method = quantization.get("quant_method")
    if method != "fp8":
        said = f"has quant_method = {method!r}, but r1 reads only fp8 (e4m3, one scale a block)"
        raise f.fail(name, said)
    if quantization.get("fmt", "e4m3") != "e4m3":
        raise f.fail(name, f"has fmt = {quantization['fmt']!r}, but r1 reads only e4m3")
    block: Any = quantization.get("weight_block_size")
    pair = isinstance(block, list) and len(block) == 2
    if not pair or not all(isinstance(size, int) and size > 0 for size in block):
        said = f"has weight_block_size = {block!r}, not two whole numbers such as [128, 128]"
        raise f.fail(name, said)
    return block[0], block[1]


def check(f: Fields, c: Config) -> None:
    """Fields that contradict each other. Raises InputError."""
    a = c.attention
    heads = f.get("num_key_value_heads", a.num_attention_heads)
    if heads != a.num_attention_heads:
        said = f"is {heads}, but latent attention has as many as num_attention_heads, "
        raise f.fail("num_key_value_heads", f"{said}{a.num_attention_heads}")
    if f.get("qk_head_dim", a.qk_head_dim) != a.qk_head_dim:
        said = f"is {f.raw['qk_head_dim']}, not qk_nope_head_dim + qk_rope_head_dim"
        raise f.fail("qk_head_dim", said)
    if f.get("head_dim", a.qk_rope_head_dim) not in (a.qk_rope_head_dim, a.qk_head_dim):
        said = f"is {f.raw['head_dim']}, but the rotated part has {a.qk_rope_head_dim}"
        raise f.fail("head_dim", said)
    if a.qk_rope_head_dim % 2:
        said = f"is {a.qk_rope_head_dim}, but rotation takes pairs: it must be even"
        raise f.fail("qk_rope_head_dim", said)
    for name, value in (("bos_token_id", (c.bos_token_id,)), ("eos_token_id", c.eos_token_ids)):
        if any(i is not None and i >= c.vocab_size for i in value):
            raise f.fail(name, f"is {f.raw[name]}, outside the vocabulary of {c.vocab_size}")
    check_experts(f, c.experts)


def check_experts(f: Fields, e: ExpertShape) -> None:
    """Experts and groups that a router could not choose by. Raises InputError."""
    if f.get("num_local_experts", e.n_routed_experts) != e.n_routed_experts:
        said = f"is {f.raw['num_local_experts']}, not n_routed_experts, {e.n_routed_experts}"
        raise f.fail("num_local_experts", said)
    if not e.n_routed_experts:
        return
    grouped = e.topk_method != "greedy"
    if grouped and e.n_routed_experts % e.n_group:
        said = f"is {e.n_group}, which does not divide the {e.n_routed_experts} routed experts"
        raise f.fail("n_group", said)
    if grouped and e.topk_group > e.n_group:
        said = f"is {e.topk_group}, more than the {e.n_group} groups there are"
        raise f.fail("topk_group", said)
    if e.topk_method == "noaux_tc" and e.n_routed_experts < 2 * e.n_group:
        said = f"is {e.n_group}: noaux_tc scores a group by its two best experts, and it has one"
        raise f.fail("n_group", said)
    per_group = e.n_routed_experts // e.n_group
    reachable = per_group * e.topk_group if grouped else e.n_routed_experts
    if e.num_experts_per_tok > reachable:
        said = f"is {e.num_experts_per_tok}, but only {reachable} experts can be chosen"
        raise f.fail("num_experts_per_tok", said)
