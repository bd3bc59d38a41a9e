"""Published quantized formats: bit-equal to the libraries that define them, told apart, refused.

The files tests/reference/quantized-* hold matrices that those libraries packed, and what they make
of them (tools/check/make_quantized_reference.py). Holds r1/files/quantized to account.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors import safe_open
from torch import Tensor

from r1.files.quantized.methods import parse
from r1.files.quantized.published import Found
from r1.files.quantized.recognize import recognize
from r1.files.quantized.words import check_index
from r1.files.shards import Entry
from r1.storage.kinds import KINDS

REFERENCE = Path(__file__).parent / "reference"
PREFIX = "quantized-"
CASES = sorted(p.stem.removeprefix(PREFIX) for p in REFERENCE.glob(f"{PREFIX}*.safetensors"))


@cache
def case(name: str) -> tuple[Found, dict[str, Tensor], Tensor]:
    """What is recognized in a file, the tensors by their endings, and the library's result."""
    path = REFERENCE / f"{PREFIX}{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        entries = {
            key: Entry(path, key, tuple(s.get_shape()), s.get_dtype())
            for key, s in slices.items()
            if key != "reference"
        }
        tensors = {key.removeprefix("m."): file.get_tensor(key) for key in slices}
    sorted_ = recognize(entries, parse(config, "quantization_config"))
    assert not sorted_.plain
    reference = tensors.pop("reference")
    return sorted_.found["m.weight"], tensors, reference


def values(found: Found, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {ending: tensors[ending] for ending in found.tensors}


@pytest.mark.parametrize("name", CASES)
def test_bit_equal(name: str) -> None:
    """Dequantized while loading, and kept packed: both round once to the library's dtype."""
    found, tensors, reference = case(name)
    shape = found.shape(tuple(reference.shape))
    assert shape == tuple(reference.shape)
    found.check(shape)
    read = values(found, tensors)
    found.check_values(read, shape)
    dense = found.format.dense(read, found.spec, shape, found.declared)
    assert dense.dtype == torch.float32
    assert torch.equal(dense.to(reference.dtype), reference)
    if found.spec is None:
        return
    check_index(found.tensors, read, found.spec, shape)
    packed = found.format.packed(read, found.spec, shape, found.declared)
    kind = KINDS[found.spec.kind]
    empty = kind.empty(found.spec, shape, reference.dtype).stored()
    assert {n: (t.shape, t.dtype) for n, t in packed.items()} == {
        n: (t.shape, t.dtype) for n, t in empty.items()
    }
    matrix = kind(found.spec, shape, reference.dtype, packed)
    assert torch.equal(matrix.dense(), reference)


def _groups(*sizes: int | None) -> dict[str, Any]:
    """A description by compressed-tensors, with groups of these columns (None: a whole row)."""
    each = [
        {"num_bits": 4, "type": "int", "strategy": "group" if n else "channel", "group_size": n}
        for n in sizes
    ]
    named = {f"group_{k}": {"targets": [f"re:x{k}$"], "weights": w} for k, w in enumerate(each)}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": named,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "columns", "across", "right"),
    [
        ((32, 24), 72, 3, 24), ((32, 24), 160, 5, 32), ((32, 24), 96, 4, 24), ((32, 24), 96, 3, 32),
        ((8, None), 20, 1, 20), ((8, None), 24, 3, 8), ((128, 64), 64, 1, 64), ((64,), 96, 2, 64),
        ((128, 64), 96, 9, 128),
    ],
)  # fmt: skip
def test_groups_of_several_sizes(
    sizes: tuple[int | None, ...], columns: int, across: int, right: int
) -> None:
    """A matrix's scales tell which it is. (The last one fits none: the check of shapes says so.)"""
    assert parse(_groups(*sizes), "config.json").columns("m", columns, across) == right


def test_groups_that_cant_be_told_apart() -> None:
    with refused("groups of 36 and 40 columns, and m may be of either"):
        parse(_groups(40, 36), "config.json").columns("m", 100, 3)
    mixed = _groups(32, 24)
    mixed["config_groups"]["group_1"]["weights"]["num_bits"] = 8
    with refused("mixed bits"):
        parse(mixed, "config.json")


def test_every_format_has_a_case() -> None:
    assert len(CASES) >= 27
