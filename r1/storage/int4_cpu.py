"""int4 as torch's CPU operator reads it: the numbers of int4.py in another order.

The operator multiplies bf16 by packed numbers as they are, and wants the numbers of neighbouring
rows side by side. So a model that computes in bf16 on a CPU is repacked after loading, one matrix
at a time, where the operator can take it. It takes 3% more bytes than before (with groups of 128),
and Moonlight's shape with 3 layers decodes a token in 99 ms, for 275 ms in bf16 and 129 in int8
(one core of an AMD EPYC; before it dequantized, in 2.5 s).

Shapes: out and in are a matrix's rows and columns; E experts, M rows of x.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r1.storage.codes import Codes, dequantize
from r1.storage.grouped import expert_by_expert
from r1.storage.int4 import Int4
from r1.storage.joined import Part
from r1.storage.matrix import Matrix
from r1.storage.packing import pack_nibbles, unpack_nibbles
from r1.storage.quantized import product_dtype
from r1.storage.spec import Spec

GROUPS = (32, 64, 128, 256)
"""Columns that may share a scale."""
TALL = 64
"""Rows whose numbers the operator stores together, at most."""
ZERO = 8
"""The number that stands for 0."""
MANY_ROWS = 256
"""From so many rows of x on a product with the dequantized matrix is faster."""


class CpuInt4(Matrix):
    """A weight (out, in) or (E, out, in) of 4 bits, with a bf16 scale for each group of a row.

    `q` is uint8 (..., out, wide / 2), in the operator's order; `wide` is `in`, filled up with zeros
    to whole groups. `factors`, bf16 (..., wide / columns, out, 2), has each group's scale and what
    is added to the scaled numbers, which is 0.
    """

    spec: Spec
    q: Tensor
    factors: Tensor

    def __init__(self, matrix: Int4) -> None:
        """Raises ValueError for a matrix that `takes` refuses."""
        super().__init__()
        if not takes(matrix.spec, matrix.shape):
            raise ValueError(f"no layout for {matrix.shape} of {matrix.spec.describe()}")
        self.spec, self.shape, self.dtype = matrix.spec, matrix.shape, matrix.dtype
        q = matrix.q.view(-1, *matrix.q.shape[-2:])  # (E, out, in / 2)
        more = -self.shape[-1] % self.spec.columns
        each = (F.pad(unpack_nibbles(one, self.shape[-1]), (0, more), value=ZERO) for one in q)
        packed = torch.stack([_pack(numbers) for numbers in each])
        scale = matrix.scale.mT
        self.register_buffer("q", packed.view(*self.shape[:-1], -1))
        self.register_buffer("factors", torch.stack([scale, torch.zeros_like(scale)], dim=-1))

    def _dense(self, q: Tensor, factors: Tensor, dtype: torch.dtype | None) -> Tensor:
        codes = Codes(_unpack(q)[..., : self.shape[-1]], factors[..., 0].mT)
        return dequantize(codes, self.spec).to(dtype or self.dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        if len(self.shape) == 2:
            return self._dense(self.q, self.factors, dtype)
        return torch.stack([self.one(e, dtype) for e in range(self.shape[0])])

    def one(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._dense(self.q[index], self.factors[index], dtype)

    def pick(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if len(self.shape) == 2:
            return super().pick(ids, dtype)
        return self._dense(self.q.index_select(0, ids), self.factors.index_select(0, ids), dtype)

    def matmul(self, x: Tensor) -> Tensor:
        dtype, rows = product_dtype(x), x.numel() // x.shape[-1]
        if dtype != torch.bfloat16 or rows >= MANY_ROWS:
            return F.linear(x, self.dense(dtype))
        y = _product(x.to(dtype).reshape(rows, -1), self.q, self.factors, self.spec.columns)
        return y.unflatten(0, x.shape[:-1])

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        dtype = product_dtype(x)
        if dtype != torch.bfloat16:
            return super().grouped(x, ends)
        return _grouped(x.to(dtype), self.q, self.factors, ends, self.spec.columns)

    def stored(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Copies, in the order of int4.py."""
        packed, scale = usual(self.q, self.factors, self.shape[-1])
        return {"weight_packed": packed[..., rows, :], "weight_scale": scale[..., rows, :]}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec.describe()}"


def takes(spec: Spec, shape: tuple[int, ...]) -> bool:
    """Whether the operator can read such a matrix as exactly as we do: symmetric, bf16 scales, and
    in an order that we can undo.
    """
    usual = Spec("int4", 1, spec.columns, scale="bf16")
    whole = shape[-2] % TALL == 0 and shape[-1] % 2 == 0
    return spec == usual and spec.columns in GROUPS and whole and _layout() is not None


def repack(model: nn.Module, leave: tuple[type[nn.Module], ...] = ()) -> None:
    """Replace every int4 matrix of a model, on a CPU, by one in the operator's order.

    Those that modules of a type in `leave` own stay as they are.
    """
    for module in list(model.modules()):
        if isinstance(module, (Part, *leave)):
            continue  # of a Part, its joint is repacked once for all its parts
        for name, matrix in list(module.named_children()):
            if isinstance(matrix, Int4) and takes(matrix.spec, matrix.shape):
                setattr(module, name, CpuInt4(matrix))
            elif isinstance(matrix, Part) and matrix is matrix.joint.parts[0]:
                whole = matrix.joint.whole
                if isinstance(whole, Int4) and takes(whole.spec, whole.shape):
                    matrix.joint.store(CpuInt4(whole))


def _product(x: Tensor, q: Tensor, factors: Tensor, columns: int) -> Tensor:
    """bf16 x (M, in), times one matrix -> (M, out)."""
    if more := 2 * q.shape[-1] - x.shape[-1]:
        x = F.pad(x, (0, more))
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), q, columns, factors)
    return y


@torch.library.custom_op("r1::grouped_int4", mutates_args=())
def _grouped(x: Tensor, q: Tensor, factors: Tensor, ends: Tensor, columns: int) -> Tensor:
    return expert_by_expert(
        x, ends, q.shape[1], lambda rows, e: _product(rows, q[e], factors[e], columns)
    )


@_grouped.register_fake
def _(x: Tensor, q: Tensor, factors: Tensor, ends: Tensor, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], q.shape[1])


def _pack(numbers: Tensor) -> Tensor:
    """0 to 15 (out, in) -> uint8 (out, in / 2) in the operator's order."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 2)
    return packed


def usual(q: Tensor, factors: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """q and factors of a CpuInt4 with so many columns, on any device, as int4.py stores them:
    uint8 (..., out, in / 2), and scales (..., out, groups).
    """
    return pack_nibbles(_unpack(q)[..., :columns]), factors[..., 0].mT


def _unpack(q: Tensor) -> Tensor:
    """The inverse, of (..., out, in / 2)."""
    layout = _layout()
    assert layout is not None  # `takes` has looked
    tall, order = layout
    columns = 2 * q.shape[-1]
    # In each block of rows: for each column the numbers of all rows, two in a byte.
    blocks = q.unflatten(-2, (-1, tall)).flatten(-2).unflatten(-1, (columns, tall // 2))
    across = blocks.mT.contiguous()  # (..., out / tall, tall / 2, in)
    numbers = torch.stack((across & 15, across >> 4), dim=-2).flatten(-3, -2)  # (..., tall, in)
    return numbers.index_select(-2, order.to(q.device)).flatten(-3, -2)


@lru_cache
def _layout() -> tuple[int, Tensor] | None:
    """How many rows are stored together, and the place of each of them among these, int64 (rows,).

    None for an order of another kind. It depends on the CPU, and shows in what becomes of a matrix
    that counts its places, one hexadecimal digit at a time.
    """
    columns = 32
    count = torch.arange(TALL * columns).view(TALL, columns)
    found = torch.zeros(count.numel(), dtype=torch.int64)
    for digit in range(0, count.numel().bit_length(), 4):
        packed = _pack(count >> digit & 15).flatten()
        found |= unpack_nibbles(packed, len(found)).long() << digit
    places = found.argsort().view(TALL, columns)  # of each row's and column's number
    tall = int(places[0, 1])
    order = places[:tall, 0]
    row, column = torch.arange(TALL)[:, None], torch.arange(columns)
    known = row // tall * tall * columns + column * tall + order[row % tall]
    return (tall, order) if places.equal(known) else None
