"""Write quantized matrices as other programs read them: their tensors, and what config.json says.

r1/files/quantized reads the same formats: words.py describes the bits.

Shapes: out and in are a matrix's rows and columns, G the groups of a row.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantizing.rounding import Grid
from r1.files.quantized.words import AWQ_ORDER
from r1.storage.codes import Codes
from r1.storage.packing import pack_words


class Format:
    """A published format."""

    scale: str
    """The dtype of its scales."""
    bits: tuple[int, ...]
    zeros: bool
    """Whether groups have zero points."""

    def why_not(self, rows: int, columns: int, grid: Grid) -> str | None:
        """Why a matrix can't be written, in a clause. None: it can."""
        raise NotImplementedError("a format must define why_not")

    def tensors(self, codes: Codes, grid: Grid) -> dict[str, Tensor]:
        """A matrix's tensors by the endings of their names."""
        raise NotImplementedError("a format must define tensors")

    def config(
        self, grid: Grid, widths: Mapping[int, Collection[str]], kept: Collection[str]
    ) -> dict[str, Any]:
        """config.json's `quantization_config`.

        `widths`: the quantized modules by the columns of their groups (0: a whole row). `kept`: the
        modules that are not quantized although they multiply.
        """
        raise NotImplementedError("a format must define config")


class PackQuantized(Format):
    """compressed-tensors' pack-quantized: numbers lie along the rows, as unsigned words.

    Without zero points: the format has them, but transformers 5 drops those of experts.
    """

    scale, bits, zeros = "bf16", (2, 3, 4, 8), False

    def why_not(self, rows: int, columns: int, grid: Grid) -> str | None:
        return None

    def tensors(self, codes: Codes, grid: Grid) -> dict[str, Tensor]:
        bits = _stored_bits(grid)
        q = codes.q if bits == 4 else codes.q.to(torch.int16) + 128  # from 0 on
        return {
            "weight_packed": pack_words(F.pad(q, (0, -q.shape[-1] % (32 // bits))), bits),
            "weight_scale": codes.scale,  # (out, G)
            "weight_shape": torch.tensor(q.shape),
        }

    def config(
        self, grid: Grid, widths: Mapping[int, Collection[str]], kept: Collection[str]
    ) -> dict[str, Any]:
        # transformers takes the first group that names experts for all routed ones.
        order = sorted(widths, key=lambda w: not any(".experts." in name for name in widths[w]))
        groups = {}
        for number, width in enumerate(order):
            weights = {
                "num_bits": _stored_bits(grid), "type": "int", "symmetric": True,
                "strategy": "group" if width else "channel", "group_size": width or None,
                "dynamic": False, "actorder": None, "observer": "minmax",
            }  # fmt: skip
            # One group takes all linear layers that are not in `ignore`; several have to name them.
            others = {m for w, names in widths.items() if w != width for m in names} | {*kept}
            targets = ["Linear"] if len(widths) == 1 else patterns(widths[width], others)
            groups[f"group_{number}"] = {
                "targets": targets, "weights": weights,
                "input_activations": None, "output_activations": None,
            }  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "quantization_status": "compressed", "kv_cache_scheme": None,
            "ignore": patterns(kept, {m for names in widths.values() for m in names}),
            "config_groups": groups,
        }  # fmt: skip


class AwqGemm(Format):
    """AutoAWQ's gemm: transposed, packed along the rows of the matrix, with zero points."""

    scale, bits, zeros = "fp16", (2, 3, 4), True

    def why_not(self, rows: int, columns: int, grid: Grid) -> str | None:
        if rows % 8:
            return f"its {rows} rows are no multiple of 8"
        if grid.group and columns % grid.group:
            return f"its {columns} columns are no multiple of {grid.group}"
        return None

    def tensors(self, codes: Codes, grid: Grid) -> dict[str, Tensor]:
        assert codes.zero is not None
        return {
            "qweight": pack_words(codes.q.T.contiguous(), 4, AWQ_ORDER),  # (in, out / 8)
            "qzeros": pack_words(codes.zero.T.contiguous(), 4, AWQ_ORDER),  # (G, out / 8)
            "scales": codes.scale.T.contiguous(),  # (G, out)
        }

    def config(
        self, grid: Grid, widths: Mapping[int, Collection[str]], kept: Collection[str]
    ) -> dict[str, Any]:
        return {
            "quant_method": "awq", "bits": 4, "group_size": grid.group or -1, "version": "gemm",
            "zero_point": True,
            # Parts of names. The router's would be a part of "mlp.gate_proj"; nobody quantizes it.
            "modules_to_not_convert": sorted(n for n in kept if not n.endswith("mlp.gate")),
        }  # fmt: skip


FORMATS: dict[str, Format] = {"compressed-tensors": PackQuantized(), "awq": AwqGemm()}


def patterns(modules: Collection[str], others: Collection[str]) -> list[str]:
    """Modules as compressed-tensors names them: one regular expression for all layers and experts.

    A name stands alone where its expression would match one of `others`.
    """
    by_pattern: dict[str, list[str]] = {}
    for name in modules:
        pattern = re.sub(r"\d+", r"\\d+", re.escape(name)) + "$"
        by_pattern.setdefault(pattern, []).append(name)
    taken = {re.sub(r"\d+", r"\\d+", re.escape(name)) + "$" for name in others}
    return sorted(
        each
        for pattern, names in by_pattern.items()
        for each in ([f"re:{pattern}"] if "\\d" in pattern and pattern not in taken else names)
    )


def _stored_bits(grid: Grid) -> int:
    """The bits that a number takes in the file: 2 and 3 are stored in 4."""
    return 8 if grid.bits == 8 else 4
