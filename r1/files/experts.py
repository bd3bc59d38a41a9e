"""Routed experts that stay in a checkpoint's files: each is read anew when it is wanted.

One expert is some ranges of bytes: its matrices, and their scales. They are put into a row of the
host's cache as loading puts them into a model (fill.py), so every format that loads can be read so.
What memory stores otherwise than the file is converted at each reading.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from r1.errors import InputError
from r1.files.direct import Files, Range
from r1.files.fill import check_finite, fill_found, fill_plain
from r1.files.names import Slot, expert_slots, key_of
from r1.files.parts import Reading, nbytes
from r1.files.quantized.recognize import Recognized
from r1.files.shards import Entry, Piece, check_version, width
from r1.model.moe import EXPERT_MATRICES
from r1.model.transformer import Transformer
from r1.placement.placement import Part
from r1.placement.sources import InFiles
from r1.placement.streamed import StreamedExperts
from r1.storage import fp8

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": fp8.E4M3,
    "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
    "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
"""By safetensors' names."""


def connect(
    model: Transformer, files: Recognized, readings: Mapping[str, Reading], paths: Iterable[Path]
) -> None:
    """Tell each layer whose experts lie in files how to read them. Raises InputError."""
    layers = [
        (key_of(name, model), module)
        for name, module in model.named_modules()
        if isinstance(module, StreamedExperts)
    ]
    checkpoint = Checkpoint(files, readings, paths)
    for key, module in layers:
        source = module.outside[1]
        assert isinstance(source, InFiles)
        names = [f"{key}.{expert}" for expert in module.ids]
        reader = LayerReader(checkpoint, names, expert_slots(source.held))
        source.fill, source.read, source.nbytes = reader, reader.read, reader.nbytes


class Checkpoint:
    """The files, kept open, and where each tensor lies in them."""

    def __init__(
        self, files: Recognized, readings: Mapping[str, Reading], paths: Iterable[Path]
    ) -> None:
        self.files, self.readings, self.open = files, readings, Files(paths)
        self.headers = {path: _header(path) for path in self.open.descriptors}

    def ranges(self, key: str) -> dict[str, tuple[Entry, Part, Range]]:
        """What is read of a weight, by the endings of its tensors' names; "": the numbers."""
        reading = self.readings[key]
        tensors = {"": (self.files.main(key), reading.region), **reading.beside}
        return {
            ending: (entry, part, _range(entry, part, *self.headers[entry.path][entry.key]))
            for ending, (entry, part) in tensors.items()
        }


@dataclass
class LayerReader:
    """Reads one layer's experts into rows of the host's cache, a matrix at a time.

    Called by several threads.
    """

    checkpoint: Checkpoint
    names: list[str]
    """Of the experts, in the checkpoint."""
    slots: list[dict[str, Slot]]
    """By row of the cache, then by matrix."""

    def __post_init__(self) -> None:
        self.sound: set[tuple[int, str]] = set()
        """Experts' matrices whose numbers were found finite."""

    def key(self, expert: int, matrix: str) -> str:
        """The name of a matrix in the checkpoint."""
        return f"{self.names[expert]}.{matrix}.weight"

    @property
    def nbytes(self) -> int:
        """Bytes of the files that an expert takes."""
        known = self.checkpoint
        keys = [self.key(0, matrix) for matrix in EXPERT_MATRICES]
        return sum(nbytes(known.files.main(key), known.readings[key]) for key in keys)

    def read(self, expert: int, matrix: str) -> dict[str, tuple[Entry, Part, Tensor]]:
        """The bytes of a matrix's tensors, by the endings of their names; in no row yet.

        They are valid until this thread reads again. Raises InputError where files can't be read.
        """
        asked = self.checkpoint.ranges(self.key(expert, matrix))
        contents = self.checkpoint.open.read([place for _, _, place in asked.values()])
        return {
            ending: (entry, part, raw)
            for (ending, (entry, part, _)), raw in zip(asked.items(), contents, strict=True)
        }

    def __call__(self, expert: int, row: int, matrix: str) -> None:
        """Raises InputError where the files can't be read, or are not those that were loaded."""
        known, key, found = self.checkpoint, self.key(expert, matrix), self.read(expert, matrix)
        for path, version in {(entry.path, entry.version) for entry, _, _ in found.values()}:
            check_version(path, version)
        tensors = {ending: _tensor(*each) for ending, each in found.items()}
        piece, slot = Piece(key, 0, tensors.pop(""), tensors), self.slots[row][matrix]
        with torch.no_grad():
            if key in known.files.found:
                fill_found(slot, known.files.found[key], piece, known.readings[key])
            else:
                fill_plain(slot, piece, known.readings[key])
            if (expert, matrix) not in self.sound:
                check_finite(key, slot, known.files.main(key).path)
        self.sound.add((expert, matrix))


def _header(path: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """By the name of each tensor: its first byte in the file, and its shape."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        key: (8 + size + fields["data_offsets"][0], tuple(fields["shape"]))
        for key, fields in header.items()
        if key != "__metadata__"
    }


def _range(entry: Entry, part: Part, begin: int, shape: tuple[int, ...]) -> Range:
    """The bytes with the rows of a tensor's part, of all columns."""
    if not entry.shape:
        return entry.path, begin, begin + width(entry)
    rows = part[0] if part else slice(0, entry.shape[0])
    number, first = entry.place or (0, 0)
    above = number * shape[1] + first if entry.place else 0
    wide = math.prod(entry.shape[1:]) * width(entry)
    return entry.path, begin + (above + rows.start) * wide, begin + (above + rows.stop) * wide


def _tensor(entry: Entry, part: Part, raw: Tensor) -> Tensor:
    """A part of a tensor from the bytes of its rows."""
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise InputError(f"{entry.path}: {entry.key} is stored as {entry.dtype}, which has no use")
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()  # files need not align their tensors
    numbers = raw.view(dtype)
    if not entry.shape:
        return numbers.view(())
    region = (slice(None), *part[1:])
    return numbers.view(-1, *entry.shape[1:])[region]
