"""What is compared: an arm is one setting of the switches, measured in a process of its own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r1.files.config_json import load_config
from r1.model.config import Config
from r1.model.shapes import shape
from r1.switches.backend import Backend
from r1.switches.machine import Machine

Settings = dict[str, Any]
KINDS = ("alone", "together", "ladder", "all-but-one", "pairs")
"""What stands beside the baseline."""
USUAL = ("alone", "together")
"""Of these, where nobody says which, and the switches are given."""
ALL_BUT = "all-but-"
"""Before a switch's name: of the kind "all-but-one" the arm that leaves this one out."""

TEXTBOOK: Settings = {
    "attention": "naive",
    "prefill_attention": "naive",
    "moe": "loop",
    "prefill_moe": "loop",
}
"""The model as one would write it down: full keys and values, one expert after the other."""

SIZES = ("batch", "prompt", "new", "depth")
"""What tells the workloads of one command apart."""


@dataclass(frozen=True)
class Arm:
    """A name, what it is for, and its switches."""

    name: str
    kind: str
    """baseline, or one of KINDS; of pairs only parity is asked."""
    backend: Backend
    without: Settings = dataclasses.field(default_factory=dict)
    """What "all-but-one" leaves out."""

    @property
    def timed(self) -> bool:
        return self.kind != "pairs"

    def is_of(self, kinds: Sequence[str]) -> bool:
        """Whether it is of one of `kinds`, or leaves out the one switch that a kind names. The
        baseline always is."""
        return self.kind in ("baseline", *kinds) or any(
            f"{ALL_BUT}{name}" in kinds for name in self.without
        )


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
    routing: str = "model"
    """"uniform": experts drawn evenly, see routing.py."""
    assumed: float | None = None
    """Under speculation, accept drafts with this probability whatever the model says: random
    weights draft badly."""

    @property
    def name(self) -> str:
        """The checkpoint's folder, or the shape."""
        spread = ", routing uniform" if self.routing == "uniform" else ""
        return (
            self.model
            or f"{self.shape}{f', {self.layers} layers' if self.layers else ''}, random weights"
        ) + spread

    @property
    def sizes(self) -> dict[str, int]:
        """What SIZES names, by name."""
        return {name: getattr(self, name) for name in SIZES}

    @property
    def tokens(self) -> int:
        """What a row of the cache holds in the end."""
        return self.depth + self.prompt + self.new

    def describe(self) -> str:
        deep = f", {self.depth} tokens in the cache" if self.depth else ""
        assumed = (
            ""
            if self.assumed is None
            else f", drafts accepted by a coin that says yes with {self.assumed:g}"
        )
        return (
            f"{self.name}: batch {self.batch}, prompt {self.prompt}, new {self.new}{deep}{assumed}"
        )

    def config(self) -> Config:
        """The model's. A published shape without an MTP layer gets one where its drafts' acceptance
        is assumed anyway."""
        if self.model is not None:
            return load_config(self.model)
        config = shape(self.shape or "", self.layers)
        missing = self.assumed is not None and not config.num_nextn_predict_layers
        return config.change(num_nextn_predict_layers=1) if missing else config


def common_settings(given: Settings) -> Settings:
    """Where and in what all arms run: no optimization of an arm. amp works on fp32 weights, so
    asking for it asks for those."""
    common: Settings = {name: given[name] for name in ("device", "dtype") if name in given}
    if given.get("amp", "off") != "off":
        common.setdefault("dtype", "fp32")
    return common


def from_switches(given: Settings, kinds: Sequence[str] = USUAL) -> list[Arm]:
    """Baseline (all off), and of `kinds`: each given switch alone; if there are several, all
    together, and all but one."""
    base = Backend(**common_settings(given))
    switches = {name: value for name, value in given.items() if getattr(base, name) != value}
    alone: list[Settings] = [{name: value} for name, value in switches.items()]
    if "kernels" in switches:  # tune is of no use without what it tunes
        alone = [{"kernels": switches["kernels"], **s} if "tune" in s else s for s in alone]
    if (
        "speculate" in switches and "draft_tokens" in switches
    ):  # how it speculates is no switch of its own
        alone = [s for s in alone if "speculate" not in s and "draft_tokens" not in s]
        alone.append({name: switches[name] for name in ("speculate", "draft_tokens")})
    arms = [Arm("baseline", "baseline", base)]
    arms += [
        Arm(label(settings), "alone", dataclasses.replace(base, **settings)) for settings in alone
    ]
    if len(alone) > 1:
        arms.append(Arm(label(switches), "together", dataclasses.replace(base, **switches)))
        for left in alone:
            # What only serves the one that is left out goes with it.
            kept = [s for s in alone if s is not left and not ("kernels" in left and "tune" in s)]
            left = {"tune": True} if "tune" in left else left
            settings = {name: value for s in kept for name, value in s.items()}
            if settings:
                arms.append(
                    Arm(
                        f"all but {label(left)}",
                        "all-but-one",
                        dataclasses.replace(base, **settings),
                        left,
                    )
                )
    return [each for each in arms if each.is_of(kinds)]


def ladder_steps(given: Settings, machine: Machine, batch: int) -> list[Settings]:
    """The optimizations that this machine can run, in the order in which one would add them to the
    textbook's model."""
    gpu = machine.cuda and given.get("device") != "cpu"
    storage = common_settings(given).get("dtype", "auto")
    amp = storage == "fp32" or (storage == "auto" and not gpu)
    grouped = batch > 1 and (not gpu or _captures_grouped(given, machine))
    steps: list[Settings] = [{"attention": "absorbed", "prefill_attention": "expand"}]
    steps += [{"moe": "grouped" if grouped else "gather", "prefill_moe": "grouped"}]
    steps += [{"cuda_graphs": True}] if gpu else []
    steps += [{"compile": True}] if not machine.why_not("compile") else []
    steps += [{"memory": "expandable"}] if gpu else []
    if (
        gpu and not amp and not machine.why_not("triton")
    ):  # the kernels read weights as they are stored, not under amp
        attention = {"attention": "triton", "prefill_attention": "expand"}
        experts = {"moe": "triton", "prefill_moe": "grouped"}
        steps += [
            attention,
            experts,
            {"kernels": "triton", **attention, **experts},
            {"prefill_moe": "triton"},
        ]
        steps += [{"prefill_graphs": True}, {"tune": True}]
    steps += [{"amp": "bf16"}] if amp else []
    return steps


def _captures_grouped(given: Settings, machine: Machine) -> bool:
    """Whether graphs can hold grouped experts: their counts must not be looked at, and only torch's
    own kernel does without."""
    return common_settings(given).get("dtype", "auto") in ("auto", "bf16") and not machine.why_not(
        "grouped_mm"
    )


def ablation(
    given: Settings, machine: Machine, batch: int, kinds: Sequence[str] = KINDS
) -> list[Arm]:
    """The textbook's model (full keys and values, one expert after the other, eager) as baseline;
    then each step alone, the cumulative ladder, everything but one step, and every pair of steps,
    for correctness only.

    A loop over experts can be neither compiled nor captured: alone or in pairs, those steps bring
    along the experts' that can be, and tune brings the kernels that it tunes. A step that a later
    one sets anew can't be left out. Only arms of `kinds` are returned, and the baseline. Two of the
    same switches are timed once: the ladder's first rung is also a step alone, its last but one is
    also all but one."""
    steps = ladder_steps(given, machine, batch)
    base = Backend(**common_settings(given), **TEXTBOOK)
    experts = next(step for step in steps if "moe" in step)
    kernels = next((step for step in steps if "kernels" in step), {})
    prompts = experts if _captures_grouped(given, machine) else {"prefill_moe": "triton"}
    """Of a prompt's experts, what a graph can hold."""

    def arm(kind: str, parts: list[Settings], name: str) -> Arm:
        return Arm(
            name,
            kind,
            dataclasses.replace(base, **{k: v for part in parts for k, v in part.items()}),
        )

    def with_needs(kind: str, *parts: Settings) -> Arm:
        """The parts, and what they can't do without; a later step may set again what an earlier one
        did."""
        name, switched_on = (
            " & ".join(map(step_label, parts)),
            {name for part in parts for name in part},
        )
        needed = [kernels] if "tune" in switched_on and "kernels" not in switched_on else []
        if not needed and "moe" not in switched_on and switched_on & {"compile", "cuda_graphs"}:
            needed = [experts]
        if (
            "prefill_graphs" in switched_on
            and prompts not in parts
            and (prompts != experts or "prefill_moe" not in switched_on)
        ):
            needed += [prompts]
        taken = [step for step in steps if step in (*parts, *needed)]
        more = " and ".join(step_label(step) for step in taken if step not in parts)
        return arm(kind, taken, f"{name} (with {more})" if more else name)

    arms = [Arm("baseline", "baseline", base)]
    arms += [arm("ladder", steps[: i + 1], f"+ {step_label(step)}") for i, step in enumerate(steps)]
    full = arms[-1].backend
    arms += [with_needs("alone", step) for step in steps]
    for step in steps:
        others = [s for s in steps if s is not step and not (step is kernels and "tune" in s)]
        left = dataclasses.replace(
            arm("all-but-one", others, f"all but {step_label(step)}"), without=step
        )
        if left.backend != full:
            arms.append(left)
    arms += [with_needs("pairs", *pair) for pair in itertools.combinations(steps, 2)]
    unique: dict[tuple[Backend, bool], Arm] = {}
    for each in arms:
        if each.is_of(kinds):
            unique.setdefault((each.backend, each.timed), each)
    return list(unique.values())


def label(settings: Settings) -> str:
    """Switches as a row names them."""
    return " + ".join(
        name if value is True else f"{name}={value}" for name, value in settings.items()
    )


def step_label(step: Settings) -> str:
    """The same, for a step of the ladder: by the first thing it sets, with which the others
    come."""
    name, value = next(iter(step.items()))
    return label({name: value})
