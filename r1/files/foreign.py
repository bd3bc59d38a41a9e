"""What is given for a checkpoint and is none that r1 reads: told by name, with what to do instead.

A path that is no folder, a file of another program, weights in another format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from r1.errors import InputError
from r1.files.folder import LFS, POINTER, files_in
from r1.reading import kind, read_start, status_of

CHECKPOINT = "a checkpoint's folder (config.json + *.safetensors)"
REPOSITORY = re.compile(r"(?:https?:/+huggingface\.co/)?([\w-][\w.-]*/([\w-][\w.-]*))(/tree/.*)?")
"""A repository of the Hugging Face hub, as one copies its name or its address. A path has lost one
of the address's slashes."""
GGUF = "GGUF, the format of llama.cpp, which r1 does not read"
ORIGINAL = "get the model's own repository, with its safetensors"

FUSED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
"""Endings of the tensors in which transformers 5 keeps all experts of a layer."""


NEAREST = {
    r"qwen": "its dense relatives, R1's distilled models of qwen2 and qwen3, run",
    r"llama|mistral|mixtral|gemma|phi|smollm|olmo|granite|exaone|internlm": "the nearest that runs "
    "is a llama, such as DeepSeek-R1-Distill-Llama-8B",
    r"deepseek": "the nearest that run are deepseek_v2 and deepseek_v3",
    r"glm|kimi|moonlight|longcat|minicpm|hunyuan|ernie|dots|minimax|gpt_oss": "the nearest that "
    "runs is a deepseek_v3, such as Moonlight-16B-A3B",
}
"""Patterns of a model_type, and what to run in its place."""


def nearest(raw: Mapping[str, Any]) -> str:
    """The end of a refusal: what runs in the place of a model of another family."""
    name = str(raw.get("model_type", "")).lower()
    inner = raw.get("text_config")
    if isinstance(inner, dict) and inner.get("model_type"):
        name = str(inner["model_type"]).lower()
    return next((f": {what}" for pattern, what in NEAREST.items() if re.match(pattern, name)), "")


def check_gguf(directory: Path) -> None:
    """Raise InputError for a folder that holds weights for llama.cpp and no safetensors."""
    names = [path.name for path in files_in(directory)]
    found = next((name for name in names if name.endswith(".gguf")), None)
    if found and not any(name.endswith(".safetensors") for name in names):
        raise InputError(f"{directory} holds {found}, in {GGUF}: {ORIGINAL}")


def no_folder(path: Path) -> InputError:
    """Says what a path is that is no folder, and what to give instead."""
    status = status_of(path)
    if status is None:
        named = REPOSITORY.fullmatch(str(path))
        if not named:
            return InputError(f"there is no folder {path}: give {CHECKPOINT}")
        name, folder = named[1], named[2]
        command = f"run hf download {name} --local-dir {folder} (pip install huggingface_hub)"
        return InputError(
            f"there is no folder {name}: give {CHECKPOINT}; if you mean the repository of Hugging "
            f"Face, {command} and give {folder}"
        )
    start = read_start(path, len(LFS))
    if start.startswith(b"GGUF"):
        return InputError(f"{path} is a file in {GGUF}: {ORIGINAL}")
    if start == LFS:
        return InputError(f"{path} is {POINTER}: get that with git lfs pull, then give its folder")
    what = kind(status)
    if (path.parent / "config.json").is_file():
        return InputError(f"{path} is {what}: give the folder that it is in, {path.parent}")
    return InputError(f"{path} is {what}: give {CHECKPOINT}")


def check_fused(directory: Path, keys: Iterable[str]) -> None:
    """Raise InputError for experts that are saved as one tensor for a layer."""
    fused = next((key for key in keys if key.endswith(FUSED)), None)
    if fused:
        raise InputError(
            f"{directory} has {fused}: the experts of a layer are fused, as transformers 5 keeps "
            "them in memory, and r1 reads one matrix for each expert: save the model again with "
            "save_pretrained(..., save_original_format=True)"
        )
