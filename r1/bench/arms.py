"""Arms: an arm is one setting of the switches, measured in its own process."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r1.model.config import Config
from r1.switches.backend import SHARING, Backend

Settings = dict[str, Any]
KINDS = ("alone", "together", "ladder", "all-but-one", "pairs")
"""The kinds of arms besides the baseline."""
USUAL = ("alone", "together")
"""Default kinds when switches are given without --only."""
PLACES = ("experts", "expert_slots", "expert_cache_gb")
"""Switches that say where experts lie."""
KEEPING = ("expert_policy", "expert_profile")
"""Switches that say it too, where some experts are resident."""
FETCHING = {"expert_policy", "expert_profile", "guess_experts"}
"""Switches that say how experts in host memory are fetched."""
FILES = ("expert_profile",)
"""Switches that name a file."""
IDLE_WITHOUT = {"kernels": "tune", "quant": "quant_activations"}
"""Switches, and those that do nothing without them: there is nothing to tune, and no matrix of FP8
that could have inputs of FP8."""
ALL_BUT = "all-but-"
"""With a switch's name after it: only the "all-but-one" arm that leaves out this switch."""

TEXTBOOK: Settings = {
    "attention": "naive",
    "prefill_attention": "naive",
    "moe": "loop",
    "prefill_moe": "loop",
    "join": "off",
    "quant": "none",
}
"""The model as a textbook has it: full keys and values, one expert after the other."""


@dataclass(frozen=True)
class Arm:
    """A name, a kind, and the switches."""

    name: str
    kind: str
    """"baseline", or one of KINDS. Pairs are not timed: only their parity is checked."""
    backend: Backend
    without: Settings = dataclasses.field(default_factory=dict)
    """The switches that an "all-but-one" arm leaves out."""

    @property
    def timed(self) -> bool:
        """Whether the arm's speed is measured."""
        return self.kind != "pairs"

    def is_of(self, kinds: Sequence[str]) -> bool:
        """Whether `kinds` selects this arm. The baseline is always selected.

        A kind ALL_BUT + switch selects the arm that leaves out this switch.
        """
        return self.kind in ("baseline", *kinds) or any(
            f"{ALL_BUT}{name}" in kinds for name in self.without
        )


def textbook(config: Config) -> Settings:
    """TEXTBOOK, of this model: one without experts has no way to compute them."""
    sparse = config.experts.n_routed_experts > 0
    return {name: value for name, value in TEXTBOOK.items() if sparse or "moe" not in name}


def places(given: Settings) -> Settings:
    """The settings that say where experts lie, of those given."""
    names = PLACES + (KEEPING if given.get("expert_policy") == "resident" else ())
    return {name: given[name] for name in names if name in given}


def common_settings(given: Settings) -> Settings:
    """The device and the dtype of all arms, which are no optimizations.

    amp casts fp32 weights, so amp implies dtype=fp32. Weights are not quantized, or dequantized
    while loading, so that each arm shows one effect. quant=auto, given, keeps the checkpoint's
    format in all arms: then models run whose plain weights would not fit.
    """
    common: Settings = {name: given[name] for name in ("device", "dtype") if name in given}
    common["quant"] = "auto" if given.get("quant") == "auto" else "none"
    if given.get("amp", "off") != "off":
        common.setdefault("dtype", "fp32")
    return common


def from_switches(
    given: Settings, kinds: Sequence[str] = USUAL, shared: Settings | None = None
) -> list[Arm]:
    """Baseline (all off), and the arms of `kinds`.

    These are each given switch alone and, for several switches, all together and all but one. All
    arms have the settings `shared`, which spread a model that no single device could hold.
    """
    base = Backend(**common_settings(given), **(shared or {}))
    switches = {name: value for name, value in given.items() if getattr(base, name) != value}
    alone = _alone(switches)
    arms = [Arm("baseline", "baseline", base)]
    arms += [
        Arm(label(settings), "alone", dataclasses.replace(base, **settings)) for settings in alone
    ]
    if len(alone) > 1 and switches not in alone:
        arms.append(Arm(label(switches), "together", dataclasses.replace(base, **switches)))
        arms += _all_but_one(base, alone)
    return [each for each in arms if each.is_of(kinds)]


def itself(given: Settings) -> Arm:
    """The given switches together, without a baseline beside them."""
    common = common_settings(given)
    switches = {n: v for n, v in given.items() if n == "quant" or n not in common}
    return Arm(label(switches) or "all off", "together", Backend(**given))


def _alone(switches: Settings) -> list[Settings]:
    """Each switch, with the switches without which it does nothing."""
    alone: list[Settings] = [{name: value} for name, value in switches.items()]
    if "kernels" in switches:  # tune does nothing without kernels to tune
        alone = [{"kernels": switches["kernels"], **s} if "tune" in s else s for s in alone]
    if "quant" in switches:  # inputs of FP8 are for matrices of FP8
        quant: Settings = {"quant": switches["quant"]}
        alone = [quant | s if "quant_activations" in s else s for s in alone]
    if "speculate" in switches and "draft_tokens" in switches:  # one optimization, two switches
        alone = [s for s in alone if "speculate" not in s and "draft_tokens" not in s]
        alone.append({name: switches[name] for name in ("speculate", "draft_tokens")})
    if "experts" in switches:  # its other switches do nothing without it
        own = places(switches)
        others = [s for s in alone if not s.keys() & own.keys()]
        if "expert_profile" in switches.keys() - own.keys():  # with its policy one optimization
            pinned = {name: switches[name] for name in ("expert_policy", "expert_profile")}
            others = [pinned, *(s for s in others if not s.keys() & pinned.keys())]
        alone = [own, *({**own, **s} if s.keys() & FETCHING else s for s in others)]
    if "allreduce" in switches:  # it adds up what several devices made
        shared: Settings = {name: switches[name] for name in SHARING if name in switches}
        alone = [{**shared, **s} if "allreduce" in s else s for s in alone]
    return alone


def _all_but_one(base: Backend, alone: list[Settings]) -> list[Arm]:
    """For each switch: the arm that has all the others."""
    arms = []
    for left in alone:
        # Without kernels there is nothing to tune, so tune is left out too.
        idle = {other for name, other in IDLE_WITHOUT.items() if name in left}
        kept = [s for s in alone if s is not left and not s.keys() & idle]
        if "experts" in left and left == places(left):
            kept = [s for s in kept if "experts" not in s]
        for name in ("tune", "quant_activations", "allreduce"):
            left = {name: left[name]} if name in left else left
        settings = {name: value for s in kept for name, value in s.items()}
        if left.keys() & set(SHARING):
            settings = without_sharing(settings, left, base)
        if settings:
            backend = dataclasses.replace(base, **settings)
            arms.append(Arm(f"all but {label(left)}", "all-but-one", backend, left))
    return arms


def without_sharing(settings: Settings, left: Settings, base: Backend) -> Settings:
    """These settings without the sharing that is `left` out, nor an allreduce that is then idle."""
    kept = {name: value for name, value in settings.items() if name not in left}
    backend = dataclasses.replace(base, **{**kept, "allreduce": "auto"})
    if backend.tp * backend.ep == 1:
        kept.pop("allreduce", None)
    return kept


def label(settings: Settings) -> str:
    """Switches as a row names them."""
    shown = settings | {
        name: os.path.basename(settings[name]) for name in FILES if name in settings
    }  # no path: a result is published
    return " + ".join(name if value is True else f"{name}={value}" for name, value in shown.items())
