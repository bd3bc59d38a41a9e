"""`--ablate`: the ladder of all optimizations that this machine can run, and its arms."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from r1.bench.arms import IDLE_WITHOUT, KINDS, Arm, Settings, common_settings, label, textbook
from r1.model.config import Config
from r1.model.shapes import R1
from r1.switches.backend import SHARING, Backend
from r1.switches.machine import Machine
from r1.switches.resolve import BEST_ATTENTION
from r1.switches.strategies import attention_of

QUANT = ("quant", "quant_activations", "quant_head")
READ = {"device", "dtype", "amp", *QUANT, *SHARING, "allreduce"}
"""The switches of the command line that the ladder depends on; it sets all others itself."""


def ladder_steps(
    given: Settings, machine: Machine, batch: int, config: Config = R1
) -> list[Settings]:
    """The optimizations that this machine can run, of a model of this config.

    They are in the order in which one would add them to the textbook's model. Quantizing changes
    what is computed, so it is a step, the last one, only if a format is given.
    """
    gpu = machine.cuda and given.get("device") != "cpu"
    storage = common_settings(given).get("dtype", "auto")
    amp = storage == "fp32" or (storage == "auto" and not gpu)
    grouped = batch > 1 and (not gpu or _captures_grouped(given, machine))
    table, sparse = attention_of(config.attention), config.experts.n_routed_experts > 0
    best, prefill = (next(n for n in names if n in table) for names in BEST_ATTENTION.values())
    steps: list[Settings] = [{"attention": best, "prefill_attention": prefill}]
    if sparse:
        steps += [{"moe": "grouped" if grouped else "gather", "prefill_moe": "grouped"}]
    steps += [{"join": "on"}]
    steps += [{"cuda_graphs": True}] if gpu else []
    steps += [{"compile": True}] if not machine.why_not("compile") else []
    steps += [{"memory": "expandable"}] if gpu else []
    # The kernels read weights as they are stored, so they do not work with amp.
    kernels = gpu and not amp and not machine.why_not("triton") and "triton" in table
    if kernels:
        attention = {"attention": "triton", "prefill_attention": prefill}
        experts = {"moe": "triton", "prefill_moe": "grouped"} if sparse else {}
        steps += [attention, *([experts] if sparse else [])]
        steps += [{"kernels": "triton", **attention, **experts}]
        steps += [{"prefill_moe": "triton"}] if sparse else []
    steps += [{"prefill_graphs": True}] if gpu and (kernels or not sparse) else []
    # The search times one process's kernels, and devices that share a model wait for each other.
    sharing = [{name: given[name]} for name in SHARING if given.get(name, 1) > 1]
    steps += [{"tune": True}] if kernels and not sharing else []
    steps += [{"amp": "bf16"}] if amp else []
    steps += [
        {name: given[name]} for name in QUANT if given.get(name) not in (None, "auto", "none")
    ]
    # Several devices are there only if torchrun started a process for each.
    steps += sharing
    adds = given.get("allreduce", "triton" if kernels else "auto")
    shares = given.get("tp", 1) * given.get("ep", 1) > 1
    return steps + ([{"allreduce": adds}] if shares and adds != "auto" else [])


def ablation(
    given: Settings,
    machine: Machine,
    batch: int,
    kinds: Sequence[str] = KINDS,
    shared: Settings | None = None,
    config: Config = R1,
) -> list[Arm]:
    """The textbook's model as baseline, and the arms of `kinds` made from the ladder's steps.

    alone         each step alone
    ladder        each step with all steps before it
    all-but-one   the whole ladder without one step
    pairs         every two steps, for correctness only

    An "all-but-one" arm is left out if a later step sets the same switches again. Arms with the
    same switches are timed once: the ladder's first rung is also a step alone, and its last but
    one is also "all but" the last step.
    """
    ladder = _Ladder(given, machine, batch, shared or {}, config)
    arms = [Arm("baseline", "baseline", ladder.base)]
    arms += ladder.rungs()
    full = arms[-1].backend
    arms += [ladder.arm_with_needs("alone", step) for step in ladder.steps]
    left_out = [ladder.all_but(step) for step in ladder.steps]
    arms += [arm for arm in left_out if arm.backend != full]
    pairs = itertools.combinations(ladder.steps, 2)
    arms += [ladder.arm_with_needs("pairs", *pair) for pair in pairs]
    unique: dict[tuple[Backend, bool], Arm] = {}
    for each in arms:
        if each.is_of(kinds):
            unique.setdefault((each.backend, each.timed), each)
    return list(unique.values())


class _Ladder:
    """The steps that one machine can run, and arms made from them."""

    def __init__(
        self, given: Settings, machine: Machine, batch: int, shared: Settings, config: Config
    ) -> None:
        steps = ladder_steps(given, machine, batch, config)
        self.steps = [step for step in steps if not step.keys() & shared.keys()]
        self.base = Backend(**{**textbook(config), **common_settings(given), **shared})
        self.experts: Settings = next((s for s in self.steps if next(iter(s)) == "moe"), {})
        """The step that computes the experts; empty for a model without any."""
        self.kernels: Settings = next((step for step in self.steps if "kernels" in step), {})
        self.prompts: Settings = (
            self.experts
            if _captures_grouped(given, machine) or not self.experts
            else {"prefill_moe": "triton"}
        )
        """The step whose prefill experts a CUDA graph can hold."""

    def arm(self, kind: str, parts: Sequence[Settings], name: str) -> Arm:
        """The arm with these steps. A later step overrides an earlier one."""
        settings = {key: value for part in parts for key, value in part.items()}
        return Arm(name, kind, dataclasses.replace(self.base, **settings))

    def rungs(self) -> list[Arm]:
        """Each step with all steps before it."""
        return [
            self.arm("ladder", self.steps[: i + 1], f"+ {step_label(step)}")
            for i, step in enumerate(self.steps)
        ]

    def all_but(self, step: Settings) -> Arm:
        """The whole ladder without one step. Without kernels, tune is left out too, and without
        `quant` inputs of FP8.
        """
        idle = {other for name, other in IDLE_WITHOUT.items() if name in step}
        others = [other for other in self.steps if other is not step and not other.keys() & idle]
        arm = self.arm("all-but-one", others, f"all but {step_label(step)}")
        backend = arm.backend
        if step.keys() & set(SHARING) and backend.tp * backend.ep == 1:
            backend = dataclasses.replace(backend, allreduce="auto")
        return dataclasses.replace(arm, backend=backend, without=step)

    def arm_with_needs(self, kind: str, *parts: Settings) -> Arm:
        """The arm with these steps, and with the steps that they need."""
        needed = self._needed(parts)
        taken = [step for step in self.steps if step in (*parts, *needed)]
        name = " & ".join(map(step_label, parts))
        more = " and ".join(step_label(step) for step in taken if step not in parts)
        return self.arm(kind, taken, f"{name} (with {more})" if more else name)

    def _needed(self, parts: Sequence[Settings]) -> list[Settings]:
        """The steps without which these can't run.

        A loop over experts can be neither compiled nor captured, so compile and CUDA graphs need
        the experts' step. tune needs the kernels that it tunes, inputs of FP8 need matrices of FP8,
        and allreduce devices that share.
        """
        switches = {name for part in parts for name in part}
        needed = [self.kernels] if "tune" in switches and "kernels" not in switches else []
        if not needed and "moe" not in switches and switches & {"compile", "cuda_graphs"}:
            needed = [self.experts]
        if (
            "prefill_graphs" in switches
            and self.prompts not in parts
            and (self.prompts != self.experts or "prefill_moe" not in switches)
        ):
            needed += [self.prompts]
        if "quant_activations" in switches:
            needed += [step for step in self.steps if "quant" in step]
        if "allreduce" in switches:
            needed += [step for step in self.steps if step.keys() & set(SHARING)]
        return [step for step in needed if step]


def _captures_grouped(given: Settings, machine: Machine) -> bool:
    """Whether CUDA graphs can hold grouped experts.

    The host must not read their counts. Only torch's own kernel does without them.
    """
    return common_settings(given).get("dtype", "auto") in ("auto", "bf16") and not machine.why_not(
        "grouped_mm"
    )


def step_label(step: Settings) -> str:
    """A step of the ladder as a row names it: by its first switch."""
    name, value = next(iter(step.items()))
    return label({name: value})
