"""Configs of published models, by name, and of our tiny-r1 ("tiny")."""

from __future__ import annotations

import dataclasses

from r1.errors import InputError, setting
from r1.model.config import (
    AttentionShape,
    Config,
    ExpertShape,
    FileFormat,
    GroupedShape,
    Llama3,
    Yarn,
)

_R1_YARN = Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)

R1 = Config(
    model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432,
    num_hidden_layers=61, max_position_embeddings=163840, rms_norm_eps=1e-6,
    attention=AttentionShape(
        num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, rope_theta=10000.0, yarn=_R1_YARN,
    ),
    experts=ExpertShape(
        n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
        n_group=8, topk_group=4, first_k_dense_replace=3, routed_scaling_factor=2.5,
    ),
    files=FileFormat(fp8_block=(128, 128)), num_nextn_predict_layers=1,
    bos_token_id=0, eos_token_ids=(1,),
)  # fmt: skip

_QWEN_7B = Config(
    model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944,
    num_hidden_layers=28, max_position_embeddings=131072, rms_norm_eps=1e-6,
    attention=GroupedShape(28, 4, 128, rope_theta=10000.0, attention_bias=True),
    bos_token_id=151643, eos_token_ids=(151643,),
)  # fmt: skip
_QWEN_14B = _QWEN_7B.change(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, rms_norm_eps=1e-5,
    num_attention_heads=40, num_key_value_heads=8, rope_theta=1e6,
)  # fmt: skip
_LLAMA_8B = Config(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=32, max_position_embeddings=131072, rms_norm_eps=1e-5,
    attention=GroupedShape(32, 8, 128, rope_theta=5e5, llama3=Llama3(8.0, 8192)),
    bos_token_id=128000, eos_token_ids=(128001,),
)  # fmt: skip

DISTILLS: dict[str, Config] = {
    "r1-distill-qwen-1.5b": _QWEN_7B.change(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
        num_key_value_heads=2,
    ),
    "r1-distill-qwen-7b": _QWEN_7B,
    "r1-distill-qwen-14b": _QWEN_14B,
    "r1-distill-qwen-32b": _QWEN_14B.change(intermediate_size=27648, num_hidden_layers=64),
    "r1-distill-llama-8b": _LLAMA_8B,
    "r1-distill-llama-70b": _LLAMA_8B.change(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    ),
    "r1-0528-qwen3-8b": _LLAMA_8B.change(
        model_type="qwen3", vocab_size=151936, intermediate_size=12288, num_hidden_layers=36,
        rms_norm_eps=1e-6, rope_theta=1e6, llama3=None, yarn=Yarn(4.0, 32768), qk_norm=True,
        bos_token_id=151643, eos_token_ids=(151645,),
    ),
    "llama-3.2-1b": _LLAMA_8B.change(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
        llama3=Llama3(32.0, 8192), tie_word_embeddings=True,
    ),
}  # fmt: skip
"""R1's distilled models, and Llama-3.2-1B, which published measurements of small models use."""

SHAPES: dict[str, Config] = {
    "r1": R1,
    "kimi-k2": R1.change(
        vocab_size=163840, num_attention_heads=64, n_routed_experts=384, n_group=1, topk_group=1,
        first_k_dense_replace=1, routed_scaling_factor=2.827, max_position_embeddings=131072,
        rope_theta=50000.0, yarn=dataclasses.replace(_R1_YARN, factor=32.0, beta_fast=1.0),
        num_nextn_predict_layers=0, bos_token_id=163584, eos_token_ids=(163585,),
    ),
    "moonlight-16b": R1.change(
        vocab_size=163840, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16,
        q_lora_rank=None, intermediate_size=11264, moe_intermediate_size=1408, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1, first_k_dense_replace=1,
        routed_scaling_factor=2.446, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_theta=50000.0, yarn=None, num_nextn_predict_layers=0, fp8_block=None,
        bos_token_id=163584, eos_token_ids=(163585,),
    ),
    "v2": R1.change(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=5120, num_hidden_layers=60,
        intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=160,
        n_shared_experts=2, num_experts_per_tok=6, topk_group=3, first_k_dense_replace=1,
        topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False,
        routed_scaling_factor=16.0, num_nextn_predict_layers=0, fp8_block=None,
        bos_token_id=100000, eos_token_ids=(100001,),
    ),
    "v2-lite": R1.change(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, num_hidden_layers=27,
        num_attention_heads=16, q_lora_rank=None, intermediate_size=10944,
        moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        n_group=1, topk_group=1, first_k_dense_replace=1, topk_method="greedy",
        scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=1.0,
        yarn=Yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707), num_nextn_predict_layers=0,
        fp8_block=None, bos_token_id=100000, eos_token_ids=(100001,),
    ),
    "glm-4.7-flash": R1.change(
        vocab_size=154880, hidden_size=2048, num_hidden_layers=47, num_attention_heads=20,
        q_lora_rank=768, qk_nope_head_dim=192, v_head_dim=256, intermediate_size=10240,
        moe_intermediate_size=1536, n_routed_experts=64, num_experts_per_tok=4, n_group=1,
        topk_group=1, first_k_dense_replace=1, routed_scaling_factor=1.8, rms_norm_eps=1e-5,
        max_position_embeddings=202752, rope_theta=1e6, yarn=None, fp8_block=None,
        bos_token_id=None, eos_token_ids=(154820, 154827, 154829),
    ),
    "youtu-2b": R1.change(
        vocab_size=128256, hidden_size=2048, num_hidden_layers=32, num_attention_heads=16,
        intermediate_size=6144, experts=ExpertShape(), max_position_embeddings=131072,
        rope_theta=1.6e6, yarn=None, fp8_block=None, tie_word_embeddings=True,
        num_nextn_predict_layers=0, bos_token_id=128000, eos_token_ids=(128001,),
    ),
    "mistral-small-4": R1.change(
        model_type="mistral4", vocab_size=131072, hidden_size=4096, num_hidden_layers=36,
        num_attention_heads=32, q_lora_rank=1024, kv_lora_rank=256, qk_nope_head_dim=64,
        intermediate_size=12288, n_routed_experts=128, num_experts_per_tok=4, n_group=1,
        topk_group=1, first_k_dense_replace=0, topk_method="greedy", scoring_func="softmax",
        routed_scaling_factor=1.0, max_position_embeddings=1048576,
        yarn=Yarn(128.0, 8192, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1),
        num_nextn_predict_layers=0, fp8_block=None, bos_token_id=1, eos_token_ids=(2,),
    ),
    "tiny": R1.change(
        vocab_size=320, hidden_size=160, num_hidden_layers=5, num_attention_heads=4, q_lora_rank=96,
        kv_lora_rank=80, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
        intermediate_size=416, moe_intermediate_size=72, n_routed_experts=16, num_experts_per_tok=4,
        n_group=4, topk_group=2, first_k_dense_replace=1, max_position_embeddings=10240,
        yarn=dataclasses.replace(_R1_YARN, original_max_position_embeddings=256),
    ),
    **DISTILLS,
}  # fmt: skip


def shape(name: str, layers: int | None = None) -> Config:
    """The Config of a shape, or of its first `layers` layers. Raises InputError."""
    if name not in SHAPES:
        raise InputError(f"there is no shape {name!r}: choose one of {', '.join(SHAPES)}")
    config = SHAPES[name]
    if layers is None:
        return config
    most = config.num_hidden_layers
    if not 1 <= layers <= most:
        has = f"{name} has {most} layers, take 1 to that many"
        raise InputError(f"{setting('layers', layers)}: {has}")
    return config.change(num_hidden_layers=layers)
