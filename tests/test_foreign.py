"""What is given for a checkpoint and is none that r1 reads: the right reason, and what to do.

Holds r1/files to account.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from folders import load, rewrite, tensors
from refusals import CPU, refused

import r1

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
"""What lies in the place of a large file after a `git clone` without git-lfs."""


def test_modelopt_is_told_by_name(sound: Path) -> None:
    """NVIDIA's folders: no quantization_config, and an index that omits the new tensors."""
    key = "model.layers.1.mlp.experts.0.up_proj.weight_scale_2"
    rewrite(sound, lambda t: t.update({key: torch.ones(())}))
    config = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (sound / "hf_quant_config.json").write_text(json.dumps(config))
    with refused(r"up_proj\.weight_scale_2, for which config\.json's model has no place"):
        load(sound)
    plain = json.loads((sound / "config.json").read_text()) | {"quantization_config": None}
    (sound / "config.json").write_text(json.dumps(plain))
    config["quantization"] = {"quant_algo": "W4A8_AWQ"}
    (sound / "hf_quant_config.json").write_text(json.dumps(config))
    with refused(r"hf_quant_config\.json: .* quant_algo = 'W4A8_AWQ', .* NVFP4 or FP8: get the"):
        load(sound)
    (sound / "hf_quant_config.json").write_text("[]")
    with refused(r"hf_quant_config\.json can't be read \(TypeError"):
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


@pytest.mark.parametrize(
    "name",
    [
        "deepseek-ai/DeepSeek-R1",
        "https://huggingface.co/deepseek-ai/DeepSeek-R1",
        "https://huggingface.co/deepseek-ai/DeepSeek-R1/tree/main",
    ],
)
def test_a_repository_of_the_hub(name: str) -> None:
    """As one copies it: the command that downloads it is told."""
    with refused(
        "^there is no folder deepseek-ai/DeepSeek-R1: give a checkpoint's folder",
        "run hf download deepseek-ai/DeepSeek-R1 --local-dir DeepSeek-R1 .* give DeepSeek-R1$",
    ):
        r1.load(name, CPU)


@pytest.mark.parametrize("name", ["nowhere", "../a/b", "/a/b", "a/b/c", "a b/c"])
def test_other_names_are_no_repositories(name: str) -> None:
    with refused(r"^there is no folder .*: give a checkpoint's folder \([^)]*\)$"):
        r1.load(name, CPU)


def test_a_file_is_called_a_file(sound: Path, tmp_path: Path) -> None:
    """In a checkpoint's folder, that folder is named; elsewhere, what a checkpoint is."""
    for name in ("config.json", "model.safetensors.index.json"):
        with refused(f"{name} is a file: give the folder that it is in, {sound}$"):
            r1.load(sound / name, CPU)
    (tmp_path / "notes.txt").write_text("hi")
    with refused(r"notes\.txt is a file: give a checkpoint's folder"):
        r1.load(tmp_path / "notes.txt", CPU)
    os.mkfifo(tmp_path / "pipe")
    with refused("pipe is a pipe: give a checkpoint's folder"):
        r1.load(tmp_path / "pipe", CPU)


def test_gguf_is_told_by_name(sound: Path, tmp_path: Path) -> None:
    """One file, a folder of them, and one with the model's config.json."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 64)
    own = "GGUF, the format of llama.cpp.* get the model's own repository"
    with refused(r"model-Q4_K_M\.gguf is a file in " + own):
        r1.load(folder / "model-Q4_K_M.gguf", CPU)
    with refused(r"gguf holds model-Q4_K_M\.gguf, in " + own):
        r1.load(folder, CPU)
    (folder / "config.json").write_text((sound / "config.json").read_text())
    with refused(r"gguf holds model-Q4_K_M\.gguf, in " + own):
        r1.load(folder, CPU)


def test_git_lfs_pointers(sound: Path) -> None:
    """A shard, the tokenizer, and a pointer given for the folder."""
    pulled = "is a Git LFS pointer, .* git lfs pull"
    shard = min(sound.glob("*.safetensors"))
    for path in (shard, sound / "tokenizer.json"):
        real = path.read_bytes()
        path.write_bytes(POINTER)
        with refused(f"{path.name} {pulled}"):
            r1.load(sound, CPU)
        with refused(f"{path.name} {pulled}", "then give its folder"):
            r1.load(path, CPU)
        path.write_bytes(real)
    r1.load(sound, CPU, quiet=True)
