"""The base of published formats: one matrix, as some tensors of a safetensors file.

Shapes: out and in are a matrix's rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from r1.errors import InputError
from r1.files.quantized.declared import PLAIN, Declared
from r1.files.shards import Entry
from r1.storage.codes import Codes, dequantize
from r1.storage.kinds import KINDS
from r1.storage.quantized import Packed
from r1.storage.spec import Spec

Tensors = Mapping[str, Entry]
"""A matrix's tensors by the ending of their names, from the files' headers."""
Values = Mapping[str, Tensor]
"""The same with their numbers."""
Axis = tuple[int, int]
"""What a tensor's dimension runs along, the matrix's ROWS or COLUMNS, and of how many of them each
of its entries is; 0: of all."""
ROWS, COLUMNS = 0, 1
AGAIN = "download it again"
SCALE_DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
"""The scales' dtypes that r1 reads, by safetensors' names, as Spec names them."""


class Published:
    """A format: how a matrix's tensors are told, checked and read."""

    title: str
    """How messages name it (see `told`)."""
    main: str
    """The ending of the tensor that holds the numbers. The others are small."""
    scale: str
    """The ending of the scales."""
    more: tuple[str, ...] = ()
    """The endings of other tensors that belong to it."""

    def told(self, t: Tensors) -> str:
        """How messages name the format of these tensors."""
        return self.title

    def spec(self, t: Tensors, d: Declared) -> Spec | None:
        """How the matrix may stay in memory; None: it is dequantized. Raises InputError."""
        raise NotImplementedError(f"{type(self).__name__} must define spec(t, d)")

    def shape(self, t: Tensors, d: Declared) -> tuple[int, int]:
        """Rows and columns of the matrix, as far as headers tell: columns may be padded."""
        raise NotImplementedError(f"{type(self).__name__} must define shape(t, d)")

    def expected(
        self, t: Tensors, spec: Spec | None, shape: tuple[int, int]
    ) -> dict[str, tuple[int, ...]]:
        """The shape that each of the tensors must have."""
        raise NotImplementedError(f"{type(self).__name__} must define expected(...)")

    def layout(self, spec: Spec | None) -> dict[str, tuple[Axis, ...]]:
        """How the tensors lie beside the matrix, so that a part of it can be read alone.

        What is not named is read whole.
        """
        return {}

    def codes(self, v: Values, spec: Spec, shape: tuple[int, int], d: Declared) -> Codes:
        """The numbers, (out, in), unpacked."""
        raise NotImplementedError(f"{type(self).__name__} must define codes(...)")

    def packed(self, v: Values, spec: Spec, shape: tuple[int, int], d: Declared) -> Packed:
        """The tensors to store, where memory keeps the format. A subclass may know a short cut."""
        return KINDS[spec.kind].encode(self.codes(v, spec, shape, d))

    def dense(self, v: Values, spec: Spec | None, shape: tuple[int, int], d: Declared) -> Tensor:
        """The weight, fp32 (out, in)."""
        assert spec is not None  # formats that memory can't keep override this
        return dequantize(self.codes(v, spec, shape, d), spec)


@dataclass(frozen=True)
class Found:
    """One quantized matrix of the files."""

    name: str
    """The module's name in the checkpoint."""
    format: Published
    tensors: Tensors
    spec: Spec | None
    declared: Declared

    @property
    def main(self) -> Entry:
        """The tensor that holds the numbers."""
        return self.tensors[self.format.main]

    @property
    def what(self) -> str:
        """How a message begins: the file, the tensor and its format."""
        return f"{self.main.path}: {self.main.key} is {self.format.told(self.tensors)}"

    def shape(self, wanted: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns: where the file's columns are padded, as many as are wanted."""
        rows, columns = self.format.shape(self.tensors, self.declared)
        padding = self.format.shape(self.tensors, self.declared)[1] - wanted[-1]
        return rows, wanted[-1] if 0 < padding < 8 else columns

    def check(self, shape: tuple[int, int]) -> None:
        """Compare the headers with a matrix of this shape. Raises InputError."""
        self._check_scale()
        self._check_stack()
        for ending, wanted in self.format.expected(self.tensors, self.spec, shape).items():
            entry = self.tensors.get(ending)
            if entry is None:
                raise InputError(f"{self.what}, but there is no {self.name}.{ending}: {AGAIN}")
            if entry.shape != wanted:
                size = f"a matrix of {shape[0]} x {shape[1]}"
                by = f" and blocks of {self.spec.block(shape)}" if self.spec else ""
                raise InputError(
                    f"{entry.path}: {entry.key} has shape {entry.shape}; {size}{by} make it "
                    f"{wanted}: compare it and {self.declared.where} with the publisher's"
                )

    def _check_scale(self) -> None:
        if self.format.scale not in self.tensors:
            lacks = f"there is no {self.name}.{self.format.scale} to scale it"
            raise InputError(f"{self.what}, but {lacks}: {AGAIN}")

    def _check_stack(self) -> None:
        """In a stack, gate and up may share no block, though both have as many as they need."""
        scales, place = self.tensors[self.format.scale].place, self.main.place
        if self.spec is None or scales is None or place is None or not scales[1]:
            return  # it begins where its stack does, or all of the stack has one scale
        if scales[1] * self.spec.rows != place[1]:
            rows = f"its row {place[1]} begins another matrix within {self.spec.rows} rows"
            raise InputError(
                f"{self.what}, but {rows} that share a scale, which r1 does not divide: {PLAIN}"
            )

    def check_values(self, values: Values, shape: tuple[int, int]) -> None:
        """Look at scales and tables. Raises InputError."""
        for ending, value in values.items():
            entry = self.tensors[ending]
            if ending == self.format.main:
                continue
            if ending == "weight_shape" and tuple(value.tolist()) != shape:
                raise InputError(
                    f"{entry.path}: {entry.key} says {value.tolist()}, and the packed numbers are "
                    f"of {list(shape)}: {AGAIN}"
                )
            if value.is_floating_point() and not bool(value.float().isfinite().all()):
                holds = f"{entry.key} holds NaN or infinite scales: {AGAIN}"
                raise InputError(f"{entry.path}: {holds}")
            if value.dtype == torch.uint8 and ending == self.format.scale and (value == 255).any():
                holds = f"{entry.key} holds scales of 255, which is NaN: {AGAIN}"
                raise InputError(f"{entry.path}: {holds}")


def scale_dtype(t: Tensors, ending: str) -> str:
    """The scales' dtype as Spec names it. Raises InputError for one that r1 does not read."""
    entry = t[ending]
    if entry.dtype not in SCALE_DTYPES:
        reads = f"r1 reads scales in {', '.join(SCALE_DTYPES)}"
        raise InputError(f"{entry.path}: {entry.key} is stored as {entry.dtype}; {reads}")
    return SCALE_DTYPES[entry.dtype]


def check_groups(entry: Entry, group: Tensor, groups: int, ordered: int | None) -> None:
    """Check a table of columns' groups, int32 (in,). `ordered`: it must count groups of so many.

    Raises InputError.
    """
    inside = bool((group >= 0).all()) and bool((group < groups).all())
    in_order = True
    if ordered is not None:
        in_order = torch.equal(group.long().cpu(), torch.arange(len(group)) // ordered)
    if not inside or not in_order:
        wrong = (
            f"names groups outside the {groups} there are"
            if not inside
            else "does not count the columns in order, though config.json says desc_act = false"
        )
        raise InputError(f"{entry.path}: {entry.key} {wrong}: download both again")
