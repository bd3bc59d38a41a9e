"""Models that r1 does not run, and the nearest ones that it does, for the sentence that refuses."""

from __future__ import annotations

import re

NEAREST: dict[str, tuple[str, str]] = {
    "glm_moe_dsa": ("has an indexer that layers may share", "glm4_moe_lite (GLM-4.7-Flash)"),
    "axk2": ("has gates, and an indexer", "deepseek_v32 (V3.2)"),
    "hy_v4": ("has hyper-connections, and an indexer", "deepseek_v32 (V3.2)"),
    "dots3_note": ("has an indexer and windows", "deepseek_v32 (V3.2)"),
    "deepseek_v4": ("has compressed attention, and no latent", "deepseek_v32 (V3.2)"),
    "axk1": ("has one more norm in each layer", "deepseek_v3 (V3)"),
    "longcat_flash": ("has two attentions in each layer", "deepseek_v3 (V3)"),
    "minicpm3": ("has scaled embeddings and residuals", "youtu (Youtu-LLM-2B)"),
    "kimi_linear": ("has linear attention", "kimi_k2 (Kimi-K2)"),
    "bailing_hybrid": ("has linear attention", "kimi_k2 (Kimi-K2)"),
    "glm5_next": ("has linear attention", "glm4_moe_lite (GLM-4.7-Flash)"),
    "mistral_large4": ("shares keys between layers", "mistral4 (Mistral-Small-4)"),
    "glm4_moe": ("has no latent attention", "glm4_moe_lite (GLM-4.7-Flash)"),
    "dots1": ("has no latent attention", "deepseek_v3 (V3)"),
    "sarvam_moe": ("has no latent attention", "sarvam_mla (sarvam-105b)"),
    "deepseek_vl_v2": ("is a model of images, in a layout of its own", "deepseek_v2 (V2-Lite)"),
}
"""Relatives that r1 does not run: why not, and the nearest one that it does."""


_LLAMA = "llama, such as DeepSeek-R1-Distill-Llama-8B"
NEAREST_OF_KIND = {
    r"qwen": "qwen2 or qwen3, its dense relatives, such as R1's distilled models",
    r"glm4?$|ernie4_5$|hunyuan_v1_dense$|minicpm$": _LLAMA,
    r"deepseek": "deepseek_v3",
    r"glm|kimi|moonlight|longcat|minicpm|hunyuan|ernie|dots|minimax|gpt_oss|bailing": "deepseek_v3,"
    " such as Moonlight-16B-A3B",
    r"llama|mllama|mistral|ministral|mixtral|gemma|phi|smollm|olmo|granite|exaone|internlm": _LLAMA,
    r"arcee|nemotron|falcon|gpt|starcoder|cohere|seed_oss|stablelm|step|opt$|bloom": _LLAMA,
}
"""Patterns of other names, and the nearest models that r1 runs."""


def nearest_to(name: str) -> str:
    """The nearest model that r1 runs, to be added to a sentence; nothing for no name."""
    near = next((near for kind, near in NEAREST_OF_KIND.items() if re.match(kind, name)), "")
    return near and f": the nearest is {near}"
