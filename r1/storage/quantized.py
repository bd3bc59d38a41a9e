"""The base of quantized storages: packed numbers, scales, and what is made of both on the way.

Shapes: out and in are a matrix's rows and columns; E experts, n chosen matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.storage.codes import SCRATCH, Codes, dequantize, round_to_nearest
from r1.storage.matrix import Matrix
from r1.storage.spec import SCALES, Spec

Packed = dict[str, Tensor]
"""The tensors of a matrix as it is stored, named as a checkpoint names them after the module."""


class Quantized(Matrix):
    """A weight (out, in) or (E, out, in) that stays packed: whoever multiplies unpacks a part.

    Everything but the packing is here. A subclass says how `q` lies in memory (`pack`, `unpack`,
    `packed_shape`) and what a checkpoint calls it (`NAMES`). Scales and zero points lie beside it,
    (..., down, across), one for each block (spec.py).

    `dense`, `one` and `pick` compute in fp32 and round once, to the dtype that is asked for. So a
    matrix that was published in this format gives the numbers of its publisher's library.
    """

    KIND: str
    NAMES: tuple[str, str, str, str] = (
        "weight", "weight_scale", "weight_zero_point", "weight_g_idx",
    )  # fmt: skip
    """The checkpoint's names of q, scale, zero and group."""

    spec: Spec
    q: Tensor
    scale: Tensor
    zero: Tensor | None
    group: Tensor | None
    unpacked_bytes = 8  # its number in fp32, and the product with its scale

    def __init__(
        self, spec: Spec, shape: tuple[int, ...], dtype: torch.dtype, packed: Packed
    ) -> None:
        """`dtype` is the one that `dense(None)` gives, the model's own."""
        super().__init__()
        self.spec, self.shape, self.dtype = spec, torch.Size(shape), dtype
        for name, key in zip(("q", "scale", "zero", "group"), self.NAMES, strict=True):
            self.register_buffer(name, packed.get(key))

    # ------------------------- what a subclass says
    @staticmethod
    def pack(q: Tensor) -> Tensor:
        """(..., out, in) numbers -> as they are stored."""
        raise NotImplementedError("a quantized storage must define pack(q)")

    @staticmethod
    def unpack(q: Tensor, columns: int) -> Tensor:
        """The inverse, for a matrix of so many columns."""
        raise NotImplementedError("a quantized storage must define unpack(q, columns)")

    @staticmethod
    def packed_shape(shape: tuple[int, ...]) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and the dtype of the stored q."""
        raise NotImplementedError("a quantized storage must define packed_shape(shape)")

    # ------------------------- ways to make one
    @classmethod
    def empty(cls, spec: Spec, shape: tuple[int, ...], dtype: torch.dtype) -> Quantized:
        """One whose numbers are not set yet."""
        lead, across = shape[:-2], spec.grid(shape)
        q, q_dtype = cls.packed_shape(shape)
        packed = {
            cls.NAMES[0]: torch.empty(q, dtype=q_dtype),
            cls.NAMES[1]: torch.empty((*lead, *across), dtype=SCALES[spec.scale]),
        }
        if spec.zeros:
            zeros = torch.uint8 if cls.KIND == "int4" else torch.int16
            packed[cls.NAMES[2]] = torch.empty((*lead, *across), dtype=zeros)
        if spec.indexed:
            packed[cls.NAMES[3]] = torch.empty((*lead, shape[-1]), dtype=torch.int32)
        return cls(spec, shape, dtype, packed)

    @classmethod
    def encode(cls, codes: Codes) -> Packed:
        """The tensors to store, of a matrix's codes."""
        values = (cls.pack(codes.q), codes.scale, codes.zero, codes.group)
        pairs = zip(cls.NAMES, values, strict=True)
        return {name: value for name, value in pairs if value is not None}

    @classmethod
    def codes(cls, weight: Tensor, spec: Spec) -> Codes:
        """A matrix (out, in) of any float dtype as numbers and scales: round to nearest."""
        return round_to_nearest(weight, spec)

    @classmethod
    def quantize(cls, weight: Tensor, spec: Spec) -> Packed:
        """The tensors to store, of a matrix (out, in) of any float dtype."""
        return cls.encode(cls.codes(weight, spec))

    @classmethod
    def of(cls, weight: Tensor, spec: Spec) -> Quantized:
        """A finished one, of a weight (out, in) or (E, out, in)."""
        if weight.dim() == 2:
            return cls(spec, tuple(weight.shape), weight.dtype, cls.quantize(weight, spec))
        each = [cls.quantize(matrix, spec) for matrix in weight]
        packed = {name: torch.stack([one[name] for one in each]) for name in each[0]}
        return cls(spec, tuple(weight.shape), weight.dtype, packed)

    # ------------------------- what is asked of a matrix
    def _dense(self, packed: Packed, dtype: torch.dtype | None) -> Tensor:
        """(..., out, in) of a part of the stored tensors."""
        q, scale, zero, group = (packed.get(name) for name in self.NAMES)
        assert q is not None and scale is not None
        codes = Codes(self.unpack(q, self.shape[-1]), scale, zero, group)
        return dequantize(codes, self.spec).to(dtype or self.dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        if len(self.shape) == 2:
            return self._dense(self.packed(), dtype)
        # A stack's fp32 numbers would be many times the packed ones: some experts at a time.
        each = max(1, SCRATCH // (4 * self.shape[1] * self.shape[2]))
        parts = zip(*(tensor.split(each) for tensor in self.packed().values()), strict=True)
        names = tuple(self.packed())
        return torch.cat(
            [self._dense(dict(zip(names, part, strict=True)), dtype) for part in parts]
        )

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(product_dtype(x)))

    def one(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._dense({name: t[index] for name, t in self.packed().items()}, dtype)

    def pick(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if len(self.shape) == 2:
            return super().pick(ids, dtype)
        chosen = {name: t.index_select(0, ids) for name, t in self.packed().items()}
        return self._dense(chosen, dtype)

    def stored(self, rows: slice = slice(None)) -> Packed:
        first, last, _ = rows.indices(self.shape[-2])
        return self._named(self.cut(first, last))

    def packed(self) -> Packed:
        """All that `stored` gives. The compiler of torch 2.11 can't trace a slice's bounds."""
        return self._named(self.cut(0, self.shape[-2]))

    def _named(self, tensors: Sequence[Tensor | None]) -> Packed:
        pairs = zip(self.NAMES, tensors, strict=True)
        return {name: tensor for name, tensor in pairs if tensor is not None}

    def cut(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """q, scale, zero and group of rows `first` to `last`, which are whole blocks, as views."""
        if (first, last) == (0, self.shape[-2]):
            return self.q, self.scale, self.zero, self.group
        start, stop = 0, self.scale.shape[-2]
        if height := self.spec.rows:
            assert first % height == 0, "rows are taken from whole blocks"
            start, stop = first // height, -(-last // height)
        zero = None if self.zero is None else self.zero[..., start:stop, :]
        return self.q[..., first:last, :], self.scale[..., start:stop, :], zero, self.group

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec.describe()}"


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with x runs in: x's own, or autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def stack_rows(*matrices: Quantized) -> Quantized | None:
    """The matrices, one above the other, as a single one. None where blocks would be split.

    A block must not reach over a border, so every matrix but the last is whole blocks high.
    """
    first = matrices[0]
    spec, height = first.spec, first.spec.rows
    alike = all(type(m) is type(first) and m.spec == spec for m in matrices)
    if not alike or spec.indexed or not height or any(m.shape[-2] % height for m in matrices[:-1]):
        return None
    packed = {
        name: torch.cat([m.stored()[name] for m in matrices], dim=-2) for name in first.stored()
    }
    rows = sum(m.shape[-2] for m in matrices)
    shape = (*first.shape[:-2], rows, first.shape[-1])
    return type(first)(spec, shape, first.dtype, packed)
