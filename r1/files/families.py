"""The families of models that r1 reads: how each spells its config.json, in DeepSeek's words.

All have multi-head latent attention, so one reader (config_json.py) serves them. A family here is
what it says otherwise: names of fields, what a missing field means, and fields of its own. Sources:
the configuration classes of transformers 5.24, and the published files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from r1.errors import InputError
from r1.files import grouped_json
from r1.files.json_fields import Fields
from r1.files.nearest import NEAREST, nearest_to

LeftOut = tuple[tuple[str, str], ...]
"""Regular expressions of tensors' names that this model goes without, each with the reason."""


@dataclass(frozen=True)
class Read:
    """What a family's own fields say."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """Values under DeepSeek's names."""
    left_out: LeftOut = ()
    context: int | None = None
    """The most tokens of a row, where the arithmetic allows fewer than the file says."""
    why: str = ""
    """Why they are fewer."""


def _nothing(f: Fields) -> Read:
    return Read()


@dataclass(frozen=True)
class Family:
    """One `model_type`."""

    arithmetic: str = "deepseek_v3"
    """Config's `model_type`: which router, and how a saved copy is called."""
    names: Mapping[str, str] = field(default_factory=dict)
    """DeepSeek's name of a field -> this family's."""
    missing: Mapping[str, Any] = field(default_factory=dict)
    """What a missing field means, where that is not what it means to DeepSeek."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields and their supported values; the first stands for a missing field."""
    read: Callable[[Fields], Read] = _nothing


def first_dense(f: Fields) -> dict[str, Any]:
    """`mlp_layer_types`, a list that transformers 5 writes, as `first_k_dense_replace`."""
    kinds = f.get("mlp_layer_types")
    if kinds is None:
        return {}
    layers = f.integer("num_hidden_layers", most=1000)
    dense = kinds.count("dense") if isinstance(kinds, list) else 0
    if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        problem = "is no list of num_hidden_layers words, first dense ones, then sparse ones"
        raise f.fail("mlp_layer_types", problem)
    stated = f.integer("first_k_dense_replace", dense, least=0)
    if min(stated, layers) != dense:
        problem = f"has {dense} dense layers, but first_k_dense_replace is {stated}"
        raise f.fail("mlp_layer_types", problem)
    return {"first_k_dense_replace": dense}


def _glm4_moe_lite(f: Fields) -> Read:
    """No token begins its texts: where the publisher has none, transformers writes token 0, "!"."""
    begins = f.get("bos_token_id")
    return Read(first_dense(f) | {"bos_token_id": None if begins == 0 else begins})


def _youtu(f: Fields) -> Read:
    f.get("embedding_initializer_range")  # of training
    if experts := f.get("n_routed_experts"):
        raise f.fail("n_routed_experts", f"is {experts!r}, but youtu's layers are dense")
    return Read({"n_routed_experts": None})


def _sarvam(f: Fields) -> Read:
    """Older files have the latent's size as `head_dim`, and another word for YaRN. Some fields
    state what each of these models has: norms of the latents, a bias for the choice of experts.
    """
    fields: dict[str, Any] = {}
    for name in ("use_qk_norm", "moe_router_enable_expert_bias"):
        if f.get(name, True) is not True:
            raise f.fail(name, f"is {f.get(name)!r}, but r1 implements only True")
    shared = f.get("n_shared_experts", 1) * f.integer("moe_intermediate_size")
    if f.get("moe_shared_expert_intermediate_size", shared) != shared:
        problem = f"is not {shared}: that of the shared experts together"
        raise f.fail("moe_shared_expert_intermediate_size", problem)
    latent = f.integer("kv_lora_rank") + f.integer("qk_rope_head_dim")
    if f.get("head_dim") == latent:
        fields["head_dim"] = None
    for name in ("rope_scaling", "rope_parameters"):
        rope = f.get(name)
        if isinstance(rope, dict):
            words = {k: "yarn" if v == "deepseek_yarn" else v for k, v in rope.items()}
            fields[name] = words
    return Read(fields)


def _mistral4(f: Fields) -> Read:
    """Its rope_parameters state what the file says elsewhere, and the queries' factor."""
    both = f.get("rope_parameters"), f.get("rope_scaling")
    rope: Any = next((each for each in both if each is not None), None)
    if None not in both and both[0] != both[1]:
        raise f.fail("rope_scaling", "and rope_parameters differ: mistral4 has one of them")
    beta = rope.get("llama_4_scaling_beta") if isinstance(rope, dict) else None
    if beta is None:
        problem = "has no llama_4_scaling_beta, by which queries grow with their positions"
        raise f.fail("rope_parameters", problem)
    kind = rope.get("rope_type", rope.get("type"))
    if kind != "yarn":
        raise f.fail("rope_parameters", f"has type {kind!r}, but mistral4 takes yarn")
    rotated = f.integer("qk_rope_head_dim")
    share = rotated / (rotated + f.integer("qk_nope_head_dim"))
    stated = rope.get("partial_rotary_factor", share)
    if stated != share:
        problem = f"has partial_rotary_factor = {stated!r}, but {share} of a head is rotated"
        raise f.fail("rope_parameters", problem)
    # transformers writes the context here too, and reads it nowhere.
    unread = ("partial_rotary_factor", "max_position_embeddings")
    rope = {key: value for key, value in rope.items() if key not in unread}
    return Read({"rope_parameters": rope, "rope_scaling": None})


def _deepseek_v32(f: Fields) -> Read:
    """Its indexer lets each query see the `index_topk` best keys: all, if there are no more."""
    for name in ("index_head_dim", "index_n_heads"):
        f.integer(name, 1)
    keys = f.integer("index_topk", 2048)
    kinds, layers = f.get("layer_types"), f.integer("num_hidden_layers")
    words = ("indexed_attention", "deepseek_sparse_attention")  # the latter until transformers 5.17
    alike = any(kinds == [word] * layers for word in words)
    if kinds is not None and not alike:
        problem = f"is {str(kinds)[:60]}, but r1 takes {words[0]} in each of {layers} layers"
        raise f.fail("layer_types", problem)
    reason = f"its indexer chooses all keys of up to {keys:,} tokens, so r1 runs so many at most"
    left_out = ((r"model\.layers\.\d+\.self_attn\.indexer\..*", reason),)
    why = f"beyond {keys:,} tokens its indexer chooses keys, which r1 does not implement"
    return Read(first_dense(f), left_out, keys, why)


FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family(),
    "kimi_k2": Family(),
    "deepseek_v2": Family("deepseek_v2"),
    "deepseek_v32": Family(missing={"first_k_dense_replace": 3}, read=_deepseek_v32),
    "glm4_moe_lite": Family(
        missing={"rms_norm_eps": 1e-5, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
                 "routed_scaling_factor": 1.8},
        read=_glm4_moe_lite,
    ),
    "youtu": Family(missing={"tie_word_embeddings": True}, read=_youtu),
    "youtu_llm": Family(missing={"tie_word_embeddings": True}, read=_youtu),
    "sarvam_mla": Family(
        names={"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts",
               "qk_head_dim": "q_head_dim"},
        missing={"q_lora_rank": None, "n_shared_experts": 1, "first_k_dense_replace": 1,
                 "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5},
        read=_sarvam,
    ),
    "mistral4": Family(
        "mistral4",
        missing={"n_shared_experts": 1, "first_k_dense_replace": 0},
        only={"n_group": (1,), "topk_group": (1,)},
        read=_mistral4,
    ),
}  # fmt: skip


def refusal(raw: Mapping[str, Any]) -> str:
    """What is wrong with the `model_type` of a config.json that is none of ours, after its name."""
    model_type, inner = raw.get("model_type"), raw.get("text_config")
    if isinstance(model_type, str) and model_type in NEAREST:
        why, nearest = NEAREST[model_type]
        return f"is {model_type!r}, which r1 does not run: it {why}; the nearest it runs: {nearest}"
    told = inner.get("model_type") if isinstance(inner, dict) else model_type
    name = told.lower() if isinstance(told, str) else ""
    runs = f"r1 runs only {', '.join((*FAMILIES, *WRAPPERS, *grouped_json.FAMILIES))}"
    return f"is {model_type!r}, but {runs}{nearest_to(name)}"


# ---------------------------- models of images around a model of text
_VISION = (
    "vision_config", "vision_feature_layer", "vision_tower", "image_token_id", "image_token_index",
    "video_token_id", "media_placeholder_token_id", "video_placeholder", "use_unified_vision_chunk",
    "multimodal_projector_bias", "projector_hidden_act", "projector_hidden_size",
    "projection_hidden_size", "projection_layer_norm_eps", "vision_start_token_id",
    "vision_end_token_id", "spatial_merge_size", "mm_projector_type", "ignore_index",
)  # fmt: skip
"""Fields of a wrapper that say nothing of the text model."""
_SHARED = (
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "quantization_config",
    "compression_config",
)  # fmt: skip
"""Fields that a wrapper may state for its text model."""
_SEES: LeftOut = (
    (
        r"(model\.)?(vision_tower|mm_projector|multi_modal_projector)\..*",
        "r1 reads text only, without the parts for images",
    ),
)
WRAPPERS: dict[str, tuple[str, ...]] = {
    "kimi_k25": ("kimi_k2", "deepseek_v3"),
    "mistral3": ("mistral4",),
}
"""A model of images -> the text models in its `text_config` that r1 runs."""


def spelled(raw: dict[str, Any], where: str) -> tuple[Fields, Family, Read]:
    """The fields of a text model under DeepSeek's names, and what its own fields say.

    Raises InputError for another family, and where its own fields contradict each other.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"{where}: model_type {refusal(raw)}")
    family = FAMILIES[model_type]
    given = {name for name, value in raw.items() if value is not None}  # null counts as missing
    names = {
        ours: theirs
        for ours, theirs in family.names.items()
        if theirs in given or (theirs in raw and ours not in given)
    }
    renamed = dict(raw)
    for ours, theirs in names.items():
        value = renamed.pop(theirs)
        if renamed.get(ours) not in (None, value):
            raise InputError(f"{where}: {theirs} is {value!r}, but {ours} is {renamed[ours]!r}")
        renamed[ours] = value
    f = Fields(renamed, where, names)
    f.get("model_type")
    read = family.read(f)
    renamed |= read.fields
    missing = {name: value for name, value in family.missing.items() if renamed.get(name) is None}
    renamed |= missing
    return f, family, read


def text_part(raw: dict[str, Any], where: str) -> tuple[dict[str, Any], str, LeftOut]:
    """The fields of the text model, the place where they are, and the tensors to go without.

    Raises InputError for a wrapper around another text model, or with unknown fields.
    """
    outer = Fields(raw, where)
    kind = outer.get("model_type")
    if not isinstance(kind, str) or kind not in WRAPPERS:
        return raw, where, ()
    inner = outer.get("text_config")
    if not isinstance(inner, dict):
        raise outer.fail("text_config", "is no JSON object: it holds the text model's fields")
    runs = WRAPPERS[kind]
    if inner.get("model_type") not in runs:
        name = inner.get("model_type")
        problem = f"has model_type {name!r}, and of {kind} r1 runs {', '.join(runs)}"
        near = nearest_to(name.lower()) if isinstance(name, str) else ""
        raise outer.fail("text_config", problem + near)
    for name in _VISION:
        outer.get(name)
    stated = {name: outer.get(name) for name in _SHARED}
    outer.unknown()
    own = {name: value for name, value in inner.items() if value is not None}
    for name, value in stated.items():
        if value is not None and not name.endswith("_id") and own.get(name, value) != value:
            raise outer.fail(name, f"is {str(value)[:60]}, and text_config says otherwise")
    stated = {name: value for name, value in stated.items() if value is not None}
    return {**inner, **stated, **own}, f"{where}: text_config", _SEES
