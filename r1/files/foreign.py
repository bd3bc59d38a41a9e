"""What is given for a checkpoint and is none that r1 reads: told by name, with what to do instead.

A path that is no folder, a file of another program, weights in another format.
"""

from __future__ import annotations

import re
from pathlib import Path

from r1.errors import InputError
from r1.files.folder import LFS, POINTER, files_in
from r1.reading import kind, read_start, status_of

CHECKPOINT = "a checkpoint's folder (config.json + *.safetensors)"
REPOSITORY = re.compile(r"(?:https?:/+huggingface\.co/)?([\w-][\w.-]*/([\w-][\w.-]*))(/tree/.*)?")
"""A repository of the Hugging Face hub, as one copies its name or its address. A path has lost one
of the address's slashes."""
GGUF = "GGUF, the format of llama.cpp, which r1 does not read"
ORIGINAL = "get the model's own repository, with its safetensors"


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
