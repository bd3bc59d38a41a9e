"""The descriptions of a quantization, one function for each program that writes them.

A description is in config.json, or in ModelOpt's file beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r1.errors import InputError
from r1.files.folder import check_file
from r1.files.quantized.compressed import compressed_tensors
from r1.files.quantized.declared import PLAIN, Declared, Reader
from r1.reading import read_json, read_object

MODELOPT = "hf_quant_config.json"
"""NVIDIA's ModelOpt describes its quantization here, and often not in config.json."""


def find(raw: Mapping[str, Any], where: str) -> tuple[str, Any]:
    """config.json's description of a quantization and the place where it is; None: there is none.

    Wrappers have it in `text_config`, older compressed-tensors in `compression_config`.
    """
    inner = raw.get("text_config")
    for holder, prefix in ((raw, ""), (inner if isinstance(inner, dict) else {}, "text_config.")):
        for name in ("quantization_config", "compression_config"):
            if holder.get(name) is not None:
                return f"{where}: {prefix}{name}", holder[name]
    return where, None


def declared_in(directory: Path) -> Declared | None:
    """What a checkpoint's folder says of a quantization; None: nothing. Raises InputError."""
    path = directory / "config.json"
    where, description = find(read_object(path) if check_file(path) else {}, str(path))
    if description is not None:
        return parse(description, where)
    path = directory / MODELOPT
    if not check_file(path):
        return None
    try:
        description = read_json(path)["quantization"]
        if not isinstance(description["quant_algo"], str):
            raise TypeError("quant_algo is no word")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} can't be read ({type(error).__name__}: {error}): download it again"
        ) from None
    return parse({"quant_method": "modelopt", **description}, f"{path}: quantization")


def parse(description: Any, where: str) -> Declared:
    """Read one description. Raises InputError that names what r1 does not read."""
    if not isinstance(description, dict):
        raise InputError(f"{where} is {description!r}, which is no JSON object")
    reader = Reader(description, where)
    method = description.get("quant_method")
    if method is None and "config_groups" in description:
        method = "compressed-tensors"
    if not isinstance(method, str) or method not in METHODS:
        advice = FOREIGN.get(method, PLAIN) if isinstance(method, str) else PLAIN
        raise reader.fail(
            f"has quant_method = {method!r}, but r1 reads only {', '.join(METHODS)}: {advice}"
        )
    return METHODS[method](reader)


def _fp8(r: Reader) -> Declared:
    """R1's blocks (weight_block_size), and AutoFP8's single scales (activation_scheme static)."""
    if r.raw.get("fmt", "e4m3") != "e4m3":
        raise r.fail(f"has fmt = {r.raw['fmt']!r}, but r1 reads only e4m3")
    static = r.raw.get("weight_block_size") is None and "activation_scheme" in r.raw
    return Declared(r.where, "fp8", 8, block=None if static else r.pair("weight_block_size"))


def _int8(r: Reader) -> Declared:
    return Declared(r.where, "blockwise_int8", 8, block=r.pair("weight_block_size"))


def _awq(r: Reader) -> Declared:
    r.only("version", "gemm", "GEMM")
    r.only("bits", 4)
    zeros = r.flag("zero_point", True)
    return Declared(r.where, "awq", 4, r.group(), symmetric=not zeros)


def _gptq(r: Reader) -> Declared:
    """GPTQModel and AutoGPTQ. v1, also where nothing is said, stores zero points minus one."""
    version = r.only("checkpoint_format", "gptq", "gptq_v2")
    r.none_of("dynamic", "which gives layers bits of their own (mixed bits)")
    bits = r.only("bits", *((4, 8) if r.raw.get("bits") else (None,)))
    if bits is None:
        raise r.fail("has no bits, so r1 can't tell how wide the numbers are")
    return Declared(
        r.where, "gptq", bits, r.group(), symmetric=r.flag("sym", False),
        zero_offset=int(version == "gptq"), ordered=not r.flag("desc_act", True),
    )  # fmt: skip


def _auto_round(r: Reader) -> Declared:
    """The GPTQ or the AWQ layout; the packing's name tells how zero points are stored."""
    packing = r.only(
        "packing_format", "auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel",
        "auto_round:auto_awq", "auto_round:gptq", "auto_round:awq",
    )  # fmt: skip
    r.none_of("extra_config", "which gives layers bits of their own (mixed bits)")
    r.none_of("dynamic", "which gives layers bits of their own (mixed bits)")
    bits = r.only("bits", 4, 8)
    return Declared(
        r.where, "auto-round", bits, r.group(), symmetric=r.flag("sym", True),
        zero_offset=int(packing in ("auto_round:auto_gptq", "auto_round:gptq")),
    )  # fmt: skip


def _quark(r: Reader) -> Declared:
    """AMD's: MXFP4, the same for all layers."""
    r.none_of("layer_quant_config", "which gives layers formats of their own")
    r.none_of("layer_type_quant_config", "which gives layers formats of their own")
    return Declared(r.where, "quark", 4, 32)


def _modelopt(r: Reader) -> Declared:
    """NVIDIA's: NVFP4, or FP8 with one scale for a matrix."""
    fp4 = r.only("quant_algo", "NVFP4", "FP8") == "NVFP4"
    return Declared(r.where, "modelopt", 4 if fp4 else 8, 16 if fp4 else None, unlisted=True)


METHODS: dict[str, Callable[[Reader], Declared]] = {
    "fp8": _fp8,
    "blockwise_int8": _int8,
    "compressed-tensors": compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "quark": _quark,
    "modelopt": _modelopt,
}
"""By `quant_method`."""
FOREIGN = {
    "bitsandbytes": "load it in transformers, call dequantize() and save it again, or " + PLAIN,
    "w4afp8": "get a 4-bit checkpoint by compressed-tensors or AWQ, or " + PLAIN,
    "intel/auto-round": "set quant_method to auto-round if its packing is auto-round's",
}
"""What to do about methods that r1 does not read."""
