"""Which arms on which workloads, and which problems: checked before anything is measured."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from r1 import drafting
from r1.bench import ablation, arms, exam
from r1.bench.arms import Arm, Settings
from r1.bench.exam import Question
from r1.bench.workload import Workload
from r1.build import HEADROOM, weight_bytes
from r1.device import available_bytes, torch_device
from r1.errors import InputError
from r1.files.config_json import load_config
from r1.files.tokenizer import tokenizer_of
from r1.model.config import Config
from r1.placement import profile
from r1.switches import flags
from r1.switches.backend import SHARING, Backend
from r1.switches.draft import check_given
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

PROBLEMS = 16
"""Problems that each arm is asked by default: two CPU cores answer them in a few seconds."""

Plan = tuple[Workload, list[Arm]]


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError if the arguments contradict one another."""
    if arguments.repetitions < 1:
        raise InputError(f"-r {arguments.repetitions}: give a whole number above 0")
    if arguments.layers is not None and arguments.shape is None:
        raise InputError("--layers cuts a --shape, and none is given: a checkpoint is run whole")
    if arguments.no_baseline:
        for name in ("ablate", "only"):
            if getattr(arguments, name):
                takes = "--no-baseline measures all switches together, and nothing beside them"
                raise InputError(f"{takes}: leave --{name} out")
    asked, draft = Backend(**flags.given(arguments)), arguments.draft_model
    if draft is not None and arguments.shape is not None:
        raise InputError(
            "--draft-model drafts for a checkpoint, not for a --shape: give --model DIR"
        )
    if asked.experts == "disk" and arguments.shape is not None:
        raise InputError(
            "--experts disk reads experts from a checkpoint's files, and a --shape has none: give "
            "--model DIR, or use --experts host"
        )
    if asked.experts != "device" and arguments.routing == "uniform":
        raise InputError(
            f"--routing uniform repeats a token's experts in every step, so --experts "
            f"{asked.experts} would find them in its slots: use --routing fresh"
        )
    check_given(asked, draft is not None)
    if draft is not None:
        check_draft(arguments)
    acceptance = arguments.assume_acceptance
    if acceptance is not None:
        if flags.given(arguments).get("speculate", "off") == "off":
            raise InputError(
                "--assume-acceptance is about drafts, and nothing drafts: add --speculate mtp"
            )
        if not 0 <= acceptance <= 1:
            raise InputError(f"--assume-acceptance {acceptance}: give a probability, 0 to 1")


def check_draft(arguments: argparse.Namespace) -> None:
    """Raise InputError for a --draft-model that can't draft for the --model."""
    config, common = load_config(arguments.model), arms.common_settings(flags.given(arguments))
    asked = Backend(**common, speculate="draft")
    drafting.find(arguments.draft_model, asked, tokenizer_of(arguments.model, config))


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """Every combination of the sizes in the comma lists."""
    source = (checkpoint(arguments), arguments.shape, arguments.layers)
    draft = None if arguments.draft_model is None else str(arguments.draft_model)
    how = (arguments.seed, str(arguments.routing), arguments.assume_acceptance)
    return [
        Workload(*source, *sizes, *how, draft=draft, alone=arguments.no_baseline)
        for sizes in itertools.product(
            arguments.batch, arguments.prompt, arguments.new, arguments.depth
        )
    ]


def checkpoint(arguments: argparse.Namespace) -> str | None:
    """The checkpoint's folder. None: random weights of a shape."""
    return None if arguments.shape else str(arguments.model)


def plans(arguments: argparse.Namespace, machine: Machine, work: list[Workload]) -> list[Plan]:
    """Each workload with its arms. Raises InputError if nothing could be measured."""
    given, config = flags.given(arguments), work[0].config()
    planned = [(each, arms_of(given, machine, each, arguments)) for each in work]
    check_of_use(arguments, config, [arm for _, compared in planned for arm in compared])
    if not arguments.ablate:  # --ablate takes only what can run here
        check_possible(planned, config, machine)
    return planned


def check_of_use(arguments: argparse.Namespace, config: Config, planned: list[Arm]) -> None:
    """Raise InputError for a flag that would change nothing."""
    if arguments.routing != "model":
        if not config.experts.n_routed_experts:
            asked = f"--routing {arguments.routing}"
            raise InputError(f"{asked} draws experts, and this model has none: leave it out")
        if isinstance(arguments.routing, Path):
            profile.load(arguments.routing, config)
    if arguments.warm_start and not any(arm.backend.compile for arm in planned):
        again = "--warm-start starts arms that compile a second time, and none does"
        raise InputError(f"{again}: add --compile, or leave it out")
    ignored = flags.given(arguments).keys() - ablation.READ
    if arguments.ablate and ignored:
        flag = f"--{min(ignored).replace('_', '-')}"
        raise InputError(f"--ablate takes every switch by itself: leave {flag} out")


def arms_of(
    given: Settings, machine: Machine, workload: Workload, arguments: argparse.Namespace
) -> list[Arm]:
    """The arms on this workload, the baseline first.

    Raises InputError if --only names a kind that has no arm.
    """
    if arguments.no_baseline:
        return [arms.itself(given)]
    shared = shared_by_all(given, machine, workload)
    if arguments.ablate:
        kinds = arguments.only or arms.KINDS
        compared = ablation.ablation(
            given, machine, workload.batch, kinds, shared, workload.config()
        )
    else:
        compared = arms.from_switches(given, arguments.only or arms.USUAL, shared)
    for kind in arguments.only or ():
        if not any(each.is_of([kind]) for each in compared[1:]):
            raise InputError(f"--only {kind}: with these switches no arm is of this kind")
    return compared


def shared_by_all(given: Settings, machine: Machine, workload: Workload) -> Settings:
    """tp, ep, pp and experts, where they are given and no device could hold the baseline's model.

    Then devices share the model, or experts lie elsewhere, in all arms, and in the reference.
    """
    spread = {name: given[name] for name in SHARING if given.get(name, 1) > 1}
    if given.get("experts", "device") != "device":
        spread |= arms.places(given)
        if given["experts"] == "cpu":  # for some storages only: the baseline may have another
            spread["experts"] = "host"
    if not spread:
        return {}
    config, base = workload.config(), Backend(**arms.common_settings(given))
    resolved = resolve(base, config, machine, batch=workload.batch)
    needed = weight_bytes(config, resolved) + HEADROOM
    return spread if needed > available_bytes(torch_device(resolved.device)) else {}


def check_possible(planned: list[Plan], config: Config, machine: Machine) -> None:
    """Raise InputError if the baseline can't run here, or if none of the other arms can.

    If some of them can, each of the others gets a row that says why it can't.
    """
    reasons = []
    for workload, (base, *asked) in planned:
        resolve(base.backend, config, machine, batch=workload.batch)
        for arm in asked:
            try:
                resolve(arm.backend, config, machine, batch=workload.batch)
                return
            except InputError as error:
                reasons.append(str(error))
    if reasons:
        raise InputError(
            f"nothing beside the baseline can be run: {'; '.join(dict.fromkeys(reasons))}"
        )


def questions_of(model: str | None, count: int | None) -> list[Question]:
    """The checkpoint's problems. Each workload takes the first `count` that fit.

    Raises InputError if `count` is not possible.
    """
    if count is not None and count < 0:
        raise InputError(f"--problems {count}: give 0 or more")
    questions = exam.load(model) if model is not None and count != 0 else []
    if count and not questions:
        raise InputError(
            f"--problems {count}: {model or 'a shape of random weights'} has no {exam.FILE}: "
            "leave it out"
        )
    if count and count > len(questions):
        raise InputError(
            f"--problems {count}: {exam.FILE} has {len(questions)}: give at most that many"
        )
    return questions
