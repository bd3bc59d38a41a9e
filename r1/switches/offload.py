"""The switches of routed experts: what they need, and what `experts=host` and disk go with."""

from __future__ import annotations

from r1.errors import InputError, setting
from r1.model.config import Config
from r1.storage import int4_cpu
from r1.storage.spec import Spec
from r1.switches.backend import Backend
from r1.switches.precision import spec_of

OWN = ("expert_slots", "expert_cache_gb", "expert_policy", "expert_profile", "guess_experts")
"""The switches that say how experts are fetched."""
CAN_NOT_WAIT = {
    "host": ("compile", "prefill_graphs", "tune"),
    "disk": ("compile", "prefill_graphs", "tune"),
    "cpu": ("compile", "prefill_graphs", "tune", "cuda_graphs"),
}
"""By the value of `experts`: switches under which nothing may wait for a number in the middle of a
step. cuda_graphs records a step in pieces, between which the host fetches (run/pieces.py), but does
not multiply."""
NEEDS = {"cpu": "all of them there, to multiply", "disk": "no copies there, as its files have all"}
"""By the value of `experts`: why no expert is resident."""


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
    _check_profile(backend)
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
    own = config.experts.n_routed_experts // backend.ep
    if backend.expert_slots > own:
        slots = setting("expert_slots", backend.expert_slots)
        raise InputError(f"{slots}: a device has {own} experts of a layer: give at most so many")
    if backend.expert_policy == "resident" and (needs := NEEDS.get(backend.experts)):
        raise InputError(
            f"{setting('expert_policy', 'resident')} leaves experts out of host memory, and "
            f"{asked} needs {needs}: use {setting('experts', 'host')}, or "
            f"{setting('expert_policy', 'most')}"
        )
    if backend.experts == "cpu":
        _check_host(backend, config)
    for name in CAN_NOT_WAIT[backend.experts]:
        if getattr(backend, name):
            raise InputError(
                f"{asked} has to know each layer's choices on the CPU, for which {setting(name)} "
                "has no place: leave one of them out"
            )


def _check_profile(backend: Backend) -> None:
    """Raise InputError for a recording without use, or the lack of one."""
    pinned, file = setting("expert_policy", "pinned"), setting("expert_profile", "FILE")
    if backend.expert_profile and backend.expert_policy not in ("pinned", "resident"):
        either = f"{pinned} or {setting('expert_policy', 'resident')}"
        raise InputError(f"{file} is of no use without {either}: add one, or leave it out")
    if backend.expert_policy == "pinned" and not backend.expert_profile:
        raise InputError(f"{pinned} needs a recording: add {file}")


def stored_kind(backend: Backend, config: Config) -> str | None:
    """How a resolved `backend` stores routed experts: "int4", ...; None: as plain numbers."""
    spec = _specs(backend, config)[0][0]
    return None if spec is None else spec.kind


def _specs(backend: Backend, config: Config) -> list[tuple[Spec | None, tuple[int, int]]]:
    """Storage and shape (out, in) of one expert's matrices."""
    shape = config.experts
    dim, inner = config.hidden_size, shape.moe_intermediate_size
    stack = f"model.layers.{shape.first_k_dense_replace}.mlp.experts"
    sizes = {"gate_proj": (inner, dim), "up_proj": (inner, dim), "down_proj": (dim, inner)}
    return [
        (spec_of(f"{stack}.{name}", config.files, backend.quant), size)
        for name, size in sizes.items()
    ]


def _check_host(backend: Backend, config: Config) -> None:
    """Raise InputError for what the host can't multiply as it is stored, or for several devices."""
    asked, instead = setting("experts", "cpu"), setting("experts", "host")
    if backend.ranks > 1:
        raise InputError(
            f"{asked} is built for one device, and {backend.sharing} asks for more: use {instead}"
        )
    if backend.guess_experts:
        guess = setting("guess_experts")
        raise InputError(f"{asked} copies nothing in a step that {guess} could fetch: leave it out")
    if backend.amp != "off":
        amp = setting("amp", backend.amp)
        raise InputError(
            f"{asked} multiplies in the dtype that experts are stored in, and {amp} in another: "
            f"use {setting('dtype', backend.amp)}"
        )
    for spec, size in _specs(backend, config):
        if spec is None:
            continue
        if spec.kind == "int4" and int4_cpu.takes(spec, size) and backend.dtype == "bf16":
            continue
        if spec == Spec("int8", 1, 0, spec.scale) and backend.dtype != "fp16":
            continue
        stored = f"{spec.describe()} of {size[0]} x {size[1]} in {backend.dtype}"
        raise InputError(
            f"{asked} needs experts that a CPU multiplies as they are stored: plain ones, int8 "
            "with a scale for each row, or symmetric int4 in bf16, of 64 rows or a multiple, with "
            f"bf16 scales for 32 to 256 columns; not {stored}: use {setting('quant', 'int8')}, or "
            f"{instead}"
        )
