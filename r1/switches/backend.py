"""The switches, and what this machine can do of them.

`Backend` is what a user asks for; `resolve` turns every "auto" into what really runs, or raises one
sentence that says why not and what instead. Nothing here falls back in silence."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from r1.device import DTYPES
from r1.errors import InputError
from r1.model.config import Config
from r1.switches.machine import Machine

ATTENTION = ("auto", "naive", "expand", "absorbed", "triton")
MOE = ("auto", "loop", "gather", "grouped", "triton")
CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("auto", "cpu", "cuda", "rocm"),
    "dtype": ("auto", "fp32", "bf16", "fp16"),
    "amp": ("off", "bf16", "fp16"),
    "attention": ATTENTION,
    "prefill_attention": ATTENTION,
    "moe": MOE,
    "prefill_moe": MOE,
    "kernels": ("torch", "triton"),
    "quant": ("none", "fp8", "int8", "int4"),
    "speculate": ("off", "mtp"),
    "memory": ("default", "expandable", "empty-cache"),
}
# Slots that other parts of the project fill; until then they are refused, not ignored.
NOT_YET: dict[str, tuple[Any, ...]] = {
    "prefill_attention": ("triton",),
    "quant": ("fp8", "int8", "int4"),
}
PARALLEL = ("tp", "ep", "pp")
"""Likewise, where they are more than 1."""
GROUPED_ALIGNMENT = 16
"""torch's grouped_mm wants rows of a multiple of so many bytes."""


@dataclass(frozen=True)
class Backend:
    """The switches. "auto" lets `resolve` choose by machine and model. The command line's flags
    have the same names."""

    device: str = "auto"
    """Where it runs: cuda (NVIDIA), rocm (AMD) or cpu; auto takes a GPU where there is one."""
    dtype: str = "auto"
    """What weights and cache are stored in; auto: bf16 on a GPU that has it (else fp16), fp32 on a
    CPU or under amp."""
    amp: str = "off"
    """Autocast: weights stay fp32, matrix products run in this dtype."""
    compile: bool = False
    """torch.compile, one block at a time; of prompts only, where kernels=triton has fused a decode
    step's by hand."""
    cuda_graphs: bool = False
    """Capture of the decode step."""
    prefill_graphs: bool = False
    """Capture of prompts: one graph for each length, rounded up to a few, and for each number of
    them (runner.py)."""
    attention: str = "auto"
    """How a decode step attends; auto: absorbed, or triton with kernels=triton."""
    prefill_attention: str = "auto"
    """How a prompt attends; auto: expand."""
    moe: str = "auto"
    """How a decode step runs its experts; auto: gather for a few tokens, grouped for more, or
    triton with kernels=triton."""
    prefill_moe: str = "auto"
    """How a prompt runs its experts; auto: grouped, or triton where prefill_graphs can't have
    that."""
    memory: str = "default"
    """The GPU allocator's policy; expandable: segments that grow (less is lost to fragments);
    empty-cache: what a prompt took is given back before decoding."""
    kernels: str = "torch"
    """triton: a decode step's blocks are r1/kernels' fused ones, of which attention=triton and
    moe=triton are a part."""
    tune: bool = False
    """Search the launch parameters of kernels=triton on this GPU, for the shapes that come, and
    keep them (kernels/tune.py)."""
    quant: str = "none"
    speculate: str = "off"
    """mtp: the multi-token-prediction layer drafts tokens, and one step of the model verifies them
    (speculate.py)."""
    draft_tokens: int = 1
    """How many tokens are drafted for a step of `speculate`; from the second on the MTP layer reads
    its own output."""
    tp: int = 1
    ep: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise InputError(f"{name}={value!r}: choose {', '.join(choices)}")
        for name in ("compile", "cuda_graphs", "prefill_graphs", "tune"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r}: choose True or False")
        for name in ("draft_tokens", "tp", "ep", "pp"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={value!r}: give a whole number of at least 1")

    @property
    def step_tokens(self) -> int:
        """Tokens that a decode step reads of each row: the last one, and the drafts behind it."""
        return 1 + (self.draft_tokens if self.speculate == "mtp" else 0)

    @property
    def compute(self) -> str:
        """The dtype that matrix products run in."""
        return self.dtype if self.amp == "off" else self.amp

    def describe(self) -> str:
        """The switches that differ from the dataclass's defaults, as one would type them."""
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }
        return (
            ", ".join(f"{k}={v}" if not isinstance(v, bool) else k for k, v in changed.items())
            or "all off"
        )


def resolve(
    backend: Backend, config: Config, machine: Machine | None = None, *, batch: int = 1
) -> Backend:
    """Turn every "auto" into what really runs for `config` on `machine`, with `batch` rows in a
    decode step.

    Raises InputError for a switch that the machine can't do, that is not built yet, or that
    contradicts another."""
    machine = machine or Machine.here()
    for name, values in NOT_YET.items():
        if getattr(backend, name) in values:
            raise InputError(
                f"{name}={getattr(backend, name)} is not built yet: leave {name} at its default"
            )
    for name in PARALLEL:
        if getattr(backend, name) > 1:
            raise InputError(f"{name}={getattr(backend, name)} is not built yet: leave {name} at 1")

    device = _device(backend, machine)
    gpu = device != "cpu"
    machine = machine if gpu else machine.without_gpu()
    dtype = backend.dtype
    if dtype == "auto":
        dtype = (
            "fp32"
            if not gpu or backend.amp != "off"
            else "fp16"
            if machine.why_not("bf16")
            else "bf16"
        )
    wanted = {
        "bf16": "bf16" in (dtype, backend.amp),
        "compile": backend.compile,
        "cuda_graphs": backend.cuda_graphs,
    }
    wanted["memory"] = backend.memory != "default"
    for feature, asked in wanted.items():
        if asked and (why := machine.why_not(feature)):
            raise InputError(why)
    if backend.prefill_graphs and (why := machine.why_not("cuda_graphs")):
        raise InputError(f"prefill_graphs: {why}")
    if backend.prefill_graphs and backend.memory == "empty-cache":
        raise InputError(
            "memory=empty-cache gives back what a prompt took, and prefill_graphs keeps it: leave one of them out"
        )
    if backend.amp != "off" and dtype != "fp32":
        raise InputError(
            f"amp={backend.amp} casts fp32 weights as it goes, but dtype={dtype}: use dtype=fp32, or amp=off"
        )
    backend = _triton(backend, machine)
    if backend.speculate == "mtp" and not config.num_nextn_predict_layers:
        raise InputError(
            "speculate=mtp drafts with the MTP layer, and this model has none: use speculate=off"
        )
    if backend.speculate == "off" and backend.draft_tokens != 1:
        raise InputError(
            f"draft_tokens={backend.draft_tokens} is of no use without drafts: add speculate=mtp, or leave it out"
        )
    attention, prefill_attention = _attention(backend)
    compute = dtype if backend.amp == "off" else backend.amp
    moe, prefill_moe = _experts(
        backend, config, machine, compute, gpu=gpu, tokens=batch * backend.step_tokens
    )
    return dataclasses.replace(
        backend, device=device, dtype=dtype, attention=attention,
        prefill_attention=prefill_attention, moe=moe, prefill_moe=prefill_moe,
    )  # fmt: skip


def _device(backend: Backend, machine: Machine) -> str:
    if backend.device in ("auto", machine.device):
        return machine.device
    if backend.device == "cpu":
        return "cpu"
    if machine.cuda:
        drives = machine.device
        raise InputError(
            f"device={backend.device}: this torch ({machine.torch_version}) drives {drives}: use device={drives}"
        )
    raise InputError(
        f"device={backend.device}: torch {machine.torch_version} sees no such GPU here: use device=cpu"
    )


def _triton(backend: Backend, machine: Machine) -> Backend:
    """The kernels read weights as they are stored; fused blocks hold the fused attention and
    experts."""
    if backend.tune and backend.kernels != "triton":
        raise InputError(
            "tune searches the launch parameters of kernels=triton: add kernels=triton, or leave tune out"
        )
    asked = [
        name
        for name in ("kernels", "attention", "moe", "prefill_moe")
        if getattr(backend, name) == "triton"
    ]
    if not asked:
        return backend
    if why := machine.why_not("triton"):
        raise InputError(f"{asked[0]}=triton: {why}")
    if backend.amp != "off":
        raise InputError(
            f"{asked[0]}=triton reads weights as they are stored, not under amp: use dtype={backend.amp}, no amp"
        )
    if backend.kernels != "triton":
        return backend
    for name in ("attention", "moe"):
        if getattr(backend, name) not in ("auto", "triton"):
            value = getattr(backend, name)
            raise InputError(
                f"kernels=triton fuses its own {name} into a step, not {name}={value}: leave {name} at auto"
            )
    return dataclasses.replace(backend, attention="triton", moe="triton")


def _attention(backend: Backend) -> tuple[str, str]:
    """naive caches full keys and values and the others the latent, so one phase's naive makes the
    other's."""
    decode, prefill = backend.attention, backend.prefill_attention
    if decode == "auto":
        decode = "naive" if prefill == "naive" else "absorbed"
    if prefill == "auto":
        prefill = "naive" if decode == "naive" else "expand"
    if (decode == "naive") != (prefill == "naive"):
        raise InputError(
            f"attention={decode} and prefill_attention={prefill} can't share a cache: naive keeps every head's keys and "
            "values, the others the latent; use naive for both or for neither"
        )
    return decode, prefill


def _experts(
    backend: Backend, config: Config, machine: Machine, compute: str, *, gpu: bool, tokens: int
) -> tuple[str, str]:
    """`tokens`: how many a decode step reads, of all rows.

    loop reads the experts' counts on the host, and so does torch's grouped_mm where it has no
    kernel for the machine."""
    unaligned = _unaligned(config, DTYPES[compute])
    synced = {"loop": "reads its counts on the host"}
    if gpu and compute != "bf16":
        synced["grouped"] = (
            f"reads its counts on the host, because torch's grouped_mm has a GPU kernel for bf16 only, not for {compute}"
        )
    elif why := machine.why_not("grouped_mm"):
        synced["grouped"] = f"reads its counts on the host, because {why}"
    chosen = {}
    for name in ("moe", "prefill_moe"):
        value = getattr(backend, name)
        # gather copies the experts of every token; grouped has to sort, but reads each expert that
        # was hit once.
        few = name == "moe" and (
            tokens == 1
            or 4 * tokens * config.experts.num_experts_per_tok <= config.experts.n_routed_experts
        )
        capture = "cuda_graphs" if name == "moe" else "prefill_graphs"
        captured = getattr(backend, capture)
        if value == "auto" and few:
            value = "gather"
        elif value == "auto" and not unaligned and not (captured and "grouped" in synced):
            value = "grouped"
        elif (
            value == "auto"
            and captured
            and name == "prefill_moe"
            and backend.amp == "off"
            and not machine.why_not("triton")
        ):
            value = "triton"
        elif value == "auto":
            value = "gather" if backend.compile or captured else "loop"
        if value == "grouped" and unaligned:
            raise InputError(f"{name}=grouped: {unaligned}; use gather")
        if value == "loop" and backend.compile:
            raise InputError(
                f"{name}=loop {synced['loop']}, which compile can't hold: use gather or grouped"
            )
        if value in synced and captured:
            raise InputError(
                f"{name}={value} {synced[value]}, which no graph can hold: use gather or triton, or leave {capture} off"
            )
        chosen[name] = value
    return chosen["moe"], chosen["prefill_moe"]


def _unaligned(config: Config, dtype: torch.dtype) -> str | None:
    for name, size in (
        ("hidden_size", config.hidden_size),
        ("moe_intermediate_size", config.experts.moe_intermediate_size),
    ):
        if config.experts.n_routed_experts and size * dtype.itemsize % GROUPED_ALIGNMENT:
            return f"torch's grouped_mm wants rows of a multiple of {GROUPED_ALIGNMENT} bytes, and {name} is {size} in {dtype}"
    return None
