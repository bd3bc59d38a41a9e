"""Folders that other programs wrote otherwise than published: the right reason, and what to do.

Holds r1/files to account.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from folders import load, rewrite, tensors
from refusals import refused


def test_modelopt_is_told_by_name(sound: Path) -> None:
    """NVIDIA's folders: no quantization_config, and an index that omits the new tensors."""
    key = "model.layers.1.mlp.experts.0.up_proj.weight_scale_2"
    rewrite(sound, lambda t: t.update({key: torch.ones(())}))
    config = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (sound / "hf_quant_config.json").write_text(json.dumps(config))
    with refused(r"hf_quant_config\.json: .* ModelOpt \(NVFP4\), .* get the model's own"):
        load(sound)
    (sound / "hf_quant_config.json").write_text("[]")
    with refused(r"ModelOpt \(an unknown format\)"):
        load(sound)


def test_fused_experts_are_told_by_name(sound: Path) -> None:
    """Each layer's experts in one tensor, as transformers 5 keeps them."""

    def fuse(found: dict[str, torch.Tensor]) -> None:
        experts = [key for key in found if ".experts." in key]
        for key in experts:
            del found[key]
        found["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(8, 32, 32)

    rewrite(sound, fuse)
    with refused("experts of a layer are fused", "save_original_format=True"):
        load(sound)


def test_macos_notes_are_no_shards(sound: Path) -> None:
    """A `._` file beside a single shard, whatever it is called."""
    rewrite(sound, lambda _: None)
    (sound / "model.safetensors").rename(sound / "weights.safetensors")
    (sound / "._weights.safetensors").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    loaded, _ = load(sound)
    assert loaded.norm.weight.shape == tensors_of(sound)


def tensors_of(folder: Path) -> torch.Size:
    (folder / "._weights.safetensors").unlink()
    return tensors(folder)["model.norm.weight"].shape


def test_weights_beyond_fp16(sound: Path) -> None:
    """fp16 ends at 65504; the file is sound, and another dtype reads it."""
    rewrite(sound, lambda t: t["model.norm.weight"].fill_(1e5))
    with refused("infinite values when it is read as float16", "load it as bf16 or fp32"):
        load(sound, dtype="fp16")
    load(sound, dtype="bf16")
