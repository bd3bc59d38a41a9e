"""The switches of routed experts: what they need, and what `experts=host` and disk go with."""

from __future__ import annotations

from r1.errors import InputError, setting
from r1.model.config import Config
from r1.switches.backend import Backend

OWN = ("expert_slots", "expert_cache_gb", "expert_policy", "expert_profile", "guess_experts")
"""The switches that say how experts are fetched."""
CAN_NOT_WAIT = ("compile", "cuda_graphs", "prefill_graphs", "tune")
"""Switches under which nothing may wait for a number in the middle of a step."""


def check_strategies(backend: Backend, config: Config) -> None:
    """A model without experts has no way to compute them: `moe` and `prefill_moe` stay "auto"."""
    for name in ("moe", "prefill_moe"):
        value = getattr(backend, name)
        if value != "auto" and not config.experts.n_routed_experts:
            chooses = f"{setting(name, value)} chooses how experts are computed"
            raise InputError(f"{chooses}, and this model has none: leave it out")


def check(backend: Backend, config: Config) -> None:
    """Raise InputError for experts elsewhere where there are none, or where nothing may wait."""
    if backend.experts != "disk" and backend.expert_cache_gb:
        cache = setting("expert_cache_gb", backend.expert_cache_gb)
        disk = setting("experts", "disk")
        raise InputError(f"{cache} is of no use without {disk}: add that, or leave it out")
    pinned, file = setting("expert_policy", "pinned"), setting("expert_profile", "FILE")
    if backend.expert_profile and backend.expert_policy != "pinned":
        raise InputError(f"{file} is of no use without {pinned}: add that, or leave it out")
    if backend.expert_policy == "pinned" and not backend.expert_profile:
        raise InputError(f"{pinned} needs a recording: add {file}")
    if backend.experts == "device":
        for name in OWN:
            value = getattr(backend, name)
            if value != getattr(Backend, name):
                asked = setting(name) if value is True else setting(name, value)
                host = setting("experts", "host")
                raise InputError(f"{asked} is of no use without {host}: add that, or leave it out")
        return
    asked = setting("experts", backend.experts)
    if not config.experts.n_routed_experts:
        raise InputError(f"{asked}: this model has no routed experts: leave it out")
    if backend.pp > 1:
        pp = setting("pp", backend.pp)
        raise InputError(
            f"{asked} keeps experts of all layers, and {pp} splits these: leave one out"
        )
    for name in CAN_NOT_WAIT:
        if getattr(backend, name):
            raise InputError(
                f"{asked} has to know each layer's choices on the CPU, for which {setting(name)} "
                "has no place: leave one of them out"
            )
