"""What a launch needs to know of the machine, and the one place that launches.

Nothing here assumes NVIDIA. What only some chips have is a constant that a kernel is compiled with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
import triton
import triton.language as tl

Sizes = tuple[int, ...]
Choices = dict[str, tuple[int, ...]]


class Launch(Protocol):
    """A kernel's launch parameters: a frozen dataclass of whole numbers. What they may be hangs on
    the chip and the sizes."""

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
    """Whether a kernel may start before the one ahead of it has ended (NVIDIA calls it programmatic
    dependent launch), and ask for bytes that nobody waits for (prefetch.py): Hopper, and what came
    later."""
    tuned: dict[str, Launch] = field(default_factory=dict, compare=False)
    """By `key`: parameters that tune.py found here. What isn't in it has its default."""
    asked: dict[str, tuple[type[Launch], Sizes]] = field(default_factory=dict, compare=False)
    """By `key`: what has been launched, in its order."""

    @staticmethod
    @cache
    def of(device: torch.device) -> Chip:
        """The chip of a device; the CPU's is that of Triton's interpreter."""
        if device.type == "cpu":
            return Chip(processors=4, shared=2**17, dependent_launch=False)
        found = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return Chip(found.multi_processor_count, 2**16, dependent_launch=False)
        hopper = (found.major, found.minor) >= (9, 0)
        shared = found.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in torch's stubs
        return Chip(found.multi_processor_count, shared, dependent_launch=hopper)

    def launch(self, kind: type[AnyLaunch], *sizes: int) -> AnyLaunch:
        """A kernel's launch parameters, for its sizes."""
        key = f"{kind.__name__} {' '.join(map(str, sizes))}"
        self.asked.setdefault(key, (kind, sizes))
        return cast(AnyLaunch, self.tuned.get(key) or kind.default(sizes, self))

    def run(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *arguments: Any,
        warps: int,
        stages: int = 1,
        **constants: Any,
    ) -> None:
        """Launch `kernel` on `grid`; `warps` of threads a program, loops pipelined `stages`
        deep."""
        early = {"launch_pdl": True} if self.dependent_launch else {}
        kernel[grid](
            *arguments,
            **constants,
            PDL=self.dependent_launch,
            num_warps=warps,
            num_stages=stages,
            **early,
        )


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel may be scheduled as soon as all programs of this one have come here.

    First of all, in kernels of small programs. Behind the wait in those that need much of a
    processor, where programs of the next kernel that wait would stand in the way of this one's; and
    where the next kernel reads before its own wait what is older than this one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Behind this, all that earlier kernels wrote can be seen. Before it nothing may be written,
    and only be read what was written ahead of an ordinary kernel, such as torch's (weights;
    positions, see runner.py), or ahead of one whose programs all let the next start behind their
    own wait.

    Each kernel must come here in every program: that is what makes the wait reach back further than
    one kernel."""
    if PDL:
        tl.extra.cuda.gdc_wait()


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET=1 runs the kernels as Python."""


@triton.jit
def product(a, b, sums):
    """sums + a b, in fp32. The interpreter multiplies the bits of bf16 numbers, so it gets wider
    ones, which is the same."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


def ceil_div(a: int, b: int) -> int:
    """How many pieces of b cover a."""
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The first power of two that is neither below n nor below `least`: Triton's tiles have such
    sizes, tl.dot's at least 16."""
    return max(least, 1 << (n - 1).bit_length())
