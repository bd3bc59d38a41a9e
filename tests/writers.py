"""Writes a model's projections in published quantized formats, as their programs would."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from folders import rewrite
from torch import Tensor

from r1.files.names import is_projection
from r1.files.quantized.words import AWQ_ORDER
from r1.storage.codes import Codes, round_to_nearest
from r1.storage.kinds import KINDS
from r1.storage.packing import pack_words
from r1.storage.spec import Spec

Written = dict[str, Tensor]


def _pad(t: Tensor, to: int, dim: int) -> Tensor:
    missing = -t.shape[dim] % to
    zeros = t.new_zeros([missing if d == dim else n for d, n in enumerate(t.shape)])
    return torch.cat((t, zeros), dim=dim)


def codes(w: Tensor, spec: Spec) -> Codes:
    if spec.kind == "fp8":
        packed = KINDS["fp8"].quantize(w, spec)
        return Codes(packed["weight"], packed["weight_scale_inv"])
    return round_to_nearest(w, spec)


def compressed(w: Tensor, spec: Spec) -> Written:
    c = codes(w, spec)
    out = {"weight_packed": pack_words(_pad(c.q, 8, 1), 4), "weight_scale": c.scale}
    out["weight_shape"] = torch.tensor(w.shape)
    if c.zero is not None:
        out["weight_zero_point"] = pack_words(_pad(c.zero, 8, 0).T.contiguous(), 4).T.contiguous()
    return out


def awq(w: Tensor, spec: Spec) -> Written:
    c = codes(w, spec)
    assert c.zero is not None
    return {
        "qweight": pack_words(c.q.T.contiguous(), 4, AWQ_ORDER),
        "qzeros": pack_words(c.zero.T.contiguous(), 4, AWQ_ORDER),
        "scales": c.scale.T.contiguous(),
    }


def gptq(w: Tensor, spec: Spec) -> Written:
    """v1, symmetric, with the bias of zeros that old writers add."""
    c = codes(w, spec)
    group = torch.arange(w.shape[1], dtype=torch.int32) // (spec.columns or w.shape[1])
    return {
        "qweight": pack_words(c.q, 4).T.contiguous(),
        "qzeros": torch.full((c.scale.shape[1], w.shape[0] // 8), 0x77777777, dtype=torch.int32),
        "scales": c.scale.T.contiguous(), "g_idx": group, "bias": torch.zeros(w.shape[0]),
    }  # fmt: skip


def eight_bits(scale: str) -> Callable[[Tensor, Spec], Written]:
    def write(w: Tensor, spec: Spec) -> Written:
        c = codes(w, spec)
        return {"weight": c.q, scale: c.scale, "input_scale": torch.tensor(1.0)}

    return write


def _groups(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", **weights}}
    return {"config_groups": {"group_0": group}}


def ct(form: str, **weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": form, **_groups(**weights)}


FORMATS: dict[str, tuple[Spec, Callable[[Tensor, Spec], Written], dict[str, Any]]] = {
    "compressed-tensors int4": (
        Spec("int4", 1, 8, scale="bf16"), compressed,
        ct("pack-quantized", strategy="group", group_size=8, symmetric=True),
    ),
    "compressed-tensors int4 zeros": (
        Spec("int4", 1, 0, scale="bf16", zeros=True), compressed,
        ct("pack-quantized", strategy="channel", symmetric=False),
    ),
    "awq": (
        Spec("int4", 1, 8, scale="fp16", zeros=True), awq,
        {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True},
    ),
    "gptq": (
        Spec("int4", 1, 8, scale="fp16"), gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True, "desc_act": False},
    ),
    "fp8 channel": (
        Spec("fp8", 1, 0), eight_bits("weight_scale"),
        ct("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "fp8 matrix": (
        Spec("fp8", 0, 0), eight_bits("weight_scale"),
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "fp8 block": (
        Spec("fp8", 16, 16), eight_bits("weight_scale"),
        ct("float-quantized", num_bits=8, type="float", strategy="block", block_structure="16x16"),
    ),
    "int8 channel": (
        Spec("int8", 1, 0), eight_bits("weight_scale"),
        ct("int-quantized", num_bits=8, strategy="channel"),
    ),
    "int8 block": (
        Spec("int8", 16, 16), eight_bits("weight_scale_inv"),
        {"quant_method": "blockwise_int8", "weight_block_size": [16, 16]},
    ),
}  # fmt: skip
"""By name: how the numbers are rounded, who packs them, and the quantization_config."""


def matters(key: str, only: str = "") -> bool:
    """Whether a checkpoint's tensor is quantized; `only` is a pattern of names."""
    return is_projection(key) and bool(re.search(only, key))


def write(folder: Path, name: str, only: str = "", where: str = "quantization_config") -> None:
    """Quantize a folder's projections in place."""
    spec, pack, config = FORMATS[name]

    def change(found: dict[str, Tensor]) -> None:
        for key in [key for key in found if matters(key, only)]:
            module = key.removesuffix(".weight")
            found |= {f"{module}.{e}": t for e, t in pack(found.pop(key).float(), spec).items()}

    rewrite(folder, change)
    set_config(folder, **{where: config})


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
