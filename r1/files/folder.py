"""The files of a checkpoint's folder: which ones are read, and what may lie in their place."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from r1.errors import InputError
from r1.reading import kind, read_start, status_of

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "exam.json",
)
"""The files beside the shards. All but config.json may be missing."""
LFS, POINTER_BYTES = b"version https://git-lfs", 1024
"""What a Git LFS pointer begins with, and the size that none has (git-lfs, docs/spec.md)."""
POINTER = "a Git LFS pointer, a few lines in the place of the real file"


def check_folder(directory: Path) -> None:
    """Raise InputError if something that is no file has the name of one that is read.

    Such a thing would be taken for a missing file otherwise, as would a link to nowhere: the model
    would load without its tokenizer, or without its stop tokens.
    """
    for path in (directory / name for name in SMALL_FILES):
        check_file(path)


def check_file(path: Path) -> os.stat_result | None:
    """The status of a regular file; None if there is nothing of this name.

    Raises InputError for a pipe, a folder, a device, a link to nowhere, or a Git LFS pointer, and
    if the folder may not be searched.
    """
    try:
        status = status_of(path)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): make it readable") from None
    if status is None:
        if os.path.islink(path):
            raise InputError(f"{path} is a link to a file that is missing: download it again")
        return None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is {kind(status)}, not a file: it is not opened")
    if is_pointer(path, status):
        raise InputError(f"{path} is {POINTER}: run git lfs pull in its folder, or use hf download")
    return status


def is_pointer(path: Path, status: os.stat_result) -> bool:
    """Whether a file is what `git clone` leaves in the place of a large one without git-lfs."""
    return status.st_size < POINTER_BYTES and read_start(path, len(LFS)) == LFS


def files_in(directory: Path) -> list[Path]:
    """Everything in a folder, by name, but for macOS's notes on other files (`._NAME`).

    Raises InputError for a folder that may not be read.
    """
    try:
        names = [name for name in os.listdir(directory) if not name.startswith("._")]
        return sorted(directory / name for name in names)
    except OSError as error:
        raise InputError(
            f"{directory} can't be read ({error.strerror}): give a folder that you may read"
        ) from None
