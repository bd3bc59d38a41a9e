"""A checkpoint's tensors under the names of the model's table, however the files lay them out.

| in the files | here |
|---|---|
| `language_model.model.X` or `model.language_model.X`, of a model of images | `model.X` |
| a layer's experts in stacks, `gate_up_proj` (E, 2 I, D) and `down_proj` (E, D, I) | each expert |

Transformers 5 keeps such stacks in memory, and writes them for some families.

No tensor is copied: an expert's matrix is an entry that knows its place in the stack. Scales of a
quantized stack (`gate_up_proj_scale_inv`) are divided in the same way.

Shapes: E experts of a layer, I moe_intermediate_size, D hidden_size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from r1.errors import InputError
from r1.files.shards import Entry, entries_of

PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?(_scale_inv|_scale)?")
"""A stack of experts' matrices: the module, the matrix, and what its tensor's name adds."""
ACTIVATIONS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)_activation_scale")
MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def tensors_of(directory: Path, *, unlisted: bool = False) -> dict[str, Entry]:
    """Every tensor of a checkpoint by the model's name for it. No weight is read yet.

    Raises InputError as `entries_of` does, for two tensors of one name, and for a stack that can't
    be divided.
    """
    found: dict[str, Entry] = {}
    for key, entry in entries_of(directory, unlisted=unlisted).items():
        for name, each in _divided(_plain(key), entry):
            if name in found:
                raise InputError(
                    f"{directory} has both {found[name].key} and {entry.key}, which are one tensor "
                    f"of the model, {name}: download its files again into an empty folder"
                )
            found[name] = each
    return found


def _plain(key: str) -> str:
    """A tensor's name without the prefix of a model of images."""
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
    return PREFIXES.get(prefix, "") + key.removeprefix(prefix)


def _divided(key: str, entry: Entry) -> Iterator[tuple[str, Entry]]:
    """The matrices of a stack of experts; of any other tensor, the tensor itself."""
    if unused := ACTIVATIONS.fullmatch(key):
        yield f"{unused[1]}.{unused[2]}.activation_scale", entry
        return
    stack = STACK.fullmatch(key)
    if stack is None:
        yield key, entry
        return
    module, matrix, scale = stack[1], stack[2], stack[3] or ""
    names = MATRICES[matrix]
    shared = bool(scale) and entry.shape[1:] == (1, 1)  # one scale for an expert's gate and up
    parts = 1 if shared else len(names)
    empty = 0 in entry.shape  # then the file may name more experts than fit in memory
    if len(entry.shape) != 3 or entry.shape[1] % parts or empty:
        raise InputError(
            f"{entry.path}: {entry.key} has shape {entry.shape}, but a stack of experts has three "
            f"dimensions, and {' and '.join(names)} one below the other: compare the file with its "
            "publisher's"
        )
    experts, rows, columns = entry.shape
    height = rows // parts
    for expert in range(experts):
        for place, name in enumerate(names):
            first = 0 if shared else place * height
            inside = dataclasses.replace(entry, shape=(height, columns), place=(expert, first))
            yield f"{module}.{expert}.{name}.weight{scale}", inside
