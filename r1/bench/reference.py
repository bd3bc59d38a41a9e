"""The fp32 reference, made in its own process before any arm is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from r1.bench.arms import KEEPING, PLACES, Arm, textbook
from r1.bench.compiler_checks import CompilerChecks
from r1.bench.parity import rounds_by
from r1.bench.process import Answer
from r1.bench.session import keep
from r1.bench.team import Lead
from r1.bench.worker.serve import Setup, serve
from r1.bench.workload import Workload
from r1.errors import InputError
from r1.model.config import Config
from r1.switches.backend import SHARING, Backend
from r1.switches.resolve import resolve

NAME = "fp32 reference"
SAME = ("device", "quant", *SHARING, *PLACES, *KEEPING)
"""The baseline's switches that the reference has too."""


def make_reference(
    compared: Sequence[Arm],
    workload: Workload,
    config: Config,
    folder: Path,
    checks: CompilerChecks,
    setup: Setup,
    lead: Lead,
) -> Answer:
    """Write the text and the logits that every arm is compared with into `folder`.

    Returns the answers of the reference's process, by command: "reference" has the experts that its
    steps hit, "rates" the machine's rates in the arms' dtypes. Starts the compiler's checks after
    the rates are measured, so that they do not disturb them. `setup` is that of the arms. `lead`
    starts the process, or several if the baseline has several.

    For an arm that is measured alone there are only the rates.
    """
    base, backends = compared[0].backend, resolved(compared, workload, config)
    # Packed numbers are multiplied as the fp32 numbers that they stand for.
    same = {name: getattr(base, name) for name in SAME}
    plain = Backend(**{**textbook(config), **same, "dtype": "fp32"})
    dtypes = sorted({each.compute for each in backends}) or ["fp32"]
    # A quantized arm has a reference of its own (worker/dequantized.py).
    streams = any(each.experts != "device" for each in backends)
    reads = any(each.experts == "disk" for each in backends)
    multiplies = any(each.experts == "cpu" for each in backends)
    rounding = {rounds_by(each) for each in backends if not each.quantized}
    answers: Answer = {}
    name = "inductor-reference"
    process = lead.start(plain.ranks, serve, plain, workload, folder, name, setup)
    try:
        if (workload.alone or keep(answers, process, NAME, "build_reference")) and keep(
            answers, process, NAME, "rates", dtypes, streams, reads, multiplies
        ):
            checks.start()
            if not workload.alone:
                keep(answers, process, NAME, "reference", sorted(filter(None, rounding)))
    finally:
        process.quit()
    if "refused" in answers:
        raise InputError(answers["refused"])
    return answers


def resolved(compared: Sequence[Arm], workload: Workload, config: Config) -> list[Backend]:
    """The switches of the arms that can run here, as they are resolved."""
    backends = []
    for arm in compared:
        with contextlib.suppress(InputError):  # the arm's own process reports it, in its row
            backends.append(resolve(arm.backend, config, batch=workload.batch))
    return backends
