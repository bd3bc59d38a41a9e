"""What is compared: an arm is one setting of the switches, measured in a process of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from r1.backend import Backend


@dataclass(frozen=True)
class Arm:
    """A name and the switches that it turns on, over those that all arms have in common."""

    name: str
    backend: Backend


@dataclass(frozen=True)
class Workload:
    """What every arm is asked to do. Sizes are in tokens."""

    model: str | None
    """A checkpoint's folder, or None: random weights of `shape`."""
    shape: str | None
    layers: int | None
    batch: int
    prompt: int
    new: int
    depth: int
    """Tokens that stand in each row's cache before the prompt comes."""
    seed: int

    def describe(self) -> str:
        what = self.model or f"{self.shape}{f', {self.layers} layers' if self.layers else ''}, random weights"
        deep = f", {self.depth} tokens in the cache" if self.depth else ""
        return f"{what}: batch {self.batch}, prompt {self.prompt}, new {self.new}{deep}"


def from_switches(given: dict[str, Any]) -> list[Arm]:
    """Baseline (all off), each given switch alone, and, if there are several, all together.

    `device` and `dtype` say where and in what all arms run; they are no optimization of an arm. amp works on fp32 weights,
    so where it is asked for, and dtype is not, every arm stores fp32.
    """
    common = {name: given[name] for name in ("device", "dtype") if name in given}
    if given.get("amp", "off") != "off":
        common.setdefault("dtype", "fp32")
    base = Backend(**common)
    switches = {name: value for name, value in given.items() if getattr(base, name) != value}
    arms = [Arm("baseline", base)]
    arms += [Arm(label(name, value), dataclasses.replace(base, **{name: value})) for name, value in switches.items()]
    if len(switches) > 1:
        arms.append(Arm(" + ".join(label(*item) for item in switches.items()), dataclasses.replace(base, **switches)))
    return arms


def label(name: str, value: Any) -> str:
    """A switch as a row names it."""
    return name if value is True else f"{name}={value}"
