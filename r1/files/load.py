"""Safetensors -> the model: strict, weight by weight, straight to where each belongs.

Each weight is copied from the mapped file to its place in the model, on its device and in the
format of that place (fill.py), so there is never a second copy, nor a model that is not quantized
yet. Every key of the files is used, skipped knowingly (`Report` says why), or an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch

from r1.errors import InputError
from r1.files.experts import connect
from r1.files.fill import check_finite, fill_found, fill_plain
from r1.files.layouts import tensors_of
from r1.files.names import Slot, elsewhere, slots
from r1.files.parts import Reading, nbytes, plan
from r1.files.progress import Progress
from r1.files.quantized import methods
from r1.files.quantized.recognize import Recognized, recognize, stack_name
from r1.files.shards import DTYPES, one, some, stream
from r1.model.transformer import Transformer
from r1.placement.placement import Part, Placement

EMBEDDING = "model.embed_tokens.weight"
ROWS = 4096
"""Of two matrices that are compared, so many at a time."""


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
    found, wanted = survey(model, directory, placement), slots(model)
    here = {key: slot for key, slot in wanted.items() if not _stays(slot)}
    read(found, here, quiet=quiet)
    if len(here) < len(wanted):
        paths = {found.files.main(key).path for key in wanted.keys() - here.keys()}
        beside = (found.readings[key].beside.values() for key in wanted.keys() - here.keys())
        paths |= {entry.path for tensors in beside for entry, _ in tensors}
        connect(model, found.files, found.readings, sorted(paths))
    return found.report


def _stays(slot: Slot) -> bool:
    """Whether a weight stays in its file: the model has no memory for it."""
    return all(view.is_meta for view in slot.views.values())


@dataclass(frozen=True)
class Survey:
    """A checkpoint's tensors, compared with a model's. No weight is read yet."""

    name: str
    files: Recognized
    readings: dict[str, Reading]
    """What this process reads of each weight."""
    report: Report


def survey(model: Transformer, directory: str | Path, placement: Placement | None = None) -> Survey:
    """Compare the headers of `directory` with the model, which needs no memory yet.

    Raises InputError as `load` does.
    """
    directory = Path(directory)
    declared = methods.declared_in(directory)
    entries = tensors_of(directory, unlisted=declared is not None and declared.unlisted)
    wanted, report, placement = slots(model), Report(), placement or Placement()
    files = recognize(entries, declared)
    files.keep_biases(wanted)
    files.biases = [entry for entry in files.biases if placement.holds(entry.key)]
    if files.unused:
        report.skipped["r1 does not quantize activations or the cache"] = files.unused
    _check_biases(files)
    if model.config.tie_word_embeddings:
        _check_tied(files)
    for key, reason in _left_out(files.keys(), wanted, model, placement).items():
        report.skipped.setdefault(reason, []).extend(files.remove(key))
    _check_keys(directory, files, wanted)
    readings = {}
    for key, slot in wanted.items():
        shape = _shape(files, key, slot, placement)
        mine = placement.part(key, shape)
        _check(files, key, shape, mine, slot, model)
        readings[key] = plan(files.found.get(key), slot, shape, mine)
    return Survey(directory.name, files, readings, report)


def read(found: Survey, wanted: dict[str, Slot], *, quiet: bool = False) -> None:
    """Read weights into their slots, in the order in which they lie in the files.

    `wanted` may be some of the surveyed model's slots. Raises InputError as `load` does.
    """
    files, report = found.files, found.report
    readings = {key: found.readings[key] for key in wanted}
    mains = {key: files.main(key) for key in wanted}
    regions = {key: reading.region for key, reading in readings.items()}
    whole = {key for key, slot in wanted.items() if slot.spec or key in files.found}
    beside = {key: reading.beside for key, reading in readings.items()}
    total = sum(nbytes(mains[key], reading) for key, reading in readings.items())
    with Progress(f"loading {found.name}", total, quiet) as progress, torch.no_grad():
        for piece in stream(mains, regions, whole, beside):
            key = piece.key
            if key in files.found:
                fill_found(wanted[key], files.found[key], piece, readings[key])
            else:
                fill_plain(wanted[key], piece, readings[key])
            report.nbytes += piece.nbytes
            progress.add(piece.nbytes)
        for key, slot in wanted.items():
            check_finite(key, slot, mains[key].path)


def _left_out(
    keys: Collection[str], wanted: Collection[str], model: Transformer, placement: Placement
) -> dict[str, str]:
    """The keys that this model has no place for and may go without, with the reason."""
    surplus = [key for key in keys if key not in wanted]
    others = elsewhere(model) if surplus else set()
    reasons = {
        key: _why_skipped(key, model, others) if placement.holds(key) else "other stages hold them"
        for key in surplus
    }
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
    for names, why in config.files.left_out:
        if re.fullmatch(names, key):
            return why
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


def _check_keys(directory: Path, files: Recognized, wanted: Collection[str]) -> None:
    """Compare the keys with the model's, before a weight is read."""
    keys = files.keys()
    missing = [key for key in wanted if key not in keys]
    if missing:
        wrong = "config.json and the files are not of one model"
        raise InputError(f"{directory} lacks {some(missing)}: {wrong}")
    surplus = [key for key in keys if key not in wanted]
    if surplus:
        wrong = "for which config.json's model has no place"
        raise InputError(f"{directory} has {some(surplus)}, {wrong}")


def _check_biases(files: Recognized) -> None:
    """Old GPTQ writers give each matrix a bias of zeros. Raises InputError for any other."""
    for entry in files.biases:
        if bool(one(entry).any()):
            raise InputError(
                f"{entry.path}: {entry.key} is not 0, and this matrix has no bias in its family: "
                "compare the file with its publisher's"
            )


def _check_tied(files: Recognized) -> None:
    """The output head of a file whose config.json ties it. Raises InputError where it is another
    matrix than the embedding: transformers unties them then.
    """
    head, embedding = (files.plain.get(key) for key in ("lm_head.weight", EMBEDDING))
    if head is None or embedding is None:
        return
    alike, rows = head.shape == embedding.shape, head.shape[0]
    for start in range(0, rows if alike else 0, ROWS):
        part = (slice(start, min(rows, start + ROWS)),)
        alike = alike and torch.equal(one(head, part).float(), one(embedding, part).float())
    if not alike:
        raise InputError(
            f"{head.path}: lm_head.weight is not {EMBEDDING}, though config.json ties them: set "
            "tie_word_embeddings to false there"
        )


def _shape(files: Recognized, key: str, slot: Slot, placement: Placement) -> tuple[int, ...]:
    """The whole weight's shape in the files."""
    found = files.found.get(key)
    if found is None:
        return files.plain[key].shape
    return found.shape(
        slot.shape if placement.complete else found.format.shape(found.tensors, found.declared)
    )


def _check(
    files: Recognized, key: str, shape: tuple[int, ...], mine: Part, slot: Slot, model: Transformer
) -> None:
    """Compare the headers with the slot that a weight is loaded to. Raises InputError."""
    entry, found = files.main(key), files.found.get(key)
    if tuple(cut.stop - cut.start for cut in mine) != slot.shape:
        raise InputError(
            f"{entry.path}: {entry.key} has shape {shape}, but config.json makes it {slot.shape}"
        )
    if found is not None:
        found.check((shape[0], shape[1]))
        return
    if entry.dtype not in DTYPES or entry.dtype == "F8_E4M3":
        reads = f"r1 reads {', '.join(DTYPES)}"
        raise InputError(f"{entry.path}: {entry.key} is stored as {entry.dtype}; {reads}")
    name = stack_name(key).removesuffix(".weight")
    if slot.spec is not None and model.config.files.spec(name) == slot.spec:
        raise InputError(
            f"{entry.path}: {entry.key} is not quantized, and other experts of its layer are: use "
            "quant=none"
        )
