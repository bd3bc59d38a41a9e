"""Whole numbers of 4 or 8 bits in int32 words: compressed-tensors, AWQ and GPTQ.

Shapes: out and in are a matrix's rows and columns; G groups of columns; n numbers in a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.errors import InputError
from r1.files.quantized.declared import Declared
from r1.files.quantized.published import (
    COLUMNS,
    ROWS,
    Axis,
    Published,
    Tensors,
    Values,
    check_groups,
    scale_dtype,
)
from r1.storage.codes import Codes
from r1.storage.packing import unpack_words
from r1.storage.quantized import Packed
from r1.storage.spec import Spec

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ puts column 8c + j: in nibble AWQ_ORDER[j] of word c."""


def _bits(d: Declared, t: Tensors, main: str) -> int:
    if d.bits is None:
        entry = t[main]
        lacks = "config.json has no quantization_config to say how it is packed"
        raise InputError(f"{entry.path}: {entry.key} is packed, but {lacks}: download it again")
    return d.bits


def _integers(q: Tensor, bits: int) -> Tensor:
    """Unsigned numbers -> as codes hold them: int4 0 to 15, int8 around 0."""
    return q if bits == 4 else (q.to(torch.int16) - 128).to(torch.int8)


def _per_word(spec: Spec | None) -> int:
    """Numbers in a word."""
    return 8 if spec is not None and spec.kind == "int4" else 4


def _groups(spec: Spec | None) -> Axis:
    """Columns of a group. A table of groups (g_idx) may send a column to any of them."""
    assert spec is not None
    return COLUMNS, 0 if spec.indexed else spec.columns


def _zeros(z: Tensor, bits: int) -> Tensor:
    """Unsigned zero points, uint8 -> as codes hold them."""
    return z if bits == 4 else z.to(torch.int16) - 128


class CompressedWords(Published):
    """compressed-tensors' pack-quantized.

    weight_packed I32 (out, in / n): column n c + j is number j of word c, unsigned. Numbers and
    zero points are around 2^(bits - 1), so that cancels in their difference. weight_scale (out, G).
    weight_zero_point I32 (out / n, G) is packed along *out*. weight_g_idx I32 (in,) is of older
    releases (actorder group). weight_shape I64 (2,) repeats out and in.
    """

    title, main, scale = "packed by compressed-tensors", "weight_packed", "weight_scale"
    more = ("weight_shape", "weight_zero_point", "weight_g_idx")

    def shape(self, t: Tensors, d: Declared) -> tuple[int, int]:
        rows, words = t["weight_packed"].shape
        return rows, words * 32 // _bits(d, t, self.main)

    def spec(self, t: Tensors, d: Declared) -> Spec:
        bits, dtype = _bits(d, t, self.main), scale_dtype(t, "weight_scale")
        zeros, indexed = "weight_zero_point" in t, "weight_g_idx" in t
        if not zeros and not d.symmetric:
            entry = t["weight_packed"]
            lacks = f"{entry.key.removesuffix('weight_packed')}weight_zero_point"
            says = f"{d.where} says symmetric = false, and there is no {lacks}"
            raise InputError(f"{entry.path}: {entry.key}: {says}: download it again")
        scale, columns = t["weight_scale"].shape, self.shape(t, d)[1]
        rows = 0 if scale in ((), (1,)) else 1
        group = d.columns(t["weight_packed"].key, columns, scale[-1] if scale else 1) or 0
        return Spec(f"int{bits}", rows, group, dtype, zeros, indexed)

    def expected(
        self, t: Tensors, spec: Spec | None, shape: tuple[int, int]
    ) -> dict[str, tuple[int, ...]]:
        assert spec is not None
        (rows, columns), per_word = shape, 8 if spec.kind == "int4" else 4
        down, across = spec.grid(shape)
        scale = t["weight_scale"].shape if not spec.rows else (down, across)
        shapes = {"weight_packed": (rows, -(-columns // per_word)), "weight_scale": scale}
        if spec.zeros:
            shapes["weight_zero_point"] = (-(-rows // per_word), across)
        if spec.indexed:
            shapes["weight_g_idx"] = (columns,)
        return shapes

    def layout(self, spec: Spec | None) -> dict[str, tuple[Axis, ...]]:
        assert spec is not None
        per_word, groups = _per_word(spec), _groups(spec)
        return {
            "weight_packed": ((ROWS, 1), (COLUMNS, per_word)),
            "weight_scale": ((ROWS, spec.rows), groups),
            **({"weight_zero_point": ((ROWS, per_word), groups)} if spec.zeros else {}),
        }

    def codes(self, v: Values, spec: Spec, shape: tuple[int, int], d: Declared) -> Codes:
        bits = 4 if spec.kind == "int4" else 8
        q = unpack_words(v["weight_packed"], bits)[:, : shape[1]]
        return Codes(_integers(q, bits), *self._rest(v, spec, shape, bits))

    def packed(self, v: Values, spec: Spec, shape: tuple[int, int], d: Declared) -> Packed:
        if spec.kind != "int4" or shape[1] % 8:
            return super().packed(v, spec, shape, d)
        # These words are our bytes (int4.py).
        scale, zero, group = self._rest(v, spec, shape, 4)
        out = {"weight_packed": v["weight_packed"].contiguous().view(torch.uint8)}
        more = {"weight_scale": scale, "weight_zero_point": zero, "weight_g_idx": group}
        return out | {name: value for name, value in more.items() if value is not None}

    def _rest(
        self, v: Values, spec: Spec, shape: tuple[int, int], bits: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scales, zero points and groups."""
        zero, grid = None, spec.grid(shape)
        if spec.zeros:
            numbers = unpack_words(v["weight_zero_point"].T.contiguous(), bits)  # (G, out)
            zero = _zeros(numbers.T[: shape[0]], bits)
        return v["weight_scale"].reshape(grid), zero, v.get("weight_g_idx")


class Transposed(Published):
    """What AWQ and GPTQ share: qweight, qzeros and scales (G, out), all transposed."""

    main, scale, more = "qweight", "scales", ("qzeros", "g_idx")

    def spec(self, t: Tensors, d: Declared) -> Spec:
        bits, dtype = _bits(d, t, self.main), scale_dtype(t, "scales")
        zeros = not d.symmetric
        indexed = "g_idx" in t and not d.ordered
        return Spec(f"int{bits}", 1, d.group or 0, dtype, zeros, indexed)

    def rest(self, v: Values, spec: Spec, zero: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales (out, G), and zero points (G, out) as (out, G)."""
        bits = 4 if spec.kind == "int4" else 8
        scale = v["scales"].T.contiguous()
        return scale, _zeros(zero.T, bits).contiguous() if spec.zeros else None


class Awq(Transposed):
    """AutoAWQ's gemm: qweight I32 (in, out / 8) and qzeros I32 (G, out / 8), packed along out."""

    title = "packed by AWQ"

    def shape(self, t: Tensors, d: Declared) -> tuple[int, int]:
        columns, words = t["qweight"].shape
        return words * 8, columns

    def expected(
        self, t: Tensors, spec: Spec | None, shape: tuple[int, int]
    ) -> dict[str, tuple[int, ...]]:
        assert spec is not None
        (rows, columns), (_, groups) = shape, spec.grid(shape)
        shapes = {"qweight": (columns, rows // 8), "scales": (groups, rows)}
        shapes |= {"qzeros": (groups, rows // 8)} if spec.zeros else {}
        return {**shapes}

    def layout(self, spec: Spec | None) -> dict[str, tuple[Axis, ...]]:
        groups = _groups(spec)
        words = {"qweight": ((COLUMNS, 1), (ROWS, 8)), "qzeros": (groups, (ROWS, 8))}
        return {**words, "scales": (groups, (ROWS, 1))}

    def codes(self, v: Values, spec: Spec, shape: tuple[int, int], d: Declared) -> Codes:
        q = unpack_words(v["qweight"], 4, AWQ_ORDER).T.contiguous()
        zero = unpack_words(v["qzeros"], 4, AWQ_ORDER) if spec.zeros else q
        return Codes(q, *self.rest(v, spec, zero))


class Gptq(Transposed):
    """qweight I32 (in / n, out), packed along in; qzeros I32 (G, out / n), packed along out.

    g_idx I32 (in,) gives each column's group. Zero points of v1 are stored minus one, and their
    writers subtract from whole words, so a zero point of 0 borrows from its neighbour: one is added
    back to whole words.
    """

    title = "packed by GPTQ"

    def shape(self, t: Tensors, d: Declared) -> tuple[int, int]:
        words, rows = t["qweight"].shape
        return rows, words * 32 // _bits(d, t, self.main)

    def expected(
        self, t: Tensors, spec: Spec | None, shape: tuple[int, int]
    ) -> dict[str, tuple[int, ...]]:
        assert spec is not None
        (rows, columns), (_, groups) = shape, spec.grid(shape)
        per_word = 8 if spec.kind == "int4" else 4
        shapes = {"qweight": (-(-columns // per_word), rows), "scales": (groups, rows)}
        shapes |= {"qzeros": (groups, -(-rows // per_word))} if spec.zeros else {}
        return {**shapes, **({"g_idx": (columns,)} if "g_idx" in t else {})}

    def layout(self, spec: Spec | None) -> dict[str, tuple[Axis, ...]]:
        groups, per_word = _groups(spec), _per_word(spec)
        words = {"qweight": ((COLUMNS, per_word), (ROWS, 1)), "scales": (groups, (ROWS, 1))}
        # Symmetric numbers have zero points in the files too, and they are not looked at.
        return {**words, "qzeros": (groups, (ROWS, per_word))}

    def codes(self, v: Values, spec: Spec, shape: tuple[int, int], d: Declared) -> Codes:
        bits = 4 if spec.kind == "int4" else 8
        q = unpack_words(v["qweight"].T.contiguous(), bits)[:, : shape[1]]
        zero = q
        if spec.zeros:
            ones = sum(d.zero_offset << place for place in range(0, 32, bits))
            words = (v["qzeros"].long() + ones) & 0xFFFFFFFF
            words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
            zero = unpack_words(words, bits)[:, : shape[0]]
        group = v["g_idx"].to(torch.int32) if spec.indexed else None
        return Codes(_integers(q, bits), *self.rest(v, spec, zero), group)


def check_index(t: Tensors, v: Values, spec: Spec, shape: tuple[int, int]) -> None:
    """Check the table of columns' groups, where there is one. Raises InputError."""
    for name in ("g_idx", "weight_g_idx"):
        if name in v:
            ordered = None if spec.indexed else spec.block(shape)[1]
            check_groups(t[name], v[name], spec.grid(shape)[1], ordered)
