"""A recording of a model's routing: how often each expert of each layer was chosen.

A small JSON file, which tools/measure/record_routing.py writes:

    {"model": "tiny-r1", "tokens": 4096, "chosen": 4, "counts": {"1": [210, 1034, ...], ...}}

`counts` has each sparse layer of the model, by its number, and a number for each of its experts.
`expert_policy=pinned` keeps the experts on the device that were chosen most often. bench.py
`--routing FILE` draws experts as often as they were chosen.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1.errors import InputError
from r1.model.config import Config
from r1.reading import read_object
from r1.writing import new_file

ADVICE = "record it with tools/measure/record_routing.py"


@dataclass(frozen=True)
class Profile:
    """The recording of one model's routing."""

    tokens: int
    chosen: int
    """Experts of each token, in each layer."""
    counts: dict[int, list[float]]
    """By layer: how many tokens chose each expert."""
    model: str = ""

    def write(self, path: Path) -> None:
        """Raises InputError where it can't be written."""
        fields = {"model": self.model, "tokens": self.tokens, "chosen": self.chosen}
        try:
            with new_file(path) as partial:
                text = json.dumps(fields | {"counts": self.counts}) + "\n"
                partial.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} can't be written ({error.strerror})") from None

    def shares(self, layer: int) -> list[float]:
        """Of each expert: the share of tokens that chose it. Their sum is `chosen`."""
        counts = self.counts[layer]
        return [min(1.0, self.chosen * count / sum(counts)) for count in counts]

    def found(self, slots: int) -> float:
        """The share of a token's choices that lie on the device, if each layer's slots hold what
        was chosen most often.
        """
        best = [sorted(self.shares(layer))[-slots:] if slots else [] for layer in self.counts]
        return sum(map(sum, best)) / max(1, len(best)) / self.chosen


def load(path: str | Path, config: Config) -> Profile:
    """The recording in a file. Raises InputError if it is none, or none of such a model."""
    fields = read_object(path, ADVICE)
    shape = config.experts
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    counts = fields.get("counts")
    if not isinstance(counts, dict):
        raise _wrong(path, 'it has no object "counts"')
    for layer in layers:
        if str(layer) not in counts:
            there = f"{min(layers)} to {max(layers)}"
            raise _wrong(path, f"layer {layer} is missing, and this model needs layers {there}")
        _check_counts(path, layer, counts[str(layer)], shape.n_routed_experts)
    if fields.get("chosen") != shape.num_experts_per_tok:
        tells = f'"chosen" is {fields.get("chosen")!r}'
        raise _wrong(path, f"{tells}, and this model's tokens choose {shape.num_experts_per_tok}")
    tokens = fields.get("tokens")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise _wrong(path, f'"tokens" is {tokens!r}, not a whole number above 0')
    kept = {layer: [float(each) for each in counts[str(layer)]] for layer in layers}
    return Profile(tokens, shape.num_experts_per_tok, kept, str(fields.get("model", ""))[:100])


def _check_counts(path: str | Path, layer: int, counts: Any, experts: int) -> None:
    if not isinstance(counts, list) or len(counts) != experts:
        has = len(counts) if isinstance(counts, list) else "no list of"
        raise _wrong(path, f"layer {layer} has {has} counts, and this model has {experts} experts")
    for number, count in enumerate(counts):
        plain = isinstance(count, (int, float)) and not isinstance(count, bool)
        if not plain or not math.isfinite(count) or not 0 <= count < 1e15:
            raise _wrong(path, f"expert {number} of layer {layer} has the count {count!r}")
    if not sum(counts):
        raise _wrong(path, f"no expert of layer {layer} was chosen")


def _wrong(path: str | Path, what: str) -> InputError:
    return InputError(f"{path} is no recording of this model's routing: {what}; {ADVICE}")
