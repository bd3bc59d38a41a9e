"""config.json of the families with grouped-query attention: `qwen2`, `llama` and `qwen3`.

R1's distilled models are of these families. Their layers are all dense and alike. So a field that
asks for sliding windows, experts or other layers is refused, unless it is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from r1.files.json_fields import Fields
from r1.files.rope_fields import read_rope
from r1.model.config import Config, FileFormat, GroupedShape, Llama3, Yarn


@dataclass(frozen=True)
class Family:
    """What a family's layers have, and its class in transformers."""

    architecture: str
    attention_bias: bool  # q_proj, k_proj and v_proj have a bias, whatever the file says of it
    qk_norm: bool
    head_dim: int | None = None  # None: hidden_size / num_attention_heads where the file has none


FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", attention_bias=True, qk_norm=False),
    "llama": Family("LlamaForCausalLM", attention_bias=False, qk_norm=False),
    "qwen3": Family("Qwen3ForCausalLM", attention_bias=False, qk_norm=True, head_dim=128),
}

ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "is_causal": (True,),
}
"""Fields and their supported values, the published models' own."""


def read(f: Fields, files: FileFormat) -> Config:
    """Build a Config from config.json's fields. Raises InputError that names the wrong field."""
    model_type = f.get("model_type")
    for name, allowed in ONLY.items():
        if f.get(name, allowed[0]) not in allowed:
            raise f.fail(name, f"is {f.raw[name]!r}, but r1 implements only {allowed[0]!r}")
    layers = f.integer("num_hidden_layers", most=1000)
    check_windows(f, layers)
    bos, hidden = f.token_ids("bos_token_id"), f.integer("hidden_size")
    return Config(
        model_type=model_type,
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size"),
        num_hidden_layers=layers,
        max_position_embeddings=f.integer("max_position_embeddings", most=10**9),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        attention=read_attention(f, FAMILIES[model_type], hidden),
        files=files,
        tie_word_embeddings=f.boolean("tie_word_embeddings", False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=f.token_ids("eos_token_id"),
    )


def read_attention(f: Fields, family: Family, hidden: int) -> GroupedShape:
    """Read the fields of grouped-query attention, and check them."""
    heads = f.integer("num_attention_heads")
    groups = f.integer("num_key_value_heads", heads)  # as Llama 1, which has no such field
    if heads % groups:
        raise f.fail("num_key_value_heads", f"is {groups}, which does not divide {heads} heads")
    # q, k and v may be stored as one matrix, three times as large as one of them.
    default = family.head_dim or max(1, hidden // heads)
    head_dim = f.integer("head_dim", default, most=10**5)
    if f.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise f.fail("hidden_size", f"is {hidden}, which {heads} heads do not divide")
    if head_dim % 2:
        raise f.fail("head_dim", f"is {head_dim}, but rotation takes pairs: it must be even")
    if f.boolean("attention_bias", family.attention_bias) != family.attention_bias:
        has = "has" if family.attention_bias else "has no"
        problem = f"is {f.raw['attention_bias']}, but r1's {family.architecture} {has} biases"
        raise f.fail("attention_bias", problem)
    theta, scaling = read_rope(f)
    if isinstance(scaling, Yarn):
        own = Yarn(scaling.factor, scaling.original_max_position_embeddings)
        for name in ("mscale", "mscale_all_dim", "llama_4_scaling_beta"):
            if getattr(scaling, name) != getattr(own, name):
                problem = f"has {name} = {getattr(scaling, name)}, which is of latent attention"
                raise f.fail("rope_scaling", f"{problem}: no {family.architecture} has it")
    return GroupedShape(
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        rope_theta=theta,
        yarn=scaling if isinstance(scaling, Yarn) else None,
        llama3=scaling if isinstance(scaling, Llama3) else None,
        attention_bias=family.attention_bias,
        qk_norm=family.qk_norm,
    )


def check_windows(f: Fields, layers: int) -> None:
    """Raise InputError for sliding windows. Published files name a size and turn it off."""
    used, kinds = f.boolean("use_sliding_window", False), f.get("layer_types")
    f.get("sliding_window"), f.get("max_window_layers")
    if used:
        raise f.fail("use_sliding_window", "is true, but r1 implements no windowed attention")
    if kinds is not None and kinds != ["full_attention"] * layers:
        problem = f"is not full_attention for each of {layers} layers, and r1 has no other kind"
        raise f.fail("layer_types", problem)


def dump(config: Config, fields: dict[str, Any]) -> dict[str, Any]:
    """Complete the fields of a config.json. `fields` has those of `config` and its parts."""
    family, shape = FAMILIES[config.model_type], config.grouped
    ours = {"attention_bias", "qk_norm", "llama3", "num_nextn_predict_layers"}
    ours |= config.experts.__dataclass_fields__.keys()
    out = {name: value for name, value in fields.items() if name not in ours}
    out["architectures"] = [family.architecture]
    if shape.llama3 is not None:
        out["rope_scaling"] = {"rope_type": "llama3", **fields["llama3"]}
    if config.model_type == "qwen2":
        out["use_sliding_window"] = False
    else:
        out["attention_bias"] = shape.attention_bias
    return out
