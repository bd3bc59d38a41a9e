"""What config.json means: its missing fields, its two spellings, and the edges of what is taken.

Holds r1/files/config_json.py, rope_fields.py and json_fields.py, and r1/model/config.py to account.
test_bad_files.py has fields that contradict each other, test_parity.py the arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
from models import FP8, V2, V3
from refusals import refused

from r1 import Config
from r1.files.config_json import dump_config, parse_config
from r1.files.json_fields import ARITHMETIC, HARMLESS
from r1.model.config import ExpertShape, Yarn
from r1.model.shapes import SHAPES

BARE = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
FILES = {
    "deepseek_v3": dump_config(V3) | {"rope_scaling": BARE},
    "deepseek_v2": dump_config(V2) | {"rope_scaling": BARE, "topk_method": "greedy"},
}


def read(family: str = "deepseek_v3", /, **fields: Any) -> Config:
    """The config of a file with these fields changed; None takes one away."""
    raw = FILES[family] | fields
    return parse_config({name: value for name, value in raw.items() if value is not None})


def flat(config: Config) -> dict[str, Any]:
    """All values by their fields' names, YaRN's too."""
    parts = (config.attention, config.experts, config.attention.yarn, config)
    return {k: v for part in parts if part for k, v in vars(part).items()}


# ---------------------------- missing fields
BOTH = {
    "rms_norm_eps": (3e-5, 1e-6),
    "rope_theta": (5e4, 1e4),
    "tie_word_embeddings": (True, False),
    "n_shared_experts": (3, 0),
    "num_nextn_predict_layers": (2, 0),
}
"""Field: a value of its own, and what transformers and the published files assume without it."""
MISSING: dict[str, dict[str, tuple[Any, Any]]] = {
    "deepseek_v3": BOTH | {"norm_topk_prob": (False, True), "scoring_func": ("sigmoid", "sigmoid"),
                           "topk_method": ("noaux_tc", "noaux_tc")},
    "deepseek_v2": BOTH | {"norm_topk_prob": (True, False), "scoring_func": ("softmax", "softmax"),
                           "topk_method": ("group_limited_greedy", "greedy"), "n_group": (2, 1),
                           "topk_group": (1, 1), "routed_scaling_factor": (3.0, 1.0)},
}  # fmt: skip
YARN = {"beta_fast": (16.0, 32.0), "beta_slow": (2.0, 1.0), "mscale": (0.5, 1.0),
        "mscale_all_dim": (0.5, 0.0)}  # fmt: skip


@pytest.mark.parametrize("family", MISSING)
def test_what_missing_fields_mean(family: str) -> None:
    for name, (own, assumed) in MISSING[family].items():
        assert flat(read(family, **{name: own}))[name] == own, name
        assert flat(read(family, **{name: None}))[name] == assumed, name
    assert read(family, bos_token_id=None, eos_token_id=None).eos_token_ids == ()
    assert read(family, bos_token_id=None).bos_token_id is None
    assert read(family, bos_token_id=[7, 8]).bos_token_id == 7


def test_what_missing_fields_of_yarn_mean() -> None:
    for name, (own, assumed) in YARN.items():
        assert flat(read(rope_scaling=BARE | {name: own}))[name] == own, name
        assert flat(read())[name] == assumed, name
    assert Yarn(4.0, 8) == read().attention.yarn, "so does the dataclass"


def test_without_experts_their_fields_are_not_needed() -> None:
    names = {field.name for field in dataclasses.fields(ExpertShape)} - {"n_routed_experts"}
    dense = FILES["deepseek_v3"] | {"n_routed_experts": None}
    found = parse_config({k: v for k, v in dense.items() if k not in names})
    assert found.experts == ExpertShape()


@pytest.mark.parametrize(
    "name",
    ["num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group",
     "first_k_dense_replace", "routed_scaling_factor"],
)  # fmt: skip
def test_with_experts_they_are(name: str) -> None:
    with refused(f"^config: {name} is missing"):
        read(**{name: None})


# ---------------------------- spellings
def test_newer_versions_of_transformers_spell_fields_otherwise() -> None:
    plain = read(rope_theta=5e4)
    own = {"rope_theta": 5e4} | {{"type": "rope_type"}.get(k, k): v for k, v in BARE.items()}
    assert read(rope_theta=None, rope_scaling=None, rope_parameters=own) == plain
    own = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 1.0}
    flat_ = read(rope_theta=5e4, rope_scaling=None)
    assert read(rope_theta=None, rope_scaling=None, rope_parameters=own) == flat_
    assert read(num_nextn_predict_layers=None, num_mtp_layers=1) == read(num_nextn_predict_layers=1)
    assert read(model_type="kimi_k2") == read()


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"rope_type": "default", "factor": 4.0}, "has factor, which r1 does not know"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "has partial_rotary_factor"),
        (BARE | {"partial_rotary_factor": 0.5}, "has partial_rotary_factor = 0.5, not 1"),
        ({"full_attention": {"rope_type": "default"}}, "one entry per layer type"),
        ("yarn", "rope_parameters is 'yarn', which is no JSON object"),
    ],
)
def test_rotations_that_are_refused(own: Any, said: str) -> None:
    with refused(said):
        read(rope_scaling=None, rope_parameters=own)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_config_is_written_as_it_is_read(shape: str) -> None:
    config = SHAPES[shape].change(eos_token_ids=(1, 2))
    written = dump_config(config)
    assert parse_config(written) == config
    names = {"deepseek_v3": "DeepseekV3", "deepseek_v2": "DeepseekV2"}
    name = names.get(config.model_type, config.model_type.capitalize())
    assert written["architectures"] == [f"{name}ForCausalLM"]
    heads = getattr(config.attention, "num_key_value_heads", config.attention.num_attention_heads)
    assert written["num_key_value_heads"] == heads
    assert written["eos_token_id"] == [1, 2]
    assert dump_config(config.change(eos_token_ids=(3,)))["eos_token_id"] == 3
    assert dump_config(config.change(eos_token_ids=()))["eos_token_id"] is None


def test_fp8_is_written_as_r1s_file_has_it() -> None:
    assert dump_config(FP8)["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [16, 16],
    }  # fmt: skip
    assert read(quantization_config={"quant_method": "fp8", "weight_block_size": [8, 4]}) == (
        read().change(fp8_block=(8, 4))
    )
    for block in ([8], [8, 4, 2], [8, 4.0], "84", None):
        with refused("weight_block_size"):
            read(quantization_config={"quant_method": "fp8", "weight_block_size": block})


# ---------------------------- edges
FACTOR = 0.1 * math.log(4.0) + 1.0
"""What cos and sin are multiplied by, for BARE's missing mscales."""
EDGES: dict[str, tuple[Any, Any]] = {
    "num_hidden_layers": (1000, 1001),
    "num_nextn_predict_layers": (1000, 1001),
    "max_position_embeddings": (10**9, 10**9 + 1),
    "hidden_size": (10**6, 10**6 + 1),
    "bos_token_id": (47, 48),
    "eos_token_id": ([0, 47], [0, 48]),
    "n_group": (4, 8),  # of 8 experts: noaux_tc looks at the two best of each group
    "topk_group": (4, 5),
    "num_experts_per_tok": (4, 5),
    "rope_theta": (1.1, 1),
    "head_dim": (V3.attention.qk_head_dim, 9),
    "qk_head_dim": (V3.attention.qk_head_dim, 19),
    "num_key_value_heads": (2, 1),
    "num_local_experts": (8, 7),
}
"""Field: a value that is taken, and the next one, which is not."""
YARN_EDGES: dict[str, tuple[Any, Any]] = {
    "factor": (1.0, 0.99),
    "original_max_position_embeddings": (10**9, 10**9 + 1),
    "beta_slow": (32.0, 32.1),
    "attention_factor": (FACTOR * (1 + 1e-7), FACTOR * (1 + 1e-5)),
    "truncate": (True, False),
}


@pytest.mark.parametrize("name", EDGES)
def test_the_edges_of_what_is_taken(name: str) -> None:
    taken, beyond = EDGES[name]
    read(**{name: taken})
    with refused(f"^config: {name} "):
        read(**{name: beyond})


@pytest.mark.parametrize("name", YARN_EDGES)
def test_the_edges_of_yarn(name: str) -> None:
    taken, beyond = YARN_EDGES[name]
    read(rope_scaling=BARE | {name: taken})
    with refused("^config: rope_scaling has ", name):
        read(rope_scaling=BARE | {name: beyond})
    with refused("original_max_position_embeddings = 0"):
        read(rope_scaling=BARE | {"original_max_position_embeddings": 0})


def test_a_greedy_choice_knows_no_groups() -> None:
    """V2-Lite's file has groups, and its router ignores them: all experts can be chosen."""
    groups = {"n_group": 4, "topk_group": 1}
    assert read("deepseek_v2", **groups, num_experts_per_tok=8).experts.num_experts_per_tok == 8
    assert read("deepseek_v2", **groups | {"n_group": 3}).experts.n_group == 3
    with refused("only 2 experts can be chosen"):
        read("deepseek_v2", **groups, topk_method="group_limited_greedy", num_experts_per_tok=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rms_norm_eps", True), ("rms_norm_eps", -1e-6), ("rope_theta", True),
        ("bos_token_id", True), ("bos_token_id", -1), ("eos_token_id", [1, -1]),
        ("eos_token_id", [False]), ("hidden_size", True), ("tie_word_embeddings", 1),
    ],
)  # fmt: skip
def test_values_of_another_kind(name: str, value: Any) -> None:
    with refused(f"^config: {name} "):
        read(**{name: value})


def test_a_change_of_no_field_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="Config has no many_heads, size"):
        V3.change(size=3, hidden_size=4, many_heads=5)
    changed = V3.change(hidden_size=4, n_group=1, kv_lora_rank=7, fp8_block=(1, 2))
    assert flat(changed) | {"hidden_size": 32, "n_group": 4, "kv_lora_rank": 24} == flat(V3) | {
        name: flat(changed)[name] for name in ("attention", "experts", "files")
    }
    assert changed.files.fp8_block == (1, 2)


# ---------------------------- unknown fields
UNKNOWN = """
attn_temperature_tuning attention_multiplier rope_local_base_freq rotary_pct use_qk_norm num_experts
moe_k gate_fn gating routing_method score_func scale_depth soft_cap use_sliding_window qkv_bias
n_head o_lora_rank dim patch_size ffn_act activation n_layer topk_share mixture_top_k indexer
mtp_depth use_nextn residual_multiplier quantize use_hash d_conv embedding_multiplier softmax_logits
o_groups n_hidden n_positions hc_mult
""".split()  # noqa: SIM905
"""Fields that change the arithmetic, most of them from published configs of other models: Granite,
Llama 4, Gemma 3, GPT-NeoX, Qwen, Ernie 4.5, MiniCPM, GPT-2, Falcon, Mamba, later DeepSeeks."""
WINDOWS = ("swa", "sliding_window")


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_field_that_may_change_the_arithmetic(name: str) -> None:
    with refused(f"^config: {name} = 3 is unknown to r1"):
        read(**{name: 3})
    assert read(**{name: 0}) == read(**{name: False}) == read(**{name: []}) == read()
    assert read(**{f"_{name}": 3}) == read(), "a private note of the library"


def test_each_part_of_the_rule_is_needed() -> None:
    """Some field above is refused by this part alone."""
    parts = ARITHMETIC.pattern.split("|")
    for part in parts:
        others = re.compile("|".join(each for each in parts if each != part))
        assert any(not others.search(name) for name in UNKNOWN), part


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_refused_by_name(name: str) -> None:
    with refused(f"^config: {name} asks for windowed attention"):
        read(**{name: 4096})


WRITTEN = """
add_cross_attention attention_dropout attn_implementation chunk_size_feed_forward
cross_attention_hidden_size encoder_no_repeat_ngram_size ep_size experts_implementation
hidden_dropout layerdrop model_parallel_size no_repeat_ngram_size num_beam_groups output_attentions
output_hidden_states output_router_logits output_scores router_aux_loss_coef router_jitter_noise
router_z_loss_coef tensor_parallel_size top_k
""".split()  # noqa: SIM905
"""Fields that transformers writes into every config, or of training and of placement."""


def test_fields_that_change_no_arithmetic() -> None:
    """They are ignored. Each has a name that suggests arithmetic, or it needed no mention."""
    assert read(**dict.fromkeys(WRITTEN, 3)) == read()
    assert set(WRITTEN) == HARMLESS and all(map(ARITHMETIC.search, HARMLESS))
    assert read(dtype="bfloat16", auto_map={"x": "y"}, use_cache=True, license="mit") == read()
