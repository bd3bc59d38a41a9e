"""R1's sisters: how their config.json is read, and how their tensors lie in the files.

Holds to account: r1/files/families.py, r1/files/layouts.py and r1/model/temper.py. test_parity.py
compares their arithmetic with transformers', test_real_tokenizers.py GLM's text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import writers
from cases import REFERENCE, reference
from folders import load, rewrite, tensors
from models import FP8, V2, V3, model
from quantizing.source import Source
from refusals import CPU, refused
from tolerances import atol

import r1
from r1 import Backend, Config, build
from r1.files.config_json import dump_config, load_config, parse_config
from r1.files.families import FAMILIES, WRAPPERS
from r1.files.layouts import tensors_of
from r1.files.names import places
from r1.files.nearest import NEAREST
from r1.files.save import save
from r1.model.config import FileFormat
from r1.model.shapes import SHAPES
from r1.model.temper import query_factor
from r1.model.transformer import Transformer
from r1.placement.mesh import Mesh
from r1.roofline import step_work
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

Raw = dict[str, Any]

# ---------------------------- as their publishers spell them
GLM: Raw = {
    "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite",
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 10240, "max_position_embeddings": 202752, "moe_intermediate_size": 1536,
    "topk_method": "noaux_tc", "norm_topk_prob": True, "num_attention_heads": 20, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 1, "routed_scaling_factor": 1.8,
    "num_experts_per_tok": 4, "first_k_dense_replace": 1, "num_hidden_layers": 47,
    "num_key_value_heads": 20, "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1000000, "dtype": "bfloat16",
    "tie_word_embeddings": False, "q_lora_rank": 768, "kv_lora_rank": 512, "v_head_dim": 256,
    "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "vocab_size": 154880,
    "eos_token_id": [154820, 154827, 154829], "pad_token_id": 154820,
}  # fmt: skip
YOUTU: Raw = {
    "architectures": ["YoutuForCausalLM"], "model_type": "youtu", "hidden_size": 2048,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 32,
    "intermediate_size": 6144, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_head_dim": 192,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_interleave": True,
    "rope_parameters": {"rope_theta": 1600000, "rope_type": "default"}, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "head_dim": 64, "mlp_bias": False,
    "bos_token_id": 128000, "eos_token_id": 128001, "embedding_initializer_range": 0.04,
}  # fmt: skip
SARVAM: Raw = {
    "architectures": ["SarvamMLAForCausalLM"], "model_type": "sarvam_mla", "hidden_size": 4096,
    "num_hidden_layers": 32, "intermediate_size": 16384, "moe_intermediate_size": 2048,
    "num_attention_heads": 64, "num_experts": 128, "num_experts_per_tok": 8,
    "num_shared_experts": 1, "first_k_dense_replace": 1, "vocab_size": 262144, "head_dim": 576,
    "max_position_embeddings": 131072, "rope_theta": 10000.0, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "q_head_dim": 192,
    "rope_scaling": {"type": "deepseek_yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1,
                     "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096},
}  # fmt: skip
"""Its own names, with R1's YaRN: no copy of the published settings was at hand."""
MISTRAL_TEXT: Raw = {
    "model_type": "mistral4", "vocab_size": 131072, "hidden_size": 4096, "head_dim": 128,
    "intermediate_size": 12288, "moe_intermediate_size": 2048, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 32, "n_shared_experts": 1,
    "n_routed_experts": 128, "routed_scaling_factor": 1.0, "kv_lora_rank": 256,
    "q_lora_rank": 1024, "qk_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 64, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4,
    "first_k_dense_replace": 0, "norm_topk_prob": True, "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-6, "pad_token_id": 11, "bos_token_id": 1, "eos_token_id": 2,
    "rope_interleave": True, "sliding_window": None,
    "rope_parameters": {"type": "yarn", "rope_type": "yarn", "rope_theta": 10000.0, "factor": 128.0,
                        "original_max_position_embeddings": 8192, "beta_fast": 32.0,
                        "max_position_embeddings": 1048576, "beta_slow": 1.0, "mscale": 1.0,
                        "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
                        "partial_rotary_factor": 0.5},
}  # fmt: skip
MISTRAL: Raw = {
    "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
    "image_token_index": 10, "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
    "spatial_merge_size": 2, "text_config": MISTRAL_TEXT, "tie_word_embeddings": False,
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024}, "vision_feature_layer": -1,
}  # fmt: skip
V2_CONFIG: Raw = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "ep_size": 1,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 5120,
    "initializer_range": 0.02, "intermediate_size": 12288, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1536,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 160, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 128, "num_experts_per_tok": 6,
    "num_hidden_layers": 60, "num_key_value_heads": 128, "pretraining_tp": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    "rope_theta": 10000, "routed_scaling_factor": 16.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 3, "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
V32: Raw = dump_config(SHAPES["r1"]) | {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32",
    "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
}  # fmt: skip


def kimi(**outer: Any) -> Raw:
    text = dump_config(SHAPES["kimi-k2"]) | {"model_type": "kimi_k2"}
    return {
        "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25",
        "bos_token_id": 163584, "eos_token_id": 163585, "text_config": text,
        "media_placeholder_token_id": 163605, "use_unified_vision_chunk": True,
        "vision_config": {"mm_hidden_size": 1152, "patch_size": 14}, **outer,
    }  # fmt: skip


def bare(config: Config) -> Config:
    """A config without what its files hold beside the model."""
    return dataclasses.replace(config, files=FileFormat(config.files.fp8_block), shortened="")


def test_the_published_spellings() -> None:
    assert parse_config(GLM) == SHAPES["glm-4.7-flash"]
    assert (
        parse_config(YOUTU)
        == SHAPES["youtu-2b"]
        == parse_config(YOUTU | {"model_type": "youtu_llm"})
    )
    assert bare(parse_config(MISTRAL)) == SHAPES["mistral-small-4"] == parse_config(MISTRAL_TEXT)
    assert bare(parse_config(kimi())) == SHAPES["kimi-k2"]
    assert parse_config(V2_CONFIG) == SHAPES["v2"]
    sarvam = parse_config(SARVAM)
    assert (sarvam.experts.n_routed_experts, sarvam.experts.routed_scaling_factor) == (128, 2.5)
    assert sarvam.attention.yarn == SHAPES["r1"].attention.yarn and not sarvam.attention.q_lora_rank
    v32 = parse_config(V32)
    assert bare(v32) == SHAPES["r1"].change(max_position_embeddings=2048)
    assert "indexer" in v32.shortened and "2,048" in v32.context


@pytest.mark.parametrize("name", ["glm-4.7-flash", "youtu-2b", "mistral-small-4"])
def test_a_sister_is_written_as_it_is_read(name: str) -> None:
    written = dump_config(SHAPES[name])
    assert parse_config(written) == SHAPES[name]
    assert ("llama_4_scaling_beta" in str(written)) == (name == "mistral-small-4")


def test_a_null_is_no_second_name() -> None:
    own = {k: v for k, v in SARVAM.items() if k != "num_experts"} | {"n_routed_experts": 128}
    assert parse_config(own | {"num_experts": None}) == parse_config(SARVAM)


def test_a_factor_of_one_is_written_too() -> None:
    flat = parse_config(MISTRAL_TEXT | {"rope_parameters": ROPE | {"llama_4_scaling_beta": 0}})
    assert parse_config(dump_config(flat)) == flat


def test_the_words_of_transformers_5() -> None:
    listed = {k: v for k, v in GLM.items() if k not in ("first_k_dense_replace", "topk_method")}
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 1.0}
    listed |= {"mlp_layer_types": ["dense"] + ["sparse"] * 46, "rope_parameters": rope}
    listed |= {"rope_theta": None, "rope_scaling": None, "head_dim": 64, "num_local_experts": 64}
    listed |= {"bos_token_id": 0}
    assert parse_config(listed) == SHAPES["glm-4.7-flash"]
    own = {k: v for k, v in SARVAM.items() if k not in ("num_experts", "num_shared_experts")}
    own |= {"n_routed_experts": 128, "n_shared_experts": 1, "head_dim": 64}
    assert parse_config(own) == parse_config(SARVAM)
    own = {"use_qk_norm": True, "moe_router_enable_expert_bias": True, "is_causal": True}
    own |= {"moe_shared_expert_intermediate_size": SARVAM["moe_intermediate_size"]}
    assert parse_config(SARVAM | own) == parse_config(SARVAM)
    for word in ("indexed_attention", "deepseek_sparse_attention"):
        assert parse_config(V32 | {"layer_types": [word] * 61}) == parse_config(V32)
    images = {"projection_hidden_size": 32, "projection_layer_norm_eps": 1e-5}
    assert parse_config(kimi(**images, vision_start_token_id=7)) == parse_config(kimi())


# ---------------------------- what is refused
ROPE = MISTRAL_TEXT["rope_parameters"]
WRONG: dict[str, tuple[Raw, str]] = {
    "a name of its own": (SARVAM | {"num_experts": 0.5}, "config: num_experts is 0.5"),
    "two names": (
        SARVAM | {"n_routed_experts": 8},
        "num_experts is 128, but n_routed_experts is 8",
    ),
    "layers mixed": (
        GLM | {"mlp_layer_types": ["sparse"] + ["dense"] * 46},
        "mlp_layer_types is no list of num_hidden_layers words, first dense ones",
    ),
    "layers twice": (
        GLM | {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 45},
        "mlp_layer_types has 2 dense layers, but first_k_dense_replace is 1",
    ),
    "a bias": (YOUTU | {"attention_bias": True}, "attention_bias is True, but r1 implements only"),
    "rope in halves": (YOUTU | {"rope_interleave": False}, "rope_interleave is False"),
    "experts": (YOUTU | {"num_experts": 8}, "num_experts = 8 is unknown to r1"),
    "groups": (MISTRAL_TEXT | {"n_group": 2}, "n_group is 2, but r1 implements only 1"),
    "no factor": (
        MISTRAL_TEXT | {"rope_parameters": ROPE | {"llama_4_scaling_beta": None}},
        "rope_parameters has no llama_4_scaling_beta",
    ),
    "no yarn": (
        MISTRAL_TEXT | {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
        "rope_parameters has type 'default', but mistral4 takes yarn",
    ),
    "another share": (
        MISTRAL_TEXT | {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
        "partial_rotary_factor = 1.0, but 0.5 of a head is rotated",
    ),
    "R1 with a factor": (
        V32 | {"rope_scaling": V32["rope_scaling"] | {"llama_4_scaling_beta": 0.1}},
        "rope_scaling has llama_4_scaling_beta, which r1 reads of mistral4 only",
    ),
    "no list of words": (
        V32 | {"layer_types": [["indexed_attention"]]},
        "layer_types is .*, but r1 takes indexed_attention in each of 61 layers",
    ),
    "too few words": (V32 | {"layer_types": ["indexed_attention"]}, "in each of 61 layers"),
    "all tokens": (GLM | {"is_causal": False}, "is_causal is False, but r1 implements only True"),
    "no norms": (SARVAM | {"use_qk_norm": False}, "use_qk_norm is False, but r1 implements only"),
    "no bias of experts": (
        SARVAM | {"moe_router_enable_expert_bias": False},
        "moe_router_enable_expert_bias is False",
    ),
    "wider shared experts": (
        SARVAM | {"moe_shared_expert_intermediate_size": 4096},
        "moe_shared_expert_intermediate_size is not 2048",
    ),
    "a word for a number": (
        GLM | {"mlp_layer_types": ["dense"] + ["sparse"] * 46, "first_k_dense_replace": "1"},
        "first_k_dense_replace is '1'",
    ),
    "experts of a dense model": (YOUTU | {"n_routed_experts": 8}, "n_routed_experts is 8, but you"),
    "two rotations": (
        MISTRAL_TEXT | {"rope_scaling": ROPE | {"factor": 2.0}},
        "rope_scaling and rope_parameters differ",
    ),
    "other layers": (V32 | {"layer_types": ["full_attention"] * 61}, "layer_types is .* of 61 lay"),
    "other text": (
        MISTRAL | {"text_config": {"model_type": "ministral3"}},
        "model_type 'ministral3', and of mistral3 r1 runs mistral4: the nearest is llama",
    ),
    "no text": (kimi(text_config=None), "text_config is no JSON object"),
    "inside": (
        kimi(text_config=dump_config(SHAPES["kimi-k2"]) | {"n_group": 5}),
        "config: text_config: n_group is 5",
    ),
    "tied outside": (
        kimi(tie_word_embeddings=True),
        "tie_word_embeddings is True, and text_config",
    ),
    "unknown outside": (kimi(logit_cap=3), "config: logit_cap = 3 is unknown to r1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_fields_that_are_refused(case: str) -> None:
    raw, said = WRONG[case]
    with refused(said):
        parse_config(raw)


@pytest.mark.parametrize("name", NEAREST)
def test_relatives_are_refused_by_name(name: str) -> None:
    with refused(f"model_type is '{name}', which r1 does not run: it .*; the nearest it runs: "):
        parse_config(V32 | {"model_type": name})
    assert name not in FAMILIES.keys() | WRAPPERS.keys()
    assert NEAREST[name][1].split()[0] in FAMILIES


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        *((name, "llama, ") for name in ("ministral3", "arcee", "falcon", "glm4", "ernie4_5")),
        *((name, "deepseek_v3, ") for name in ("bailing_moe", "ernie4_5_moe", "minimax_m2")),
        *((name, "qwen2 or qwen3, ") for name in ("qwen3_moe", "qwen2_vl")),
    ],
)
def test_any_other_model_has_a_nearest_one(name: str, nearest: str) -> None:
    with refused(f"model_type is '{name}', but r1 runs only .*: the nearest is {nearest}"):
        parse_config(V32 | {"model_type": name})


@pytest.mark.parametrize("name", ["gpt2", None, ["deepseek_v3"]])
def test_any_other_model_is_refused(name: Any) -> None:
    with refused("model_type is .*, but r1 runs only deepseek_v3, .*mistral4, kimi_k25, mistral3"):
        parse_config(V32 | {"model_type": name})


# ---------------------------- models of images
PREFIXES = [
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
]


def wrapped(case: str, kind: str, prefix: tuple[str, str], folder: Path) -> Path:
    """A reference case as the text part of a model of images."""
    shutil.copytree(REFERENCE / case, folder)
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": kind, "text_config": text, "vision_config": {"hidden_size": 8}}
    (folder / "config.json").write_text(json.dumps(outer))
    (folder / "reference.safetensors").unlink()

    def rename(found: dict[str, torch.Tensor]) -> None:
        for key in list(found):
            body, head = key.startswith("model."), prefix
            new = head[0] + key[6:] if body else head[1] + key.removeprefix("lm_head.")
            found[new] = found.pop(key)
        for name in ("vision_tower.encoder.weight", "mm_projector.0.bias"):
            found[name] = torch.ones(2, 2)
        found["model.multi_modal_projector.norm.weight"] = torch.ones(2)

    rewrite(folder, rename)
    return folder


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("case", "kind"), [("v3-plain", "kimi_k25"), ("mistral4", "mistral3")])
def test_the_text_of_a_model_of_images(
    case: str, kind: str, prefix: tuple[str, str], tmp_path: Path
) -> None:
    folder = wrapped(case, kind, prefix, tmp_path / "model")
    engine = r1.load(folder, Backend(device="cpu", dtype="fp32", prefill_moe="loop"), quiet=True)
    off = (engine.logits(reference(case)["tokens"]) - reference(case)["logits"]).abs().max()
    assert off < atol("reference fp32")
    _, report = load(folder, dtype="fp32")
    assert report.sentences() == [
        "3 tensors not loaded: r1 reads text only, without the parts for images"
    ]


def test_images_have_no_place_in_a_model_of_text(tmp_path: Path) -> None:
    folder = wrapped("v3-plain", "kimi_k25", PREFIXES[0], tmp_path / "model")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(json.dumps(text))
    with refused("vision_tower.encoder.weight.* for which config.json's model has no place"):
        load(folder)


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    folder = wrapped("v3-plain", "kimi_k25", PREFIXES[0], tmp_path / "model")
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(26)}))
    with refused("has both .*, which are one tensor of the model, model.norm.weight"):
        load(folder)


@pytest.mark.parametrize("quant", ["none", "int4"])
def test_packed_numbers_in_the_text_of_a_model_of_images(quant: str, tmp_path: Path) -> None:
    """Kimi-K2.5's experts: int4, told in text_config, and the prefix before all names."""
    folder = tmp_path / "model"
    save(model(V3.change(num_nextn_predict_layers=0)), folder)
    writers.write(folder, "compressed-tensors int4", only=".experts.")
    before = {name: t.clone() for name, t in places(load(folder, quant=quant)[0]).items()}
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "kimi_k25", "text_config": text, "vision_config": {}})
    )
    rewrite(folder, lambda t: t.update({f"language_model.{k}": t.pop(k) for k in list(t)}))
    assert load_config(folder).files.kind == "int4"
    same(folder, before, mtp=False, quant=quant)


# ---------------------------- stacks of experts
def stack(found: dict[str, torch.Tensor], one_scale: bool = False) -> None:
    """The experts of each layer in stacks, as transformers 5 writes them."""
    for module in {key.split(".experts.")[0] for key in found if ".experts." in key}:
        prefix, count = f"{module}.experts", 8
        for ending, added in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
            if f"{prefix}.0.gate_proj.{ending}" not in found:
                continue
            gate, up, down = (
                torch.stack([found.pop(f"{prefix}.{i}.{n}_proj.{ending}") for i in range(count)])
                for n in ("gate", "up", "down")
            )
            joined = gate if one_scale and added else torch.cat((gate, up), dim=1)
            found[f"{prefix}.gate_up_proj{added}"] = joined
            found[f"{prefix}.down_proj{added}"] = down


def same(folder: Path, before: dict[str, torch.Tensor], mtp: bool = True, **switches: Any) -> None:
    """Fail unless the folder's model has these tensors."""
    after = places(load(folder, mtp=mtp, **switches)[0])
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.float(), after[name].float()), name


@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_stacks_load_as_the_matrices_do(quant: str, tmp_path: Path) -> None:
    """In bf16; in FP8 blocks of 16 x 16 (I = 16, so gate and up share none), packed or not."""
    for name, config in (("bf16", V3), ("fp8", FP8)):
        folder = tmp_path / name
        save(model(config, mtp=True), folder)
        asked = quant if name == "fp8" else "none"
        before = {k: v.clone() for k, v in places(load(folder, mtp=True, quant=asked)[0]).items()}
        rewrite(folder, stack)
        assert any(key.endswith("experts.gate_up_proj") for key in tensors(folder))
        same(folder, before, quant=asked)


@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_stacks_with_one_scale_for_each_expert(quant: str, tmp_path: Path) -> None:
    """As Mistral-Small-4's: a scale (E, 1, 1) for gate and up together, and one of activations."""
    folder = tmp_path / "model"
    save(model(V3, mtp=True), folder)

    def quantize(found: dict[str, torch.Tensor]) -> None:
        for key in [key for key in found if ".experts." in key]:
            found[key] = found[key].float().to(torch.float8_e4m3fn)
            scale = 2.0 if "down" in key else 0.5
            found[f"{key}_scale_inv"] = torch.tensor([[scale]])

    rewrite(folder, quantize)
    described = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    writers.set_config(folder, quantization_config=described)
    before = {k: v.clone() for k, v in places(load(folder, mtp=True, quant=quant)[0]).items()}
    rewrite(folder, lambda found: stack(found, one_scale=True))
    scales = {
        "gate_up_proj_activation_scale": torch.ones(8),
        "down_proj_activation_scale": torch.ones(8),
    }
    rewrite(
        folder,
        lambda t: t.update({f"model.layers.1.mlp.experts.{k}": v for k, v in scales.items()}),
    )
    same(folder, before, quant=quant)
    _, report = load(folder)
    assert len(report.skipped["r1 does not quantize activations or the cache"]) == 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("grid", [{"tp": 2}, {"ep": 2}])
def test_a_rank_reads_its_part_of_a_stack(grid: dict[str, int], rank: int, tmp_path: Path) -> None:
    """The same part as of single matrices: some of the experts, or of each one's inner values."""
    folder = tmp_path / "model"
    config = V3.change(moe_intermediate_size=128, intermediate_size=128)
    save(model(config), folder)
    backend = resolve(Backend(device="cpu", dtype="fp32", **grid), config)  # type: ignore[arg-type]
    parts = []
    for _ in range(2):
        placement = build.placement_of(config, backend, Mesh(backend.tp, backend.ep, rank))
        part, _ = build.from_checkpoint(folder, config, backend, quiet=True, placement=placement)
        parts.append({name: tensor.clone() for name, tensor in places(part).items()})
        rewrite(folder, stack)
    single, stacked = parts
    assert single.keys() == stacked.keys()
    assert all(torch.equal(single[name], stacked[name]) for name in single)


@pytest.mark.parametrize("shape", [(8, 31, 32), (16, 32), (2**40, 0, 32), (0, 32, 32)])
def test_a_stack_of_another_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    save(model(V2), tmp_path / "model")
    rewrite(tmp_path / "model", stack)
    key = "model.layers.1.mlp.experts.gate_up_proj"
    rewrite(tmp_path / "model", lambda t: t.update({key: torch.zeros(shape)}))
    with refused(r"gate_up_proj has shape \(.*a stack of experts has three dimensions"):
        load(tmp_path / "model")


def test_a_stack_with_a_block_of_two_matrices(tmp_path: Path) -> None:
    """Gate and up of 10 rows each, in blocks of 16: the second block has rows of up alone, the
    first one rows of both.
    """
    save(model(FP8.change(moe_intermediate_size=10)), tmp_path / "model")
    rewrite(tmp_path / "model", stack)
    assert tensors(tmp_path / "model")["model.layers.1.mlp.experts.gate_up_proj_scale_inv"].shape[
        :2
    ] == (8, 2)
    for quant in ("none", "fp8"):
        with refused("row 10 begins another matrix within 16 rows that share a scale"):
            load(tmp_path / "model", quant=quant)


def test_a_stack_s_matrices_know_their_place(tmp_path: Path) -> None:
    found = tensors_of(REFERENCE / "mistral4")
    up = found["model.layers.0.mlp.experts.3.up_proj.weight"]
    assert (up.key, up.shape, up.place) == (
        "model.layers.0.mlp.experts.gate_up_proj",
        (7, 26),
        (3, 7),
    )


# ---------------------------- DeepSeek-V3.2
def test_v3_2_within_its_indexer_s_keys() -> None:
    engine = r1.load(REFERENCE / "v32", CPU, quiet=True)
    assert engine.config.max_position_embeddings == 40
    _, report = load(REFERENCE / "v32")
    (said,) = report.sentences()
    assert said.startswith("10 tensors not loaded: its indexer chooses all keys of up to 40 tokens")
    assert engine.generate([[1] * 38], 2, temperature=0.0)[0].tokens
    with refused("41 tokens, more than the context of 40 .beyond 40 tokens its indexer chooses"):
        engine.generate([[1] * 41], 1)
    with refused("no room for an answer in a context of 40 .beyond 40 tokens its indexer"):
        engine.generate([[1] * 40], 1)


def test_an_indexer_in_fp8(tmp_path: Path) -> None:
    """V3.2's own files: its projections are FP8 blocks too, and k_norm has a bias."""
    save(model(FP8), tmp_path / "model")
    writers.set_config(tmp_path / "model", model_type="deepseek_v32", index_topk=32)

    def add(found: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            stem = f"model.layers.{layer}.self_attn.indexer"
            found[f"{stem}.wq_b.weight"] = torch.ones(32, 20).to(torch.float8_e4m3fn)
            found[f"{stem}.wq_b.weight_scale_inv"] = torch.ones(2, 2)
            found |= {f"{stem}.k_norm.{name}": torch.ones(16) for name in ("weight", "bias")}

    rewrite(tmp_path / "model", add)
    loaded, report = load(tmp_path / "model")
    assert loaded.config.max_position_embeddings == 32
    assert len(report.skipped[loaded.config.files.left_out[0][1]]) == 6


def test_quantizing_would_lose_an_indexer() -> None:
    with refused("v32 holds parts that r1 does not read, and a copy would lack them"):
        Source(REFERENCE / "v32")


def test_glm_s_mtp_layer_is_v3_s(tmp_path: Path) -> None:
    """Not loaded means said so, and asked for it is loaded."""
    save(model(V3, mtp=True), tmp_path / "model")
    writers.set_config(tmp_path / "model", model_type="glm4_moe_lite")
    _, report = load(tmp_path / "model")
    (said,) = report.sentences()
    assert "MTP layers are loaded only when asked for" in said
    assert len(load(tmp_path / "model", mtp=True)[0].mtp) == 1


def test_a_shorter_context_needs_no_reason() -> None:
    short = parse_config(V32 | {"max_position_embeddings": 1024})
    assert (short.max_position_embeddings, short.shortened, short.context) == (1024, "", "1024")


# ---------------------------- the bytes of a step
@pytest.mark.parametrize(
    ("name", "layer", "sparse", "dense", "routers"),
    [
        ("glm-4.7-flash", 2048 * (768 + 576) + 768 * 20 * 256 + 512 * 20 * 448 + 20 * 256 * 2048,
         (46, 5 * 3 * 2048 * 1536), 3 * 2048 * 10240 + 154880 * 2048, 46 * 64 * 2048),
        ("v2", 5120 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 5120,
         (59, 8 * 3 * 5120 * 1536), 3 * 5120 * 12288 + 102400 * 5120, 59 * 160 * 5120),
        ("youtu-2b", 2048 * (1536 + 576) + 1536 * 16 * 192 + 512 * 16 * 256 + 16 * 128 * 2048,
         (0, 0), 32 * 3 * 2048 * 6144 + 128256 * 2048, 0),
        ("mistral-small-4", 4096 * (1024 + 320) + 1024 * 32 * 128 + 256 * 32 * 192
         + 32 * 128 * 4096, (36, 5 * 3 * 4096 * 2048), 131072 * 4096, 36 * 128 * 4096),
    ],
)  # fmt: skip
def test_a_step_s_bytes_by_hand(
    name: str, layer: int, sparse: tuple[int, int], dense: int, routers: int
) -> None:
    """One row in bf16: every matrix once, the chosen and shared experts, routers in fp32."""
    config = SHAPES[name]
    backend = resolve(Backend(device="cpu", dtype="bf16"), config)
    hit = config.experts.num_experts_per_tok if sparse[0] else 0
    work = step_work(config, backend, 1, 1, 100, hit)
    numbers = config.num_hidden_layers * layer + sparse[0] * sparse[1] + dense
    row = 2 * config.hidden_size
    assert work.weight_bytes == 2 * numbers + 4 * routers + row
    assert work.cache_bytes == 101 * 2 * config.attention.latent_dim * config.num_hidden_layers
    one, none = config.change(num_hidden_layers=1), config.change(num_hidden_layers=0)
    assert step_work(one, backend, 1, 1, 9, 1).nbytes > step_work(none, backend, 1, 1, 9, 1).nbytes


def test_v2_has_236_billion_numbers() -> None:
    """Its own name for its size; the published files have 471.5 GB in bf16."""
    with torch.device("meta"):
        whole = Transformer(SHAPES["v2"])
    assert sum(p.numel() for p in whole.parameters()) == 235_741_434_880


# ---------------------------- Mistral 4's factor
def test_the_factor_of_a_query() -> None:
    yarn = SHAPES["mistral-small-4"].attention.yarn
    assert yarn is not None
    positions = torch.tensor([[0, 8191, 8192, 16383, 16384, 1048575]])
    got = query_factor(positions, yarn)
    assert got.shape == (1, 6, 1, 1) and got.dtype == torch.float32
    wanted = [1 + 0.1 * math.log(1 + p // 8192) for p in positions[0].tolist()]
    assert torch.allclose(got.flatten(), torch.tensor(wanted)) and got[0, 1] == 1


def test_the_fused_block_refuses_the_factor() -> None:
    config, h100 = (
        load_config(REFERENCE / "mistral4"),
        Machine(cuda=True, name="H100", capability=(9, 0)),
    )
    with refused("kernels=triton lacks the factor of this model's queries"):
        resolve(Backend(device="cuda", kernels="triton"), config, h100)
    assert resolve(Backend(device="cuda", attention="triton"), config, h100).attention == "triton"
