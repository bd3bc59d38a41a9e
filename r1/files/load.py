"""Safetensors -> the model: strict, tensor by tensor, straight to where each belongs.

Each tensor is copied from the mapped file to its place in the model, on its device and in its
dtype, so there is never a second copy. FP8 blocks become the model's dtype on the way. Every key of
the files is used, skipped knowingly (`Report` says why), or an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from r1.errors import InputError
from r1.files.foreign import check_fused, check_quantizer
from r1.files.names import elsewhere, places
from r1.files.progress import Progress
from r1.files.shards import DTYPES, Entry, entries_of, some, stream
from r1.model.transformer import Transformer
from r1.placement.placement import Part, Placement
from r1.storage import fp8

SCALE = "_scale_inv"
"""The ending of FP8 scales' names, after the weight's."""


@dataclass
class Report:
    """The bytes that were read, and the keys that were left out knowingly, by reason."""

    nbytes: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """One for each reason."""
        return [f"{len(keys)} tensors not loaded: {why}" for why, keys in self.skipped.items()]


def load(
    model: Transformer,
    directory: str | Path,
    placement: Placement | None = None,
    *,
    quiet: bool = False,
) -> Report:
    """Fill the model's tensors, which must be allocated, from `directory`'s safetensors.

    `placement` tells which part of each tensor this process holds. Raises InputError for files that
    are missing, cut off or corrupt, an index that contradicts them or points outside the folder,
    tensors that are missing, surplus or of another shape or dtype, values that are no number, and
    FP8 weights without sound scales.
    """
    directory = Path(directory)
    check_quantizer(directory)
    entries = entries_of(directory)
    check_fused(directory, entries)
    wanted = places(model)
    report = Report()
    scales = {key: entries.pop(key) for key in list(entries) if key.endswith(SCALE)}
    for key, reason in _left_out(entries, wanted, model).items():
        report.skipped.setdefault(reason, []).append(key)
        del entries[key]
        scales.pop(key + SCALE, None)
    _check_keys(directory, entries, scales, wanted)
    parts = {key: (placement or Placement()).part(key, e.shape) for key, e in entries.items()}
    for key, entry in entries.items():
        _check_entry(entry, parts[key], tuple(wanted[key].shape))
        if entry.dtype == "F8_E4M3":
            _check_fp8(entry, scales.get(key + SCALE), model.config.files.fp8_block)
    block, scale = model.config.files.fp8_block, _read_scales(scales)

    total = sum(wanted[key].numel() * DTYPES[e.dtype].itemsize for key, e in entries.items())
    with Progress(f"loading {directory.name}", total, quiet) as progress, torch.no_grad():
        for key, first, source in stream(entries, parts):
            place = wanted[key]
            if entries[key].dtype == "F8_E4M3":
                assert block is not None  # _check_fp8
                grid = fp8.part(scale[key + SCALE], block, *parts[key])
                fp8.dequantize(source.to(place.device), grid.to(place.device), block, out=place)
            else:
                place[first : first + source.shape[0]].copy_(source)
            report.nbytes += source.nbytes
            progress.add(source.nbytes)
        _check_finite(entries, wanted)
    return report


def _left_out(
    entries: dict[str, Entry], wanted: dict[str, Tensor], model: Transformer
) -> dict[str, str]:
    """The keys that this model has no place for and may go without, with the reason."""
    surplus = [key for key in entries if key not in wanted]
    others = elsewhere(model) if surplus else set()
    reasons = {key: _why_skipped(key, model, others) for key in surplus}
    return {key: reason for key, reason in reasons.items() if reason}


def _why_skipped(key: str, model: Transformer, others: set[str]) -> str | None:
    """Why a key that has no place in this model may be left out; None if it may not."""
    config = model.config
    if key == "lm_head.weight" and config.tie_word_embeddings:
        return "config.json ties the output head to the embedding"
    if key.endswith(".rotary_emb.inv_freq"):
        return "rotation frequencies are computed from config.json"
    if key in others:
        return "their experts lie elsewhere"
    layer, _, rest = key.removeprefix("model.layers.").partition(".")
    first = config.num_hidden_layers
    mtp = map(str, range(first, first + config.num_nextn_predict_layers))
    if not key.startswith("model.layers.") or layer not in mtp:
        return None
    if not len(model.mtp):
        asked = "speculate=mtp, or r1.load(..., mtp=True)"
        return f"MTP layers are loaded only when asked for ({asked})"
    shared = rest in ("embed_tokens.weight", "shared_head.head.weight")
    return "the MTP layer shares the model's embedding and output head" if shared else None


_NOTHING = Entry(Path(), "", (), "")


def _check_keys(
    directory: Path, entries: dict[str, Entry], scales: dict[str, Entry], wanted: dict[str, Tensor]
) -> None:
    """Compare the keys with the model's, before a weight is read."""
    missing = [key for key in wanted if key not in entries]
    if missing:
        wrong = "config.json and the files are not of one model"
        raise InputError(f"{directory} lacks {some(missing)}: {wrong}")
    surplus = [key for key in entries if key not in wanted]
    weights = {key: entries.get(key.removesuffix(SCALE), _NOTHING) for key in scales}
    surplus += [key for key, weight in weights.items() if weight.dtype != "F8_E4M3"]
    if surplus:
        wrong = "for which config.json's model has no place"
        raise InputError(f"{directory} has {some(surplus)}, {wrong}")


def _check_entry(entry: Entry, part: Part, shape: tuple[int, ...]) -> None:
    """Compare one header with the tensor that its part is loaded to."""
    if tuple(cut.stop - cut.start for cut in part) != shape:
        raise InputError(
            f"{entry.path}: {entry.key} has shape {entry.shape}, but config.json makes it {shape}"
        )
    if entry.dtype not in DTYPES:
        reads = f"r1 reads {', '.join(DTYPES)}"
        raise InputError(f"{entry.path}: {entry.key} is stored as {entry.dtype}; {reads}")


def _check_fp8(entry: Entry, scale: Entry | None, block: tuple[int, int] | None) -> None:
    """Compare an FP8 weight's header with its scales'."""
    what = f"{entry.path}: {entry.key} is FP8"
    if len(entry.shape) != 2:
        raise InputError(
            f"{what}, but only matrices come in blocks, and its shape is {entry.shape}"
        )
    if block is None:
        lacks = "config.json has no quantization_config to say in what blocks"
        raise InputError(f"{what}, but {lacks}")
    if scale is None:
        raise InputError(f"{what}, but there is no {entry.key + SCALE} to scale it")
    grid = fp8.grid(entry.shape, block)
    if scale.shape != grid:
        makes = f"has shape {scale.shape}; blocks of {block} make it {grid}"
        raise InputError(f"{scale.path}: {scale.key} {makes}")
    if scale.dtype not in ("F32", "F16", "BF16"):
        reads = "r1 reads scales in F32, F16, BF16"
        raise InputError(f"{scale.path}: {scale.key} is stored as {scale.dtype}; {reads}")


def _check_finite(entries: dict[str, Entry], loaded: dict[str, Tensor]) -> None:
    """Look at what was loaded where it lies, each on its own device; one more read of the weights.

    One NaN is enough to make every logit NaN, and token 0 the answer to everything.
    """
    for key, tensor in loaded.items():
        if not tensor.is_floating_point() or bool(torch.stack(tensor.aminmax()).isfinite().all()):
            continue
        name = str(tensor.dtype).removeprefix("torch.")
        raise InputError(
            f"{entries[key].path}: {key} holds NaN or infinite values when it is read as {name}: "
            "compare the file with its publisher's checksum"
            + (", or load it as bf16 or fp32" if name == "float16" else "")
        )


def _read_scales(scales: dict[str, Entry]) -> dict[str, Tensor]:
    """All scales, fp32 on the CPU (1/16384 of the weights), checked before any weight is read."""
    out: dict[str, Tensor] = {}
    wholes = {key: tuple(slice(0, n) for n in entry.shape) for key, entry in scales.items()}
    for key, first, source in stream(scales, wholes):
        if not bool(torch.isfinite(source.float()).all()):
            holds = f"{key} holds NaN or infinite scales: download it again"
            raise InputError(f"{scales[key].path}: {holds}")
        shape = scales[key].shape
        scale = out.setdefault(key, torch.empty(shape, dtype=torch.float32, device="cpu"))
        scale[first : first + source.shape[0]] = source
    return out
