"""Hugging Face safetensors <-> the model: strict, tensor by tensor, straight to where each belongs.

Reading maps a shard into memory and copies each tensor to its place in the model, on its device and
in its dtype, so there is never a second copy; the per-expert matrices of a checkpoint land in the
stacked ones. FP8 blocks become the model's dtype on the way. Every key of the files is used,
skipped knowingly (`Report` says), or an error."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from r1.errors import InputError
from r1.files.config_json import dump_config
from r1.files.progress import Progress
from r1.model.config import Config
from r1.model.transformer import Transformer
from r1.storage import fp8

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": fp8.E4M3}
SCALE = "_scale_inv"
REMAP_BYTES = 256 * 2**20
"""A shard is unmapped and mapped anew after so many bytes: pages that were read count as ours until
then."""


@dataclass
class Report:
    """What a load did: bytes read, and the keys that it knowingly left, by reason."""

    nbytes: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        return [
            f"{len(keys)} tensors not loaded: {reason}" for reason, keys in self.skipped.items()
        ]


@dataclass
class _Entry:
    """One tensor of one shard, as its header describes it."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


def places(model: Transformer) -> dict[str, Tensor]:
    """Where each checkpoint key lives in the model: views of its parameters, in the model's order.

    The names are the same but for a leading `model.`, the MTP layers (the checkpoint counts them on
    from the last decoder layer), the experts, which we keep stacked, and matrices with one input,
    which we keep joined."""
    first_mtp = model.config.num_hidden_layers
    out: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():  # a tied lm_head is not named twice
        tensor = parameter.data
        if name.startswith("mtp."):
            _, depth, rest = name.split(".", 2)
            name = f"layers.{first_mtp + int(depth)}.{rest.removeprefix('block.')}"
        key = name if name.startswith("lm_head.") else f"model.{name}"
        stem, stacked, projection = key.partition(".experts.")
        matrices = {key: tensor}
        if stacked:
            matrices = {
                f"{stem}.experts.{expert}.{projection}.weight": matrix
                for expert, matrix in enumerate(tensor)
            }
        for key, matrix in matrices.items():
            module = key.split(".")[-2]
            for name, rows in zip(*_joined(module, matrix, model.config), strict=True):
                out[key.replace(module, name)] = rows
    return out


def _joined(module: str, matrix: Tensor, config: Config) -> tuple[list[str], list[Tensor]]:
    """The checkpoint's names for the matrices that stand above each other in one of ours, and their
    rows."""
    if module == "gate_up_proj":
        return ["gate_proj", "up_proj"], list(matrix.chunk(2))
    if module == "qkv_a_proj":
        query = "q_proj" if config.attention.q_lora_rank is None else "q_a_proj"
        return [query, "kv_a_proj_with_mqa"], list(
            matrix.split(
                [matrix.shape[0] - config.attention.latent_dim, config.attention.latent_dim]
            )
        )
    return [module], [matrix]


def load(model: Transformer, directory: str | Path, *, quiet: bool = False) -> Report:
    """Fill the model's parameters, which must be allocated, from `directory`'s safetensors.

    Raises InputError for files that are missing, cut off or corrupt, an index that contradicts them
    or points outside the folder, tensors that are missing, surplus or of another shape or dtype,
    and FP8 weights without sound scales."""
    directory = Path(directory)
    entries = _entries(directory)
    wanted = places(model)
    report = Report()
    scales = {key: entries.pop(key) for key in list(entries) if key.endswith(SCALE)}
    for key in list(entries):
        if key not in wanted and (reason := _why_skipped(key, model)):
            report.skipped.setdefault(reason, []).append(key)
            del entries[key]
            scales.pop(key + SCALE, None)
    _check(directory, model.config, entries, scales, wanted)
    block, scale = model.config.files.fp8_block, _read_scales(scales)

    total = sum(
        wanted[key].numel() * DTYPES[entry.dtype].itemsize for key, entry in entries.items()
    )
    with Progress(f"loading {directory.name}", total, quiet) as progress, torch.no_grad():
        for key, rows, source in _stream(entries):
            place = wanted[key]
            if entries[key].dtype == "F8_E4M3":
                assert block is not None  # _check
                fp8.dequantize(
                    source.to(place.device), scale[key + SCALE].to(place.device), block, out=place
                )
            else:
                place[rows].copy_(source)
            report.nbytes += source.nbytes
            progress.add(source.nbytes)
    return report


def _entries(directory: Path) -> dict[str, _Entry]:
    """Every tensor of the checkpoint's shards, from their headers; nothing is read yet."""
    index = directory / INDEX
    if index.is_file():
        weight_map = _weight_map(index)
        found: dict[str, _Entry] = {}
        names = sorted(set(weight_map.values()))
        for name in names:  # all of them before the first is opened
            if not name.endswith(".safetensors") or Path(name).name != name:
                raise InputError(
                    f"{index} names {name!r}, which is no safetensors file in this folder: it is not opened"
                )
        for name in names:
            if not (directory / name).is_file():
                raise InputError(
                    f"{index} names {name}, which the folder lacks: download that file again"
                )
            for key, entry in _header(directory / name).items():
                if weight_map.get(key) != name:
                    told = f"in {weight_map[key]}" if key in weight_map else "nowhere"
                    raise InputError(
                        f"{directory / name} holds {key!r}, but {INDEX} has it {told}: download both again"
                    )
                found[key] = entry
        lost = [key for key in weight_map if key not in found]
        if lost:
            raise InputError(
                f"{index} has {_some(lost)} in files that lack them: download those files again"
            )
        return found
    shards = sorted(directory.glob("*.safetensors"))
    if directory / SINGLE in shards:
        return _header(directory / SINGLE)
    if len(shards) == 1:
        return _header(shards[0])
    if shards:
        raise InputError(
            f"{directory} has {len(shards)} safetensors files but no {INDEX} to say what is in them: download it"
        )
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"{directory} holds only pickles ({_some(pickles)}), which can run code when opened, so r1 never does: "
            "get the checkpoint's safetensors"
        )
    raise InputError(
        f"{directory} has no *.safetensors: a checkpoint's folder holds config.json and *.safetensors"
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise InputError(
            f"{index} can't be read ({type(error).__name__}: {error}): download it again"
        ) from None
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise InputError(
            f"{index} has a weight_map that does not name a file for each tensor: download it again"
        )
    return weight_map


def _header(path: Path) -> dict[str, _Entry]:
    try:
        with safe_open(path, framework="pt") as shard:
            slices = {key: shard.get_slice(key) for key in shard.offset_keys()}
            return {
                key: _Entry(path, key, tuple(s.get_shape()), s.get_dtype())
                for key, s in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is cut off or corrupt ({error}): download it again") from None


def _why_skipped(key: str, model: Transformer) -> str | None:
    """Why a key that has no place in this model may be left, or None if it may not."""
    config = model.config
    if key == "lm_head.weight" and config.tie_word_embeddings:
        return "config.json ties the output head to the embedding"
    if key.endswith(".rotary_emb.inv_freq"):
        return "rotation frequencies are computed from config.json"
    head, _, rest = key.removeprefix("model.layers.").partition(".")
    first = config.num_hidden_layers
    if not key.startswith("model.layers.") or head not in map(
        str, range(first, first + config.num_nextn_predict_layers)
    ):
        return None
    if not len(model.mtp):
        return (
            "MTP layers are loaded only when asked for (speculate=mtp, or r1.load(..., mtp=True))"
        )
    shared = rest in ("embed_tokens.weight", "shared_head.head.weight")
    return "the MTP layer shares the model's embedding and output head" if shared else None


def _check(
    directory: Path,
    config: Config,
    entries: dict[str, _Entry],
    scales: dict[str, _Entry],
    wanted: dict[str, Tensor],
) -> None:
    """Hold the headers against the model, before a byte is read."""
    missing = [key for key in wanted if key not in entries]
    if missing:
        raise InputError(
            f"{directory} lacks {_some(missing)}: config.json and the files are not of one model"
        )
    surplus = [key for key in entries if key not in wanted]
    surplus += [
        key for key in scales if entries.get(key.removesuffix(SCALE), _NOTHING).dtype != "F8_E4M3"
    ]
    if surplus:
        raise InputError(
            f"{directory} has {_some(surplus)}, for which config.json's model has no place"
        )
    for key, entry in entries.items():
        shape = tuple(wanted[key].shape)
        if entry.shape != shape:
            raise InputError(
                f"{entry.path}: {key} has shape {entry.shape}, but config.json makes it {shape}"
            )
        if entry.dtype not in DTYPES:
            raise InputError(
                f"{entry.path}: {key} is stored as {entry.dtype}; r1 reads {', '.join(DTYPES)}"
            )
        if entry.dtype != "F8_E4M3":
            continue
        if len(shape) != 2:
            raise InputError(
                f"{entry.path}: {key} is FP8, but only matrices come in blocks, and its shape is {shape}"
            )
        if config.files.fp8_block is None:
            raise InputError(
                f"{entry.path}: {key} is FP8, but config.json has no quantization_config to say in what blocks"
            )
        if key + SCALE not in scales:
            raise InputError(
                f"{entry.path}: {key} is FP8, but there is no {key + SCALE} to scale it"
            )
        scale, grid = scales[key + SCALE], fp8.grid(shape, config.files.fp8_block)
        if scale.shape != grid:
            raise InputError(
                f"{scale.path}: {scale.key} has shape {scale.shape}; blocks of {config.files.fp8_block} make it {grid}"
            )
        if scale.dtype not in ("F32", "F16", "BF16"):
            raise InputError(
                f"{scale.path}: {scale.key} is stored as {scale.dtype}; r1 reads scales in F32, F16, BF16"
            )


_NOTHING = _Entry(Path(), "", (), "")


def _stream(entries: dict[str, _Entry]) -> Iterator[tuple[str, slice, Tensor]]:
    """Map one shard after the other and yield keys, rows and those rows, which are views of the
    file.

    What has been read is let go of as it goes, and large tensors come in parts (FP8 ones never): so
    no more than 2 REMAP_BYTES are mapped and read at a time, however large an embedding is."""
    parts: dict[
        Path, list[tuple[str, slice]]
    ] = {}  # by shard, in the order in which they lie in the file
    for key, entry in entries.items():
        height = (
            entry.shape[0]
            if entry.dtype == "F8_E4M3"
            else max(1, REMAP_BYTES // (4 * math.prod(entry.shape[1:])))
        )
        cuts = [slice(start, start + height) for start in range(0, entry.shape[0], height)]
        parts.setdefault(entry.path, []).extend((key, rows) for rows in cuts)
    for path, pending in parts.items():
        pending.reverse()
        while pending:
            read = 0
            with safe_open(path, framework="pt") as shard:
                while pending and read < REMAP_BYTES:
                    key, rows = pending.pop()
                    source = shard.get_slice(key)[rows]
                    yield key, rows, source
                    read += source.nbytes
                    del source


def _read_scales(scales: dict[str, _Entry]) -> dict[str, Tensor]:
    """All scales, fp32 on the CPU (1/16384 of the weights), checked before any weight is read."""
    out: dict[str, Tensor] = {}
    for key, rows, source in _stream(scales):
        if not bool(torch.isfinite(source.float()).all()):
            raise InputError(
                f"{scales[key].path}: {key} holds NaN or infinite scales: download it again"
            )
        out.setdefault(key, torch.empty(scales[key].shape, dtype=torch.float32))[rows] = source
    return out


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def save(
    model: Transformer,
    directory: str | Path,
    *,
    shard_bytes: int = 5 * 10**9,
    dtype: torch.dtype | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write the model as a checkpoint in the published format: config.json, shards of `shard_bytes`
    at most, an index.

    Where the config has `fp8_block`, the projections are stored as FP8 blocks, as R1's are. `dtype`
    is that of all else (default: as it is in memory); the gate's bias stays fp32. `extra` adds
    fields to config.json. The folder must not exist; it appears whole or not at all."""
    directory = Path(directory)
    if directory.exists():
        raise InputError(f"{directory} exists already: name a new folder, r1 overwrites none")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(model, partial, shard_bytes, dtype, extra or {})
        os.replace(partial, directory)
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(partial)


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
        save_file(shard, directory / f"{number}.safetensors", metadata={"format": "pt"})
        (directory / f"{number}.safetensors").chmod(0o644)
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


def is_projection(key: str) -> bool:
    """Whether a checkpoint with FP8 blocks has this tensor so, as R1's has."""
    return key.endswith(("_proj.weight", ".kv_a_proj_with_mqa.weight")) and not key.endswith(
        ".eh_proj.weight"
    )


def _stored(model: Transformer, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors, one after the other, as they are to be stored."""
    block = model.config.files.fp8_block
    rest = dtype or model.norm.weight.dtype
    for key, place in places(model).items():
        if block and is_projection(key):
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
            yield f"{stem}{name}.weight", shared.weight.data.to(rest).clone()
