"""Tests R1's distilled models: their config.json, what is refused, storages, and the switches.

Holds to account: r1/files/grouped_json.py, r1/model/gqa.py and gqa_attend.py. Their arithmetic is
in test_parity.py and test_traps.py, what holds for any such model in test_properties.py, their
tokenizers in test_real_tokenizers.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import writers
from folders import rewrite
from models import TINY_GROUPED, TINY_LLAMA, TINY_QWEN2, model, random_tokens, runner
from refusals import refused
from tolerances import atol
from torch.nn import functional as F

import r1
from r1 import Backend, Config, InputError, roofline
from r1.build import count_parameters
from r1.files.config_json import parse_config
from r1.files.save import save
from r1.model.cache import Cache
from r1.model.shapes import DISTILLS, shape
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 131072, "model_type": "qwen2", "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "mlp_bias": False,
    "max_position_embeddings": 131072, "model_type": "llama", "pretraining_tp": 1,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "tie_word_embeddings": False, "vocab_size": 128256,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 131072,
    "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "attn_factor": 0.8782488562869419, "factor": 4.0,
        "original_max_position_embeddings": 32768, "rope_type": "yarn",
    },
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def sizes(dim: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (dim, layers, heads, inner), strict=True)) | more


FILES: dict[str, dict[str, Any]] = {
    "r1-distill-qwen-1.5b": QWEN2 | sizes(
        1536, 28, 12, 8960, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=10000,
        sliding_window=4096, max_window_layers=21, vocab_size=151936),
    "r1-distill-qwen-7b": QWEN2 | sizes(
        3584, 28, 28, 18944, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=10000,
        sliding_window=4096, max_window_layers=28, vocab_size=152064),
    "r1-distill-qwen-14b": QWEN2 | sizes(
        5120, 48, 40, 13824, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1000000.0,
        sliding_window=131072, max_window_layers=48, vocab_size=152064),
    "r1-distill-qwen-32b": QWEN2 | sizes(
        5120, 64, 40, 27648, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1000000.0,
        sliding_window=131072, max_window_layers=64, vocab_size=152064),
    "r1-distill-llama-8b": LLAMA | sizes(4096, 32, 32, 14336),
    "r1-distill-llama-70b": LLAMA | sizes(8192, 80, 64, 28672),
    "r1-0528-qwen3-8b": QWEN3,
}  # fmt: skip
"""The published files' fields."""


# ---------------------------- config.json
@pytest.mark.parametrize("name", FILES)
def test_the_published_files_are_the_named_shapes(name: str) -> None:
    """A sliding window that is off, and padded vocabularies, too."""
    assert parse_config(FILES[name]) == shape(name)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("r1-distill-qwen-1.5b", 1.777),
        ("r1-distill-qwen-7b", 7.616),
        ("r1-distill-qwen-14b", 14.770),
        ("r1-distill-qwen-32b", 32.764),
        ("r1-distill-llama-8b", 8.030),
        ("r1-distill-llama-70b", 70.554),
        ("r1-0528-qwen3-8b", 8.191),
        ("llama-3.2-1b", 1.236),
    ],
)
def test_as_many_parameters_as_published(name: str, billions: float) -> None:
    assert round(count_parameters(shape(name)) / 1e9, 3) == billions
    assert name in DISTILLS


def test_transformers_5_spells_it_otherwise() -> None:
    own = LLAMA["rope_scaling"] | {"rope_theta": 500000.0}
    file = FILES["r1-distill-llama-8b"]
    raw = {k: v for k, v in file.items() if k not in ("rope_scaling", "rope_theta")}
    assert parse_config(raw | {"rope_parameters": own, "head_dim": 128}) == parse_config(file)
    qwen = FILES["r1-distill-qwen-7b"] | {"layer_types": ["full_attention"] * 28}
    assert parse_config(qwen) == shape("r1-distill-qwen-7b")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("r1-distill-qwen-7b", {"use_sliding_window": True}, "use_sliding_window is true"),
        ("r1-distill-qwen-7b", {"layer_types": ["sliding_attention"] * 28}, "layer_types is not"),
        ("r1-distill-qwen-7b", {"layer_types": ["full_attention"]}, "for each of 28 layers"),
        ("r1-distill-qwen-7b", {"num_key_value_heads": 5}, "5, which does not divide 28 heads"),
        ("r1-distill-qwen-7b", {"hidden_size": 3585}, "hidden_size is 3585, which 28 heads"),
        ("r1-distill-qwen-7b", {"head_dim": 10**6}, "head_dim is 1000000, which is larger than"),
        ("r1-distill-qwen-7b", {"head_dim": 127}, "head_dim is 127, but rotation takes pairs"),
        ("r1-distill-qwen-7b", {"attention_bias": False}, "attention_bias is False"),
        ("r1-distill-qwen-7b", {"eos_token_id": 152064}, "outside the vocabulary"),
        ("r1-distill-qwen-7b", {"num_experts": 8}, "num_experts = 8 is unknown to r1"),
        ("r1-distill-llama-8b", {"attention_bias": True}, "attention_bias is True"),
        ("r1-distill-llama-8b", {"mlp_bias": True}, "mlp_bias is True"),
        ("r1-distill-llama-8b", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("r1-distill-llama-8b", {"is_causal": False}, "is_causal is False"),
        ("r1-distill-llama-8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("r1-0528-qwen3-8b", {"rope_scaling": {"rope_type": "dynamic"}}, "only yarn and llama3"),
        *(
            ("r1-0528-qwen3-8b", {"rope_scaling": QWEN3["rope_scaling"] | own}, "rope_scaling has")
            for own in ({"mscale": 0.7}, {"mscale_all_dim": 1.0}, {"llama_4_scaling_beta": 0.1})
        ),
    ],
)
def test_what_would_need_other_arithmetic_is_refused(
    name: str, changes: dict[str, Any], said: str
) -> None:
    with refused(said):
        parse_config(FILES[name] | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factor": 0.5}, "factor = 0.5, but llama3 stretches"),
        ({"low_freq_factor": 4.0}, "wants 0 < low < high"),
        ({"low_freq_factor": 0.0}, "wants 0 < low < high"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings = 0"),
        ({"high_freq_factor": None}, "high_freq_factor is missing"),
        ({"beta_fast": 32}, "has beta_fast, which r1 does not know"),
    ],
)
def test_llama3_scaling_that_is_refused(changes: dict[str, Any], said: str) -> None:
    with refused(said):
        parse_config(
            FILES["r1-distill-llama-8b"] | {"rope_scaling": LLAMA["rope_scaling"] | changes}
        )


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"model_type": "qwen3_moe"}, "nearest is qwen2 or qwen3, its dense"),
        ({"model_type": "mistral"}, "such as DeepSeek-R1-Distill-Llama-8B"),
        ({"model_type": "deepseek_v4"}, "nearest it runs: deepseek_v32"),
        ({"model_type": "deepseek_v9"}, "nearest is deepseek_v3"),
        ({"model_type": "gpt_oss"}, "such as Moonlight-16B-A3B"),
        ({"model_type": "llava", "text_config": {"model_type": "qwen3_vl"}}, "qwen2 or qwen3"),
        ({"model_type": "bert"}, "runs only deepseek_v3, .*qwen3$"),
    ],
)
def test_other_models_are_refused_by_name(raw: dict[str, Any], said: str) -> None:
    with refused(said):
        parse_config(raw)


# ---------------------------- storages
MODELS = {"qwen2": TINY_QWEN2, "llama": TINY_LLAMA, "qwen3": TINY_GROUPED}


def saved(config: Config, folder: Path) -> Path:
    save(model(config, dtype="fp32"), folder)
    return folder


def logits(folder: Path, **switches: Any) -> torch.Tensor:
    engine = r1.load(folder, Backend(device="cpu", dtype="fp32", **switches), quiet=True)
    return engine.logits(random_tokens(0, 2, 12, 300))


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("family", MODELS)
def test_every_storage(family: str, kind: str, tmp_path: Path) -> None:
    """Joined or not: the biases stay plain, and the numbers are the same."""
    folder = saved(MODELS[family], tmp_path / "model")
    joined = logits(folder, quant=kind)
    apart = logits(folder, quant=kind, join="off")
    torch.testing.assert_close(joined, apart, atol=atol("reference fp32"), rtol=0)
    assert not torch.equal(joined, logits(folder))


@pytest.mark.parametrize("name", writers.FORMATS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_published_formats(family: str, name: str, tmp_path: Path) -> None:
    """Packed as they are, or dequantized while loading."""
    folder = saved(MODELS[family], tmp_path / "model")
    writers.write(folder, name)
    packed, plain = (
        logits(folder, quant=writers.FORMATS[name][0].kind),
        logits(folder, quant="none"),
    )
    torch.testing.assert_close(packed, plain, atol=1e-3, rtol=0)


def test_a_family_s_own_biases_are_no_mistake_of_a_writer(tmp_path: Path) -> None:
    """GPTQ's writers give each matrix a bias. Qwen2's q, k and v have real ones, o has none."""
    folder = saved(TINY_QWEN2, tmp_path / "model")
    name = next(name for name in writers.FORMATS if "gptq" in name.lower())
    writers.write(folder, name)
    before = logits(folder, quant="none")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"] += 1.0

    rewrite(folder, change)
    assert not torch.equal(before, logits(folder, quant="none"))

    def forbidden(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.o_proj.bias"] += 1.0

    rewrite(folder, forbidden)
    with refused("o_proj.bias is not 0, and this matrix has no bias"):
        logits(folder, quant="none")


# ---------------------------- switches
@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"attention": "absorbed"}, "grouped-query attention, for which there is no absorbed"),
        ({"prefill_attention": "expand"}, "no expand: choose naive, sdpa, grouped$"),
        ({"speculate": "mtp"}, "drafts with the MTP layer, and this model has none"),
        ({"ep": 2}, "spreads experts, and this model has none"),
        ({"tp": 4}, "has 2 heads, which 4 devices can't share evenly"),
    ],
)
def test_what_this_attention_lacks(switches: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        resolve(Backend(device="cpu", **switches), TINY_GROUPED)


def test_latent_attention_lacks_the_others() -> None:
    with pytest.raises(InputError, match="latent attention, for which there is no sdpa"):
        resolve(Backend(device="cpu", attention="sdpa"), shape("tiny"))


def test_what_auto_chooses() -> None:
    h100 = Machine(cuda=True, name="H100", capability=(9, 0))
    for machine in (h100, Machine()):
        backend = resolve(Backend(), shape("r1-distill-llama-8b"), machine)
        assert (backend.attention, backend.prefill_attention) == ("grouped", "sdpa")


@pytest.mark.parametrize(("dtype", "heads"), [("fp32", 6), ("fp16", 6), ("bf16", 2)])
def test_sdpa_has_a_fused_kernel_on_a_gpu(
    dtype: str, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those only flash attention takes fewer heads of keys, without a mask, in bf16."""
    calls: list[tuple[int, bool]] = []
    right = F.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        calls.append((k.shape[1], options["enable_gqa"]))
        return right(q, k, *more, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    run = runner(model(TINY_GROUPED, dtype=dtype), chunk=3, dtype=dtype, attention="sdpa")
    run.prefill([[1, 2, 3, 4]], run.cache(1, 8))
    assert calls == [(heads, heads == 2)] * 3 + [(6, False)] * 3


def test_heads_lie_before_slots_in_the_cache() -> None:
    """So that decoding reads keys in place: flattening rows and heads is a view, no copy."""
    cache = Cache([(2, 4)], 3, 8, 1, device=torch.device("cpu"), dtype=torch.float32)
    (tensor,) = cache.first(3, 5)[0]
    assert tensor.shape == (3, 5, 2, 4)
    flat = tensor.transpose(1, 2).flatten(0, 1)
    assert flat.data_ptr() == tensor.data_ptr() and flat.shape == (6, 5, 4)
    tensor[2, 4, 1, 3] = 7.0
    assert flat[5, 4, 3] == 7.0


def test_the_work_of_a_step() -> None:
    """Llama-3.2-1B in bf16, by hand: all weights once (the head is the embedding), and the cache's
    8 heads of 64.
    """
    config = shape("llama-3.2-1b")
    backend = resolve(Backend(device="cpu", dtype="bf16"), config)
    work = roofline.step_work(config, backend, 1, 1, 1000, 0.0)
    attention = 2 * 2048 * 2048 + 2 * 512 * 2048
    weights = 16 * (attention + 3 * 2048 * 8192) + 128256 * 2048
    assert work.weight_bytes == 2 * (weights + 2048)
    assert work.cache_bytes == 1001 * 16 * 2 * 8 * 64 * 2
    assert work.flops == 2 * weights + 1001 * 16 * 2 * 2 * 32 * 64


def test_a_chat_with_random_weights(tmp_path: Path) -> None:
    """Ragged rows through the engine, under every switch that changes how a step is called here."""
    folder = saved(TINY_QWEN2, tmp_path / "model")
    prompts = [[1, 2, 3], [4]]
    texts = []
    ways: list[dict[str, Any]] = [
        {},
        {"amp": "bf16"},
        {"quant": "int4"},
        {"attention": "naive"},
    ]
    for switches in ways:
        engine = r1.load(folder, Backend(device="cpu", dtype="fp32", **switches), quiet=True)
        done = engine.generate(prompts, 4, temperature=0.0, ignore_stop=True)
        texts.append([each.tokens for each in done])
        assert all(len(each.tokens) == 4 for each in done)
    assert texts[0] == texts[3]
    assert json.loads((folder / "config.json").read_text())["use_sliding_window"] is False
