"""How compressed-tensors describes a quantization: groups of layers, each with its arguments.

r1 reads checkpoints whose groups all quantize weights alike, but for the number of columns that
share a scale. What the groups say of activations and of the cache is ignored: r1 multiplies by
weights only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from r1.files.quantized.declared import PLAIN, Declared, Reader

FORMATS = (
    "pack-quantized", "float-quantized", "int-quantized", "naive-quantized",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized",
)  # fmt: skip
BITS = {"int": (4, 8), "float": (4, 8)}


def compressed_tensors(r: Reader) -> Declared:
    """`quantization_config` of llm-compressor, ISTA, Kimi-K2-Thinking. Raises InputError."""
    if r.raw.get("format") == "mixed-precision":
        raise r.fail(f"has format = mixed-precision, and r1 reads one format a checkpoint: {PLAIN}")
    r.only("format", *FORMATS)
    _check_rotations(r)
    sparsity = r.raw.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise r.fail(f"has a sparsity_config, and r1 reads only dense weights: {PLAIN}")
    groups = r.raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise r.fail("has no config_groups, which say how weights are quantized: download it again")
    every = [_weights(r, name, group) for name, group in groups.items()]
    sizes = tuple(dict.fromkeys(each.group for each in every if each.group is not None))
    every = [replace(each, groups=sizes if len(sizes) > 1 else ()) for each in every]
    if any(replace(each, group=every[0].group) != every[0] for each in every):
        raise r.fail(
            "has config_groups that quantize weights in different ways (mixed bits), and r1 reads "
            f"one way a checkpoint: {PLAIN}"
        )
    return every[0]


def _check_rotations(r: Reader) -> None:
    transforms = r.raw.get("transform_config") or {}
    inner = transforms.get("config_groups") if isinstance(transforms, dict) else transforms
    if inner or (isinstance(transforms, dict) and set(transforms) - {"config_groups"}):
        raise r.fail(f"has a transform_config (rotations), which r1 does not apply: {PLAIN}")


def _weights(r: Reader, name: str, group: Any) -> Declared:
    """One group's arguments for weights."""
    where = f"{r.where}.config_groups.{name}.weights"
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise r.fail(f"has no config_groups.{name}.weights, so its weights' format is unknown")
    if group.get("format") not in (None, r.raw.get("format")):
        raise r.fail(f"has a format of its own for {name}, and r1 reads one a checkpoint: {PLAIN}")
    w = Reader(weights, where)
    bits = w.only("num_bits", *BITS[w.only("type", "int", "float")])
    strategy = w.only("strategy", "tensor", "channel", "group", "block", "tensor_group")
    size = w.whole("group_size", 1) if "group" in strategy else 0
    block = None
    if strategy == "block":
        given = weights.get("block_structure")
        if isinstance(given, str):  # "128x128", as older releases wrote it
            sides = given.split("x")
            given = [int(side) for side in sides if side.isdecimal()]
        block = Reader({"block_structure": given}, where).pair("block_structure")
    return Declared(r.where, "compressed-tensors", bits, size, block, w.flag("symmetric", True))
