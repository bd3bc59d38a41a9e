"""The switches that a user asks for. resolve.py turns them into what really runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from r1.errors import InputError, setting
from r1.model.strategy import Strategy
from r1.placement.slots import POLICIES
from r1.storage.kinds import USUAL
from r1.switches.allreduce import ALLREDUCE, OFF
from r1.switches.strategies import ATTENTION, EXPERTS, GROUPED

SHARING = ("tp", "ep", "pp")
"""The switches by which devices share a model, each a number of them."""


def choices() -> dict[str, tuple[str, ...]]:
    """The values of each switch that is a choice; a strategy that was registered is one of them."""
    attention: dict[str, Strategy] = {**ATTENTION, **GROUPED}
    return {
        "device": ("auto", "cpu", "cuda", "rocm"),
        "dtype": ("auto", "fp32", "bf16", "fp16"),
        "amp": ("off", "bf16", "fp16"),
        "attention": ("auto", *attention),
        "prefill_attention": ("auto", *_for_prompts(attention)),
        "moe": ("auto", *EXPERTS),
        "prefill_moe": ("auto", *_for_prompts(EXPERTS)),
        "join": ("auto", "on", "off"),
        "kernels": ("torch", "triton"),
        "quant": ("auto", "none", *USUAL),
        "quant_head": ("none", "fp8", "int8"),
        "quant_activations": ("none", "fp8"),
        "speculate": ("off", "mtp", "draft"),
        "experts": ("device", "host", "cpu", "disk"),
        "expert_policy": tuple(POLICIES),
        "allreduce": ("auto", OFF, *ALLREDUCE),
        "memory": ("default", "expandable", "empty-cache"),
    }


def _for_prompts(table: Mapping[str, Strategy]) -> list[str]:
    """The names of those built for prompts. (`resolve` reports entries that are no strategy.)"""
    built = {name: getattr(each, "phases", Strategy.phases) for name, each in table.items()}
    return [name for name, phases in built.items() if "prefill" in phases]


@dataclass(frozen=True)
class Backend:
    """The switches. "auto" lets `resolve` choose by machine and model.

    The command line's flags have the same names, with dashes. `--help` shows the texts below their
    fields: there `name=value` in backquotes is written as a flag.
    """

    device: str = "auto"
    """where it runs: cuda (NVIDIA), rocm (AMD) or cpu; auto: a GPU if there is one"""
    dtype: str = "auto"
    """number format of weights and cache; auto: bf16 on a GPU that has it (else fp16), fp32 on a
    CPU or with `amp`"""
    amp: str = "off"
    """autocast: weights stay fp32, and matrix products run in this format"""
    compile: bool = False
    """torch.compile, one block at a time; with `kernels=triton`, which fuses the blocks of a decode
    step by hand, it compiles prompts only"""
    cuda_graphs: bool = False
    """record the decode step as a CUDA graph, and replay it with one launch"""
    prefill_graphs: bool = False
    """the same for prompts: one graph for each number of prompts and each length, rounded up"""
    attention: str = "auto"
    """attention of a decode step; naive caches all keys and values, the others the latent; auto:
    absorbed, or triton with `kernels=triton`; grouped for grouped-query attention, whose naive and
    sdpa cache the same"""
    prefill_attention: str = "auto"
    """attention of a prompt; auto: expand, or sdpa for grouped-query attention"""
    moe: str = "auto"
    """experts of a decode step; auto: gather for a few tokens, grouped for more, or triton with
    `kernels=triton`"""
    prefill_moe: str = "auto"
    """experts of a prompt; auto: grouped, or triton where a graph can't hold that, and for packed
    weights with `kernels=triton`"""
    join: str = "auto"
    """store matrices that multiply the same input as one (q_a with kv_a, q with k and v, gate with
    up), and rotate queries and key in one call; auto: on"""
    memory: str = "default"
    """how the GPU's memory is managed; expandable: in segments that grow, so less is lost between
    them (then it stays so for the process); empty-cache: what a prompt took is given back before
    decoding"""
    kernels: str = "torch"
    """triton: hand-written kernels for a whole decode step, attention and experts included, and for
    a prompt's products with packed weights"""
    quant: str = "auto"
    """how matrices are stored; auto: as the checkpoint has them, but FP8 on a CPU and what kernels
    can't read become plain numbers, as with none; the others quantize while loading: int4 in groups
    of 128, -g64 and -g32 in smaller ones"""
    quant_head: str = "none"
    """how the output head is stored, which `quant` leaves alone; of a model in 4 bit it is up to a
    third of what a token reads"""
    quant_activations: str = "none"
    """fp8: FP8 matrices get inputs of FP8, a scale for each 128 columns of a token (W8A8), in
    prompts and in decode steps of 64 tokens or more; a chip multiplies them at twice the speed with
    `kernels=triton`"""
    tune: bool = False
    """search the best launch parameters of `kernels=triton` on this GPU, and keep them in a file"""
    speculate: str = "off"
    """mtp: the multi-token-prediction layer drafts tokens, and one step of the model checks them;
    draft: a small model of the same vocabulary drafts them, with the same switches, but its own
    attention, experts and output head"""
    draft_tokens: int = 1
    """tokens that are drafted for a step with `speculate=mtp` or `speculate=draft`; from the second
    on the MTP layer reads its own output"""
    tp: int = 1
    """tensor parallel: devices that share each layer's heads and inner values; start the command
    with torchrun, a process for each device"""
    ep: int = 1
    """expert parallel: devices that share each layer's experts, likewise; together with `tp` as
    many devices as both multiplied"""
    pp: int = 1
    """pipeline parallel: stages that each hold a range of the layers; each stage has the devices of
    `tp` and `ep`"""
    allreduce: str = "auto"
    """how `tp` and `ep` add up what devices made of a layer; symm: torch's kernels over memory that
    GPUs map of each other; triton: our kernel over it (large sums of both: NCCL); auto: nccl (AMD:
    RCCL), on a CPU gloo, off where none share"""

    experts: str = "device"
    """where routed experts lie; host: in the CPU's memory, chosen ones are copied to slots of the
    device; cpu: the same, but the CPU multiplies what a step misses; disk: in the checkpoint's
    files, behind a cache in the CPU's memory"""
    expert_slots: int = 0
    """experts of each layer that the device holds with `experts=host` or disk; 0: as many as fit
    into what is free"""
    expert_cache_gb: float = 0.0
    """GB of the CPU's memory for experts that were read, with `experts=disk`; 0: what is free"""
    expert_policy: str = "last"
    """which expert gives its slot away; last: the one used longest ago; most: the one that fewest
    tokens chose; pinned: the one chosen least in `expert_profile`; resident: most keep theirs, the
    profile's best, without a copy in host memory"""
    expert_profile: str = ""
    """the file of `expert_policy=pinned` (or resident): how often each expert was chosen, as
    tools/measure/record_routing.py records it"""
    guess_experts: bool = False
    """with `experts=host` or disk: the next layer's router guesses one layer early which experts
    will be chosen, and they are fetched ahead; a wrong guess costs bandwidth"""

    def __post_init__(self) -> None:
        for name, values in choices().items():
            value = getattr(self, name)
            if value not in values:
                raise InputError(f"{setting(name, repr(value))}: choose {', '.join(values)}")
        for name in ("compile", "cuda_graphs", "prefill_graphs", "tune", "guess_experts"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InputError(f"{setting(name, repr(value))}: choose True or False")
        for name in ("draft_tokens", *SHARING):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                asked = setting(name, repr(value))
                raise InputError(f"{asked}: give a whole number of at least 1")

        slots = self.expert_slots
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 0:
            asked = setting("expert_slots", repr(slots))
            raise InputError(f"{asked}: give a whole number, or 0 for what is free")
        profile = self.expert_profile
        if not isinstance(profile, str):
            raise InputError(f"{setting('expert_profile', repr(profile))}: give a file's path")
        cache = self.expert_cache_gb
        if isinstance(cache, bool) or not isinstance(cache, (int, float)) or not 0 <= cache < 1e6:
            asked = setting("expert_cache_gb", repr(cache))
            raise InputError(f"{asked}: give a number of GB, or 0 for what is free")

    @property
    def step_tokens(self) -> int:
        """Tokens that a decode step reads of each row: the last one, and the drafts after it."""
        return 1 + (self.draft_tokens if self.speculate != "off" else 0)

    @property
    def ranks(self) -> int:
        """Devices, each with a process, that share the model."""
        return self.tp * self.ep * self.pp

    @property
    def sharing(self) -> str:
        """The switches by which devices share the model, as one would type them."""
        values = {name: getattr(self, name) for name in SHARING}
        return " and ".join(setting(name, value) for name, value in values.items() if value > 1)

    @property
    def compute(self) -> str:
        """The dtype that matrix products run in."""
        return self.dtype if self.amp == "off" else self.amp

    @property
    def quantized(self) -> bool:
        """Whether some matrix is. Of a resolved backend."""
        return self.quant != "none" or self.quant_head != "none"

    def describe(self) -> str:
        """The switches that differ from the defaults, as one would type them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {n: v for n, v in values.items() if v != getattr(Backend, n)}
        return ", ".join(n if v is True else f"{n}={v}" for n, v in changed.items()) or "all off"
