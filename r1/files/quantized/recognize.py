"""Which tensors of a checkpoint are quantized matrices, and in which format: one table.

What counts are the tensors' endings and dtypes, module by module. Lists of layers to be left alone
(`ignore`, `modules_to_not_convert`) are not read: each writer has its own rules for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field

from r1.errors import InputError
from r1.files.quantized.declared import PLAIN, Declared
from r1.files.quantized.eight_bits import EightBits, is_eight_bits
from r1.files.quantized.four_bit_floats import Mxfp4, Nvfp4
from r1.files.quantized.published import Found, Published, Tensors
from r1.files.quantized.words import Awq, CompressedWords, Gptq
from r1.files.shards import Entry
from r1.storage.spec import Spec

ENDINGS = frozenset(
    """
    weight_scale weight_scale_inv weight_scale_2 weight_global_scale weight_packed weight_shape
    weight_zero_point weight_g_idx qweight qzeros scales g_idx
    """.split()  # noqa: SIM905
)
"""What quantizers put beside or instead of a module's `weight`."""
UNUSED = (
    "input_scale", "input_global_scale", "input_zero_point", "k_scale", "v_scale",
    "activation_scale",
)  # fmt: skip
"""Scales of activations and of the cache. r1 does not quantize those."""
BITSANDBYTES = (".weight.absmax", ".weight.quant_map")


def _dtype(t: Tensors, ending: str) -> str:
    return t[ending].dtype if ending in t else ""


def _has(t: Tensors, *endings: str) -> bool:
    return all(ending in t for ending in endings)


def _awq(t: Tensors) -> bool:
    """AWQ's words lie along out, so they are eighths of the scales' columns."""
    words, scales = t["qweight"].shape, t["scales"].shape
    return len(words) == len(scales) == 2 and words[1] * 8 == scales[1]


FORMATS: tuple[tuple[Callable[[Tensors], bool], Published], ...] = (
    (lambda t: is_eight_bits(t) and "weight_scale" in t, EightBits("weight_scale")),
    (lambda t: is_eight_bits(t), EightBits("weight_scale_inv")),
    (lambda t: _dtype(t, "weight_packed") == "I32", CompressedWords()),
    (
        lambda t: _dtype(t, "weight_packed") == "U8" and _dtype(t, "weight_scale") == "U8",
        Mxfp4("MXFP4 by compressed-tensors", "weight_packed"),
    ),
    (
        lambda t: _dtype(t, "weight_packed") == "U8",
        Nvfp4("NVFP4 by compressed-tensors", "weight_packed", "weight_global_scale", True),
    ),
    (
        lambda t: _dtype(t, "weight") == "U8" and "weight_scale_2" in t,
        Nvfp4("NVFP4 by ModelOpt", "weight", "weight_scale_2", False),
    ),
    (
        lambda t: _dtype(t, "weight") == "U8" and _dtype(t, "weight_scale") == "U8",
        Mxfp4("MXFP4 by Quark", "weight"),
    ),
    (lambda t: _has(t, "qweight", "scales") and _awq(t), Awq()),
    (lambda t: "qweight" in t, Gptq()),
)
"""The first whose test holds is a module's format."""


@dataclass
class Recognized:
    """A checkpoint's tensors, sorted."""

    found: dict[str, Found] = field(default_factory=dict)
    """The quantized matrices. The key is `MODULE.weight`, whatever their tensors are called."""
    plain: dict[str, Entry] = field(default_factory=dict)
    """All other tensors."""
    unused: list[str] = field(default_factory=list)
    """Scales of activations."""
    biases: list[Entry] = field(default_factory=list)
    """Biases that old GPTQ writers give each module. Those that a model lacks must be zeros."""

    def keys(self) -> list[str]:
        """The weights' keys, in the files' order."""
        return [*self.found, *self.plain]

    def keep_biases(self, wanted: Container[str]) -> None:
        """Sort the biases that a model has, as Qwen2's q_proj, among the plain tensors."""
        self.plain |= {entry.key: entry for entry in self.biases if entry.key in wanted}
        self.biases = [entry for entry in self.biases if entry.key not in wanted]

    def main(self, key: str) -> Entry:
        """The tensor that holds a weight's numbers."""
        return self.found[key].main if key in self.found else self.plain[key]

    def remove(self, key: str) -> list[str]:
        """Forget a weight. Returns the name of the tensor with its numbers, in a list."""
        found = self.found.pop(key, None)
        return [found.main.key if found else self.plain.pop(key).key]


def recognize(entries: Mapping[str, Entry], declared: Declared | None) -> Recognized:
    """Sort a checkpoint's tensors. Raises InputError for formats that r1 does not read."""
    d, out = declared or Declared(), Recognized()
    modules: dict[str, dict[str, Entry]] = {}
    for key, entry in entries.items():
        if key.endswith(BITSANDBYTES):
            raise InputError(
                f"{entry.path}: {key} is of bitsandbytes, whose formats r1 does not read: load the "
                f"model in transformers, call dequantize() and save it, or {PLAIN}"
            )
        module, _, ending = key.rpartition(".")
        if ending in UNUSED:
            out.unused.append(key)
        elif ending in ENDINGS or ending in ("weight", "bias"):
            modules.setdefault(module, {})[ending] = entry
        else:
            out.plain[key] = entry
    for module, t in modules.items():
        found = _found(module, t, d)
        if found is None:
            out.plain |= {f"{module}.{ending}": entry for ending, entry in t.items()}
            continue
        if "qweight" in t and "bias" in t:
            out.biases.append(t.pop("bias"))
        belong = (found.format.main, found.format.scale, *found.format.more)
        for ending in [ending for ending in t if ending not in belong]:
            out.plain[f"{module}.{ending}"] = t.pop(ending)
        out.found[f"{module}.weight"] = found
    return out


def _found(module: str, t: dict[str, Entry], d: Declared) -> Found | None:
    """A module's quantized matrix; None if it has none. Raises InputError."""
    published = next((each for test, each in FORMATS if test(t)), None)
    if published is None:
        return None
    main = t[published.main]
    what = f"{main.path}: {main.key} is {published.told(t)}"
    if len(main.shape) != 2:
        raise InputError(f"{what}, but only matrices come in blocks, and its shape is {main.shape}")
    if module.endswith(("embed_tokens", "lm_head")):
        raise InputError(
            f"{what}, and r1 reads embeddings and output heads only where they are not quantized: "
            f"{PLAIN}"
        )
    spec = published.spec(t, d) if published.scale in t else None  # Found.check tells what lacks
    return Found(module, published, t, spec, d)


def stack_name(module: str) -> str:
    """A module's name without an expert's number: the name of a stack in memory."""
    return re.sub(r"(\.experts)\.\d+\.", r"\1.", module)


def stored(found: Iterable[Found]) -> tuple[tuple[Spec, frozenset[str]], ...]:
    """The formats that memory can keep, each with the names of its matrices.

    Raises InputError for formats of several kinds, and for experts of one layer in different ones.
    """
    by_name: dict[str, Found] = {}
    for each in found:
        if each.format.scale not in each.tensors:
            continue  # loading it is an error
        name = stack_name(each.name)
        first = by_name.setdefault(name, each)
        if first.spec != each.spec:
            raise InputError(
                f"{each.what} with {_told(each)}, and {first.main.key} is with {_told(first)}: r1 "
                f"keeps the experts of a layer alike: {PLAIN}"
            )
    kept = {name: each for name, each in by_name.items() if each.spec is not None}
    kinds = {each.spec.kind: each for each in kept.values() if each.spec is not None}
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise InputError(
            f"{one.what}, with {_told(one)}, and {other.main.key} is with {_told(other)} (mixed "
            f"bits): r1 reads one kind a checkpoint: {PLAIN}"
        )
    specs = sorted({each.spec for each in kept.values() if each.spec}, key=repr)
    return tuple((s, frozenset(n for n, e in kept.items() if e.spec == s)) for s in specs)


def _told(found: Found) -> str:
    return found.spec.describe() if found.spec else "no scale that r1 keeps"
