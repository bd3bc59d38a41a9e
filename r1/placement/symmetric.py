"""Sums over memory that GPUs map of each other, without NCCL: for small sums it takes too long.

Each rank of a group has a buffer that the other ranks can read and write (torch's symmetric memory,
torch.distributed._symmetric_memory, over NVLink or PCIe). It is made once, when the model is made,
so a CUDA graph can hold the sums. NVLink's multicast is not used.

`SymmetricSum` calls torch's own kernels. r1/kernels/allreduce.py has one of ours.

Shapes: ... any leading dimensions.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from r1.errors import InputError, setting
from r1.placement.collectives import Group, Sum
from r1.placement.mesh import Mesh

KB, MB = 2**10, 2**20

LIMITS: dict[str, dict[int, int]] = {
    "symm one-shot": {2: 256 * KB, 4: 128 * KB, 8: 64 * KB},
    "symm two-shot": {2: 32 * MB, 4: 32 * MB, 8: 32 * MB},
    "triton": {2: 1 * MB, 4: 512 * KB, 8: 256 * KB},
}
"""By the most ranks of a group: up to how many bytes of a rank's part each kernel is used.

A larger sum takes the next kernel of its switch, and in the end NCCL's. One-shot: every rank sends
its whole part to all others, which is quickest while the bytes are few. Two-shot: each rank adds up
one share and hands it on, so fewer bytes travel, in two crossings. Two H100s were measured; the
columns for more ranks keep about the same bytes on a rank's links."""


def limit(kernel: str, ranks: int) -> int:
    """Bytes of a rank's part up to which `kernel` is used by so many ranks; 0 where never."""
    return next((most for count, most in LIMITS[kernel].items() if ranks <= count), 0)


class MappedSum(Sum):
    """Adds up what the ranks made, where the sum is small enough; a larger one is NCCL's.

    The base of the two kinds. Compiled code holds it as one operator.
    """

    most = 0
    """The bytes of the largest sum that `small` takes."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.key = f"{type(self).__name__} {id(self)}"
        _live[self.key] = self

    def __call__(self, y: Tensor) -> Tensor:
        """(...) on each rank -> the sum, (...), on every rank, in the same dtype."""
        if torch.compiler.is_compiling():
            summed: Tensor = _all_reduce(y, self.key)
            return summed
        return self.now(y)

    def now(self, y: Tensor) -> Tensor:
        y = y.contiguous()
        if y.nbytes > self.most or y.nbytes % 16:
            return super().__call__(y)
        return self.small(y)

    def small(self, y: Tensor) -> Tensor:
        """The sum of a contiguous y, of at most `most` bytes, a multiple of 16."""
        raise NotImplementedError


_live: WeakValueDictionary[str, MappedSum] = WeakValueDictionary()
"""By key: operators take tensors and strings, as torch's own take a group's name."""


@torch.library.custom_op("r1::all_reduce", mutates_args=())
def _all_reduce(y: Tensor, key: str) -> Tensor:
    return _live[key].now(y)


@_all_reduce.register_fake
def _(y: Tensor, key: str) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


class SymmetricSum(MappedSum):
    """torch's kernels, for fp32 and bf16 and 2, 4 or 8 ranks."""

    def __init__(self, group: Group) -> None:
        """Every rank of the group calls it. Raises RuntimeError where memory can't be mapped."""
        super().__init__(group)
        ranks = dist.get_world_size(group)
        self.one_shot = limit("symm one-shot", ranks)
        self.most = limit("symm two-shot", ranks)
        self.buffer, self.handle = share(self.most, group)

    def small(self, y: Tensor) -> Tensor:
        ours = self.buffer[: y.nbytes].view(y.dtype).view(y.shape)
        if y.nbytes <= self.one_shot:
            summed: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(ours, y, "sum", self.name)
            return summed
        ours.copy_(y)
        summed = torch.empty_like(y)
        torch.ops.symm_mem.two_shot_all_reduce_out(ours, "sum", self.name, summed)
        return summed


def share(nbytes: int, group: Group) -> tuple[Tensor, Any]:
    """A buffer, uint8 (nbytes,), that the group's ranks map, and torch's handle of all of them.

    Every rank of the group calls it. Raises RuntimeError where memory can't be mapped.
    """
    from torch.distributed import _symmetric_memory  # some builds of torch lack it

    device = torch.device("cuda", torch.cuda.current_device())
    with device:  # not on the meta device, on which a model is sketched
        buffer = _symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
        return buffer, _symmetric_memory.rendezvous(buffer, group)


def connect(mesh: Mesh, group: Group, kind: str, make: Callable[[Group], Sum]) -> Sum:
    """`make(group)` on every rank of the mesh; `kind` is the switch's value.

    Returns when all of them have theirs. Raises InputError on every rank where some can't map each
    other's memory.
    """
    host, device = socket.gethostname(), torch.cuda.current_device()
    places = mesh.gather((host, device))
    others = [places[rank] for rank in dist.get_process_group_ranks(group)]
    instead = f"use {setting('allreduce', 'nccl')}"

    def one() -> Sum:
        why = why_not(host, device, others)
        try:
            if why is None:
                return make(group)
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
        asked = setting("allreduce", kind)
        raise InputError(f"{asked} maps other GPUs' memory, which can't be had ({why}): {instead}")

    return mesh.together(one)


def why_not(host: str, device: int, others: list[tuple[str, int]]) -> str | None:
    """Why GPU `device` of `host` can't map the memory of these (host, device); None if it can."""
    hosts = {name for name, _ in others}
    if len(hosts) > 1:
        return f"the ranks are on {len(hosts)} hosts ({', '.join(sorted(hosts))})"
    if len(set(others)) < len(others):
        return f"several ranks of {host} have the same GPU"
    seen = torch.cuda.device_count()  # a process may see its own only
    for _, other in others:
        known = other != device and max(device, other) < seen
        if known and not torch.cuda.can_device_access_peer(device, other):
            return f"GPU {device} of {host} has no way to GPU {other}"
    return None
