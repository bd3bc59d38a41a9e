"""The ways to add up what devices that share a layer made: one table, for the switch `allreduce`.

A new way is one class, with a `Sum` (r1/placement/collectives.py) for each group of ranks, and one
entry here. Its name is then a value of the switch.
"""

from __future__ import annotations

from r1.errors import setting
from r1.placement.collectives import Group, Sum
from r1.placement.mesh import Mesh
from r1.placement.symmetric import LIMITS, SymmetricSum, connect
from r1.switches.machine import Machine

OFF = "off"
"""The switch's value where no devices share a layer."""
MOST = max(LIMITS["triton"])
"""The most ranks that can map each other's memory here: the GPUs of one host."""


class AllReduce:
    """torch.distributed's own sum, by the engine that connects processes of this kind of device."""

    def __init__(self, name: str, device: str) -> None:
        """`device`: "cpu" or "gpu"."""
        self.name, self.device = name, device

    def why_not(self, machine: Machine, ranks: int, dtype: str) -> str | None:
        """Why it can't add up numbers of `dtype` on `ranks` devices; None if it can.

        `machine` has no GPU where device=cpu.
        """
        here = "gpu" if machine.cuda else "cpu"
        if self.device == here:
            return None
        other = {"cpu": "gloo", "gpu": "nccl"}[here]
        sums = {"cpu": "it adds up on CPUs", "gpu": "it adds up on GPUs"}[self.device]
        runs = "this runs on a CPU" if here == "cpu" else "this runs on a GPU"
        return f"{sums}, and {runs}: use {setting('allreduce', other)}"

    def sum(self, mesh: Mesh, group: Group) -> Sum:
        """A group's sum. Every rank of the mesh calls it alike. Raises InputError."""
        return Sum(group)


class Symmetric(AllReduce):
    """torch's kernels over memory that GPUs map of each other."""

    counts: tuple[int, ...] = (2, 4, 8)

    def why_not(self, machine: Machine, ranks: int, dtype: str) -> str | None:
        if why := super().why_not(machine, ranks, dtype):
            return why
        instead = f"use {setting('allreduce', 'nccl')}"
        if dtype == "fp16":
            return f"torch's kernels for mapped memory add up fp32 and bf16, not fp16: {instead}"
        if ranks not in self.counts:
            shared = f"2, 4 or 8 devices that share a layer, not for {ranks}"
            return f"torch's kernels for mapped memory are for {shared}: {instead}"
        return None

    def sum(self, mesh: Mesh, group: Group) -> Sum:
        return connect(mesh, group, self.name, SymmetricSum)


class OneShot(AllReduce):
    """One kernel of ours over the same memory."""

    def why_not(self, machine: Machine, ranks: int, dtype: str) -> str | None:
        if why := super().why_not(machine, ranks, dtype) or machine.why_not("triton"):
            return why
        instead = f"use {setting('allreduce', 'nccl')}"
        if machine.hip:
            return f"its kernel counts on how NVIDIA's GPUs see each other's writes: {instead}"
        if ranks > MOST:
            return f"its kernel is for up to {MOST} devices that share a layer: {instead}"
        return None

    def sum(self, mesh: Mesh, group: Group) -> Sum:
        from r1.kernels.allreduce import OneShotSum  # Triton is optional

        return connect(mesh, group, self.name, OneShotSum.of)


ALLREDUCE: dict[str, AllReduce] = {
    each.name: each
    for each in (
        AllReduce("gloo", "cpu"),
        AllReduce("nccl", "gpu"),
        Symmetric("symm", "gpu"),
        OneShot("triton", "gpu"),
    )
}
"""For `allreduce`. The first that a kind of device can do is what "auto" takes."""


def choose(asked: str, machine: Machine, ranks: int, dtype: str) -> tuple[str, str | None]:
    """What really adds up, and why that which is `asked` can't; the reason is None where it can.

    `ranks` is how many devices share a layer. One alone has nothing to add up: that is OFF.
    """
    if ranks == 1:
        if asked in ("auto", OFF):
            return OFF, None
        shares = f"use {setting('tp', 2)} or more (or {setting('ep')}), or leave it out"
        return asked, f"it adds up what devices that share a layer made, and here none do: {shares}"
    if asked == OFF:
        return asked, "devices that share a layer have to add up what they made: leave it out"
    if asked == "auto":
        reasons = {name: each.why_not(machine, ranks, dtype) for name, each in ALLREDUCE.items()}
        return next(name for name, why in reasons.items() if why is None), None
    return asked, ALLREDUCE[asked].why_not(machine, ranks, dtype)
