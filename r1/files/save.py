"""The model -> a checkpoint folder in the published format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from r1.errors import InputError, setting
from r1.files.config_json import dump_config
from r1.files.names import Slot, is_projection, slots
from r1.files.shards import INDEX, SINGLE
from r1.model.transformer import Transformer
from r1.storage import fp8
from r1.storage.kinds import KINDS
from r1.storage.spec import Spec
from r1.writing import new_folder

SCALE = "_scale_inv"
"""The ending of FP8 scales' names, after the weight's."""


def save(
    model: Transformer,
    directory: str | Path,
    *,
    shard_bytes: int = 5 * 10**9,
    dtype: torch.dtype | None = None,
    extra: dict[str, Any] | None = None,
    add_files: Callable[[Path], object] | None = None,
) -> None:
    """Write the model as a checkpoint in the published format.

    That is config.json, shards of at most `shard_bytes`, and an index. Where the config has
    `fp8_block`, the projections are stored as FP8 blocks, as R1's are. Other quantized matrices are
    written as the numbers that they stand for. Each expert is a matrix of its own, also where a
    family's publisher stacks them (Mistral 4: transformers reads only stacks). `dtype` is that of
    all other tensors (default: as in memory); the gate's bias stays fp32. `extra` adds fields to
    config.json. The folder must not exist; it appears whole or not at all. `add_files` is called
    with the folder before it appears, to put more files into it. Raises InputError if the folder
    exists, or can't be written, and for a model of which other processes or files hold a part.
    """
    layers = len(model.layers) == model.config.num_hidden_layers
    if not layers or model.embed_tokens.matrix.shape[0] != model.config.vocab_size:
        raise InputError("this process holds a part of the model: load it whole to save it")
    if any(view.is_meta for slot in slots(model).values() for view in slot.views.values()):
        other = f"{setting('experts', 'device')} or {setting('experts', 'host')}"
        raise InputError(f"its experts stay in files: load it with {other} to save it")
    with new_folder(directory) as partial:
        _write(model, partial, shard_bytes, dtype, extra or {})
        if add_files:
            add_files(partial)


def _write(
    model: Transformer,
    directory: Path,
    shard_bytes: int,
    dtype: torch.dtype | None,
    extra: dict[str, Any],
) -> None:
    weight_map: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    number = size = total = 0

    def flush() -> None:
        nonlocal number, size
        number += 1
        _write_shard(shard, directory / f"{number}.safetensors")
        weight_map.update(dict.fromkeys(shard, number))
        shard.clear()
        size = 0

    for key, tensor in _stored(model, dtype):
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
        shard[key] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()

    names = {
        n: f"model-{n:05d}-of-{number:06d}.safetensors" if number > 1 else SINGLE
        for n in range(1, number + 1)
    }
    for n, name in names.items():
        (directory / f"{n}.safetensors").rename(directory / name)
    if number > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: names[n] for key, n in weight_map.items()},
        }
        (directory / INDEX).write_text(
            json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
    rest = str(dtype or model.norm.weight.dtype).removeprefix("torch.")
    config = dump_config(model.config) | {"torch_dtype": rest} | extra
    (directory / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def _write_shard(shard: dict[str, Tensor], path: Path) -> None:
    """Write some tensors as one file, which all may read. Raises OSError."""
    try:
        save_file(shard, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library's name for an OSError
        raise OSError(str(error)) from None
    path.chmod(0o644)


def _unpacked(slot: Slot) -> Tensor:
    """A quantized matrix's numbers, fp32."""
    assert slot.spec is not None
    matrix = KINDS[slot.spec.kind](slot.spec, slot.shape, torch.float32, slot.views)
    return matrix.dense()


def _stored(model: Transformer, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors, one after the other, as they are to be stored."""
    block = model.config.files.fp8_block
    rest = dtype or model.norm.weight.dtype
    for key, slot in slots(model).items():
        place = slot.weight if slot.spec is None else _unpacked(slot)
        if block and slot.spec == Spec("fp8", *block):
            yield from ((key.removesuffix("weight") + e, view) for e, view in slot.views.items())
        elif block and is_projection(key):
            yield from zip((key, key + SCALE), fp8.quantize(place, block), strict=True)
        elif key.endswith("e_score_correction_bias"):
            yield key, place.float()
        else:
            yield key, place.to(rest).contiguous()
    for depth in range(len(model.mtp)):
        stem = f"model.layers.{model.config.num_hidden_layers + depth}."
        for name, shared in (
            ("embed_tokens", model.embed_tokens),
            ("shared_head.head", model.lm_head),
        ):
            # R1's files hold these copies, and other readers of the format look for them.
            yield f"{stem}{name}.weight", shared.matrix.dense(rest).data.clone()
