"""Whether several devices can share a model, under the other switches, and how they add up."""

from __future__ import annotations

import dataclasses

from r1.errors import InputError, setting
from r1.model.config import Config
from r1.placement import cuts
from r1.switches.allreduce import choose
from r1.switches.backend import Backend
from r1.switches.machine import Machine


def check_devices(backend: Backend, config: Config) -> None:
    """Raise InputError unless so many devices can share this model."""
    if why := cuts.why_not(config, backend.tp, backend.ep, backend.pp):
        raise InputError(why)
    if backend.ranks > 1 and backend.tune:
        raise InputError(
            f"{setting('tune')} times one process's kernels, and devices that share a layer "
            "wait for each other: leave it out"
        )
    if backend.pp == 1:
        return
    splits = f"{setting('pp', backend.pp)} splits it into stages that wait for each other"
    whole = {
        setting("cuda_graphs"): backend.cuda_graphs,
        setting("prefill_graphs"): backend.prefill_graphs,
        setting("kernels", "triton"): backend.kernels == "triton",
    }
    for switch, asked in whole.items():
        if asked:
            raise InputError(f"{switch} takes a step as a whole, and {splits}: leave one out")


def choose_sum(backend: Backend, machine: Machine) -> Backend:
    """The backend with the way in which devices really add up.

    `machine` has no GPU where device=cpu. Raises InputError.
    """
    ranks = backend.tp * backend.ep
    chosen, why = choose(backend.allreduce, machine, ranks, backend.compute)
    if why:
        raise InputError(f"{setting('allreduce', backend.allreduce)}: {why}")
    return dataclasses.replace(backend, allreduce=chosen)
