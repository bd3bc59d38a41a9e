"""What a launch must know of the machine, and the only place that launches kernels.

Nothing here assumes NVIDIA. A feature that only some chips have is a constant that kernels are
compiled with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
import triton
import triton.language as tl

LEAST_TILE = 16
"""The least rows of a product by `tl.dot`."""
Sizes = tuple[int, ...]
Choices = dict[str, tuple[int, ...]]


class Launch(Protocol):
    """A kernel's launch parameters: a frozen dataclass of whole numbers.

    Which values are possible depends on the chip and the sizes.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @staticmethod
    def default(sizes: Sizes, chip: Chip) -> Any:
        """Parameters that are good on any chip."""

    @property
    def choices(self) -> Choices:
        """Values worth a try, for each parameter that a search may change."""


AnyLaunch = TypeVar("AnyLaunch", bound=Launch)


@dataclass(frozen=True)
class Chip:
    """The facts by which launch parameters are chosen."""

    processors: int
    """Streaming multiprocessors, or compute units."""
    shared: int
    """Bytes of shared memory that one program may have."""
    dependent_launch: bool
    """True for Hopper and later NVIDIA chips. A kernel may start before the previous one has ended
    (programmatic dependent launch), and may prefetch into the second-level cache (prefetch.py)."""
    ptx: bool = False
    """True for NVIDIA chips from sm_89 on: their own instructions unpack numbers (packed.py)."""
    byte_products: bool = False
    """True for NVIDIA chips: one instruction adds up four products of bytes (fixed.py)."""
    tuned: dict[str, Launch] = field(default_factory=dict, compare=False)
    """By `key`: parameters that a search found here. Kernels without an entry use their default."""
    asked: dict[str, tuple[type[Launch], Sizes]] = field(default_factory=dict, compare=False)
    """By `key`: the launches so far, in their order."""
    defaults: dict[str, Launch] = field(default_factory=dict, compare=False)
    """By `key`: default parameters, kept because they take longer to compute than to look up."""

    @staticmethod
    @cache
    def of(device: torch.device) -> Chip:
        """The chip of a device. For the CPU, the one that Triton's interpreter imitates."""
        if device.type == "cpu":
            return Chip(processors=4, shared=2**17, dependent_launch=False)
        facts = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return Chip(facts.multi_processor_count, 2**16, dependent_launch=False)
        hopper = (facts.major, facts.minor) >= (9, 0)
        ptx = (facts.major, facts.minor) >= (8, 9)
        shared = facts.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in stubs
        return Chip(facts.multi_processor_count, shared, hopper, ptx, byte_products=True)

    def launch(self, kind: type[AnyLaunch], *sizes: int) -> AnyLaunch:
        """A kernel's launch parameters, for its sizes."""
        key = f"{kind.__name__} {' '.join(map(str, sizes))}"
        self.asked.setdefault(key, (kind, sizes))
        launch = self.tuned.get(key) or self.defaults.get(key)
        if launch is None:
            launch = self.defaults[key] = kind.default(sizes, self)
        return cast(AnyLaunch, launch)

    def run(
        self, kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, stages: int = 1,
        **constants: Any,
    ) -> None:  # fmt: skip
        """Launch `kernel` on `grid`: `warps` warps a program, loops pipelined `stages` deep."""
        early = {"launch_pdl": True} if self.dependent_launch else {}
        kernel[grid](
            *arguments, **constants, PDL=self.dependent_launch, num_warps=warps,
            num_stages=stages, **early,
        )  # fmt: skip


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel start, as soon as all programs of this one have called it.

    Call it first in small kernels. Call it after the wait in large ones, or waiting successors take
    their processors. Call it after the wait, too, where the next kernel reads before its own wait
    something that was written before this kernel.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait for all earlier kernels: after this call their outputs can be read.

    Before this call a kernel may not write. It may read only (a) weights, (b) what was finished
    before the last ordinary (non-overlapping) kernel, such as torch's, (c) outputs of a kernel
    whose successors could only start after its own wait.
    Every program of every kernel must call it. Only so does the wait reach back further than one
    kernel.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET=1 runs the kernels as Python."""


@triton.jit
def product(a, b, sums):
    """sums + a b, in fp32.

    The interpreter would multiply the bits of bf16 numbers. So it gets fp32, with the same result.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


def ceil_div(a: int, b: int) -> int:
    """How many pieces of b cover a."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`.

    Triton's tiles have such sizes, and tl.dot's are at least 16.
    """
    return max(least, 1 << (n - 1).bit_length())
