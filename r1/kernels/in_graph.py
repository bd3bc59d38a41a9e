"""A stored matrix as the arguments of an operator, and again as a matrix.

torch.compile takes an operator of ours as a whole: its own code stands beside our kernels, and not
in place of them. But such an operator gets tensors, numbers and words only, and no module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.kernels.fixed import Fixed
from r1.kernels.tiles import packed_bits, tensor_of
from r1.storage.joined import Part
from r1.storage.kinds import KINDS
from r1.storage.matrix import Matrix
from r1.storage.quantized import Quantized
from r1.storage.spec import Spec


def parts_of(matrix: Matrix) -> tuple[list[Tensor], str]:
    """The tensors of a matrix, or of a part of a joined one, and how they are read ("" if dense).

    Of a packed matrix they are its numbers, their scales, and their zero points where it has any.
    """
    if not packed_bits(matrix):
        return [tensor_of(matrix)], ""
    stored, first, last = matrix, 0, matrix.shape[-2]
    if isinstance(matrix, Part):
        stored, first, last = matrix.whole, matrix.start, matrix.stop
    assert isinstance(stored, Quantized) and not stored.spec.indexed
    q, scale, zero, _ = stored.cut(first, last)
    parts, spec = [q, scale] if zero is None else [q, scale, zero], stored.spec
    return parts, f"{spec.kind} {spec.rows} {spec.columns}"


def lead_of(x: list[Tensor]) -> torch.Size:
    """The dimensions before the columns of an operator's input: of x (..., in) itself, or of what
    `as_fp8` (r1/storage/activations.py) has made of it, whose columns are two dimensions.
    """
    return x[0].shape[: -len(x)]


def input_of(x: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Fixed | None]:
    """The same as a matrix (N, in), and as kernels take it if it is FP8. Of the latter they want to
    know x's shape and `dtype`, and not its numbers.
    """
    tokens = lead_of(x).numel()
    first, *scales = (tensor.reshape(tokens, -1).contiguous() for tensor in x)
    if not scales:
        return first, None
    return first.new_empty(first.shape, dtype=dtype), Fixed(first, *scales)


def made_of(parts: list[Tensor], how: str, columns: int) -> Matrix:
    """The packed matrix, (out, columns) or (E, out, columns), of what `parts_of` gave."""
    kind, rows, wide = how.split()
    spec = Spec(kind, int(rows), int(wide), zeros=len(parts) == 3)
    storage: type[Quantized] = KINDS[kind]
    packed = dict(zip(storage.NAMES, parts, strict=False))
    return storage(spec, (*parts[0].shape[:-1], columns), parts[0].dtype, packed)
