"""A checkpoint's safetensors files: the tensors that they list, and their bytes as a stream."""

from __future__ import annotations

import math
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r1.errors import InputError
from r1.files.folder import check_file, files_in
from r1.files.foreign import check_gguf
from r1.placement.placement import Part
from r1.reading import read_json, status_of
from r1.storage import fp8

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": fp8.E4M3,
}
"""The dtypes of weights that r1 reads, by safetensors' names. (Packed numbers: files/quantized.)"""
_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
REMAP_BYTES = 256 * 2**20
"""After so many bytes a file is unmapped and mapped anew, which frees the pages that were read."""


Version = tuple[int, int, int]
"""A file's size, and the times of the last change of its content and of its inode.

A file of the same size with a copied time has a new inode time. The inode's number is not
compared: some network file systems number their files anew while they are used."""


@dataclass(frozen=True)
class Entry:
    """One tensor of one shard, as its header describes it."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    version: Version = (0, 0, 0)
    """The file's version when its header was read."""
    place: tuple[int, int] | None = None
    """Of a matrix in a stack (layouts.py): its number, and the first of its rows."""


def has_shards(directory: Path) -> bool:
    """Whether there is anything beside config.json that may hold weights."""
    return any(path.name.endswith((".safetensors", INDEX)) for path in files_in(directory))


def entries_of(directory: Path, *, unlisted: bool = False) -> dict[str, Entry]:
    """Every tensor of the checkpoint, from its files' headers. No weight is read yet.

    `unlisted`: the index may omit tensors, as ModelOpt's does. Raises InputError for files that are
    missing or corrupt, and an index that contradicts them.
    """
    index = directory / INDEX
    if check_file(index):
        return _indexed(directory, index, unlisted)
    files = files_in(directory)
    shards = [path for path in files if path.name.endswith(".safetensors")]
    if directory / SINGLE in shards:
        return _header(directory / SINGLE)
    if len(shards) == 1:
        return _header(shards[0])
    if shards:
        raise InputError(
            f"{directory} has {len(shards)} safetensors files but no {INDEX} to say what is in "
            "them: download it"
        )
    pickles = [path.name for path in files if path.suffix in PICKLES]
    if pickles:
        raise InputError(
            f"{directory} holds only pickles ({some(pickles)}), which can run code when opened, so "
            "r1 never does: get the checkpoint's safetensors"
        )
    check_gguf(directory)
    raise InputError(
        f"{directory} has no *.safetensors: a checkpoint's folder holds config.json and "
        "*.safetensors"
    )


def _indexed(directory: Path, index: Path, unlisted: bool) -> dict[str, Entry]:
    """The tensors of all files that the index names; both must agree."""
    weight_map = _weight_map(index)
    entries: dict[str, Entry] = {}
    names = sorted(set(weight_map.values()))
    for name in names:  # all names are checked before the first file is opened
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise InputError(
                f"{index} names {name!r}, which is no safetensors file in this folder: it is not "
                "opened"
            )
    for name in names:
        status = status_of(directory / name)
        if status is None or not stat.S_ISREG(status.st_mode):
            lacks = "which the folder lacks: download that file again"
            raise InputError(f"{index} names {name}, {lacks}")
    for name in names:
        for key, entry in _header(directory / name).items():
            if weight_map.get(key) != name and not (unlisted and key not in weight_map):
                told = f"in {weight_map[key]}" if key in weight_map else "nowhere"
                has = f"but {INDEX} has it {told}: download both again"
                raise InputError(f"{directory / name} holds {key!r}, {has}")
            entries[key] = entry
    lost = [key for key in weight_map if key not in entries]
    if lost:
        lack = "in files that lack them: download those files again"
        raise InputError(f"{index} has {some(lost)} {lack}")
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = read_json(index)["weight_map"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{index} can't be read ({reason}): download it again") from None
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{index} has a weight_map that does not name a file for each tensor: download it again"
        )
    return weight_map


def _header(path: Path) -> dict[str, Entry]:
    version = _version(path)
    with _opened(path, version) as shard:
        slices = {key: shard.get_slice(key) for key in shard.offset_keys()}
        return {
            key: Entry(path, key, tuple(s.get_shape()), s.get_dtype(), version)
            for key, s in slices.items()
        }


def _version(path: Path) -> Version:
    """The version of a shard. Raises InputError if it is no regular file, or missing."""
    status = check_file(path)
    if status is None:
        raise InputError(f"{path} was there and is missing now: load the model again")
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def _opened(path: Path, version: Version) -> Iterator[Any]:
    """A shard, mapped. Raises InputError if it is not, before and after, of this version.

    A download that goes on may replace a shard between the look at its header and its reading.
    The shapes would fit, and the weights would be another model's.

    One thing can't be told: a shard that is cut while it is mapped. The system ends the process
    (SIGBUS) at the first page that is gone. Looking at the size before each tensor would not help,
    for nearly all of the time is spent in copying one.
    """
    check_version(path, version)
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is cut off or corrupt ({error}): download it again") from None
    check_version(path, version)


def check_version(path: Path, version: Version) -> None:
    """Raise InputError if a shard is another one than when its header was read."""
    if _version(path) != version:
        raise InputError(
            f"{path} was changed while it was read: load the model again when nothing writes to "
            "its folder"
        )


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor's part, as a view of the mapped file."""

    key: str
    first: int
    """The first row's number within the part."""
    rows: Tensor
    beside: dict[str, Tensor]
    """The tensors that belong to it, by their endings: a quantized matrix's scales."""

    @property
    def nbytes(self) -> int:
        """The bytes of all of them."""
        return self.rows.nbytes + sum(tensor.nbytes for tensor in self.beside.values())


def stream(
    entries: dict[str, Entry],
    parts: dict[str, Part],
    whole: Collection[str] = (),
    beside: Mapping[str, Mapping[str, tuple[Entry, Part]]] | None = None,
) -> Iterator[Piece]:
    """Read `parts` of tensors, shard after shard.

    Large tensors come in pieces, but those of `whole` never. So no more than 2 REMAP_BYTES are
    mapped and read at a time, however large an embedding is. `beside` names parts of tensors
    that are read with a tensor; they may lie in another shard.
    """
    beside = beside or {}
    by_shard: dict[Path, list[tuple[str, slice]]] = {}  # in the order in which they lie in the file
    versions = {entry.path: entry.version for entry in entries.values()}
    for key, entry in entries.items():
        rows = parts[key][0] if parts[key] else slice(0, 1)
        wide = math.prod(entry.shape[1:])  # all columns: of a page, the system reads all
        height = rows.stop - rows.start if key in whole else max(1, REMAP_BYTES // (4 * wide))
        starts = range(rows.start, rows.stop, height)
        cuts = [slice(start, min(start + height, rows.stop)) for start in starts]
        by_shard.setdefault(entry.path, []).extend((key, cut) for cut in cuts)
    for path, pending in by_shard.items():
        pending.reverse()
        while pending:
            mapped = 0
            with _opened(path, versions[path]) as shard:
                while pending and mapped < REMAP_BYTES:
                    key, cut = pending.pop()
                    region = (cut, *parts[key][1:]) if parts[key] else ()
                    first = cut.start - parts[key][0].start if parts[key] else 0
                    more = {
                        ending: _part(shard, each, mine) if each.path == path else one(each, mine)
                        for ending, (each, mine) in beside.get(key, {}).items()
                    }
                    piece = Piece(key, first, _part(shard, entries[key], region), more)
                    yield piece
                    wide = math.prod(entries[key].shape[1:]) * width(entries[key])
                    mapped += (cut.stop - cut.start) * wide
                    mapped += sum(tensor.nbytes for tensor in more.values())
                    del more, piece


def width(entry: Entry) -> int:
    """Bytes of one of a tensor's numbers."""
    return _WIDTHS.get(entry.dtype, 1)


def one(entry: Entry, part: Part = ()) -> Tensor:
    """A part of a tensor, or all of it."""
    with _opened(entry.path, entry.version) as shard:
        return _part(shard, entry, part)


def _part(shard: Any, entry: Entry, part: Part) -> Tensor:
    """A part of a tensor of an opened shard. Without dimensions it is the whole tensor."""
    if entry.place is not None:
        number, first = entry.place
        rows, columns = part or [slice(0, size) for size in entry.shape]
        part = (number, slice(first + rows.start, first + rows.stop), columns)  # type: ignore
    tensor: Tensor = shard.get_slice(entry.key)[part] if part else shard.get_tensor(entry.key)
    return tensor


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
