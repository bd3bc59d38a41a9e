"""The switches that a user asks for. resolve.py turns them into what really runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from r1.errors import InputError
from r1.model.strategy import Strategy
from r1.switches.strategies import ATTENTION, EXPERTS


def choices() -> dict[str, tuple[str, ...]]:
    """The values of each switch that is a choice; a strategy that was registered is one of them."""
    return {
        "device": ("auto", "cpu", "cuda", "rocm"),
        "dtype": ("auto", "fp32", "bf16", "fp16"),
        "amp": ("off", "bf16", "fp16"),
        "attention": ("auto", *ATTENTION),
        "prefill_attention": ("auto", *_for_prompts(ATTENTION)),
        "moe": ("auto", *EXPERTS),
        "prefill_moe": ("auto", *_for_prompts(EXPERTS)),
        "join": ("auto", "on", "off"),
        "kernels": ("torch", "triton"),
        "speculate": ("off", "mtp"),
        "memory": ("default", "expandable", "empty-cache"),
    }


def _for_prompts(table: Mapping[str, Strategy]) -> list[str]:
    """The names of those built for prompts. (`resolve` reports entries that are no strategy.)"""
    built = {name: getattr(each, "phases", Strategy.phases) for name, each in table.items()}
    return [name for name, phases in built.items() if "prefill" in phases]


@dataclass(frozen=True)
class Backend:
    """The switches. "auto" lets `resolve` choose by machine and model.

    The command line's flags have the same names, with dashes.
    """

    device: str = "auto"
    """Where it runs: cuda (NVIDIA), rocm (AMD) or cpu; auto takes a GPU where there is one."""
    dtype: str = "auto"
    """The dtype of weights and cache; auto: bf16 on a GPU that has it (else fp16), fp32 on a CPU
    or under amp."""
    amp: str = "off"
    """Autocast: weights stay fp32, matrix products run in this dtype."""
    compile: bool = False
    """torch.compile, one block at a time. With kernels=triton, which fuses a decode step's blocks
    by hand, only prompts are compiled."""
    cuda_graphs: bool = False
    """Capture the decode step in a CUDA graph."""
    prefill_graphs: bool = False
    """Capture prompts: one graph for each number of them and each length, rounded up to a few."""
    attention: str = "auto"
    """Attention of a decode step; auto: absorbed, or triton with kernels=triton."""
    prefill_attention: str = "auto"
    """Attention of a prompt; auto: expand."""
    moe: str = "auto"
    """Experts of a decode step; auto: gather for a few tokens, grouped for more, or triton with
    kernels=triton."""
    prefill_moe: str = "auto"
    """Experts of a prompt; auto: grouped, or triton where prefill_graphs can't have that."""
    join: str = "auto"
    """Store matrices that multiply the same input as one (q_a with kv_a, gate with up), and rotate
    queries and key in one call; auto: on."""
    memory: str = "default"
    """The GPU allocator's policy; expandable: segments that grow (fewer fragments are lost);
    empty-cache: memory that a prompt took is given back before decoding."""
    kernels: str = "torch"
    """triton: a decode step's blocks are r1/kernels' fused ones. attention=triton and moe=triton
    are a part of them."""
    tune: bool = False
    """Search the launch parameters of kernels=triton on this GPU, for the shapes that come, and
    keep them in a file."""
    speculate: str = "off"
    """mtp: the multi-token-prediction layer drafts tokens, and one step of the model verifies
    them."""
    draft_tokens: int = 1
    """How many tokens `speculate` drafts for a step; from the second on the MTP layer reads its own
    output."""

    def __post_init__(self) -> None:
        for name, values in choices().items():
            value = getattr(self, name)
            if value not in values:
                raise InputError(f"{name}={value!r}: choose {', '.join(values)}")
        for name in ("compile", "cuda_graphs", "prefill_graphs", "tune"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r}: choose True or False")
        drafts = self.draft_tokens
        if isinstance(drafts, bool) or not isinstance(drafts, int) or drafts < 1:
            raise InputError(f"draft_tokens={drafts!r}: give a whole number of at least 1")

    @property
    def step_tokens(self) -> int:
        """Tokens that a decode step reads of each row: the last one, and the drafts after it."""
        return 1 + (self.draft_tokens if self.speculate == "mtp" else 0)

    @property
    def compute(self) -> str:
        """The dtype that matrix products run in."""
        return self.dtype if self.amp == "off" else self.amp

    def describe(self) -> str:
        """The switches that differ from the defaults, as one would type them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {n: v for n, v in values.items() if v != getattr(Backend, n)}
        return ", ".join(n if v is True else f"{n}={v}" for n, v in changed.items()) or "all off"
