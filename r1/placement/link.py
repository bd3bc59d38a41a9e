"""The way from host memory to the device: pinned memory, and copies on a stream of their own.

On a CPU the same calls copy at once, so the code around them is the same.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from r1.errors import InputError

TOUCHING = 8
"""Threads that touch new memory."""
Event = torch.cuda.Event
"""A place in a stream's order, for which another stream can wait."""


class Pinned(mmap.mmap):
    """Anonymous memory that a GPU may copy from while the CPU goes on. Freed with its last tensor.

    torch's own pinned allocations are rounded up to a power of two, which would waste up to half.
    The system frees it too when the process is killed: there is no file.
    """

    address = 0

    def pin(self, address: int) -> None:
        """Raises InputError where the driver refuses."""
        if wrong := int(torch.cuda.cudart().cudaHostRegister(address, len(self), 0)):
            raise InputError(
                f"{len(self) / 1e9:.1f} GB of host memory can't be pinned for the GPU's copies "
                f"(the driver's error {wrong}): use a machine with more memory"
            )
        self.address = address

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.address and not ending():  # the end of the process frees it anyway
            torch.cuda.synchronize()  # a copy may be on its way
            torch.cuda.cudart().cudaHostUnregister(self.address)


def host_rows(count: int, width: int, device: torch.device) -> Tensor:
    """uint8 (count, width) of host memory, zero; pinned where `device` is a GPU.

    Raises InputError.
    """
    try:
        memory = Pinned(-1, max(1, count * width), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to pin
    except OSError as error:
        raise InputError(
            f"{count * width / 1e9:.1f} GB of host memory can't be had ({error.strerror}): use a "
            "machine with more memory"
        ) from None
    rows = torch.frombuffer(memory, dtype=torch.uint8)[: count * width].view(count, width)
    if device.type == "cuda" and count:
        touch(rows)
        memory.pin(rows.data_ptr())
    return rows


def touch(rows: Tensor) -> None:
    """Write zeros to memory that is zero already, so that the system provides its pages now.

    It clears each page at its first use. Pinning does that in one thread, at some 3 GB/s, and here
    are several: an R1 in 4 bit has 200 GB to pin.
    """
    with ThreadPoolExecutor(TOUCHING) as pool:
        list(pool.map(torch.Tensor.zero_, rows.view(-1).tensor_split(TOUCHING)))


class Link:
    """Copies from host memory to one device, in order, beside the device's arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.device = device
        self.cut: Callable[[Callable[[], None]], None] | None = None
        """While a step is recorded in pieces (run/pieces.py): ends one. The host does what it is
        given before each run of the next piece."""

    def copying(self) -> AbstractContextManager[object]:
        """`copy` is to be called within this. Its torch calls are on the copies' stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def copy(self, target: Tensor, source: Tensor, after: Event | None) -> None:
        """Copy a row from pinned memory, once `after` has happened on the device."""
        if self.stream is not None and after is not None:
            self.stream.wait_event(after)
        target.copy_(source, non_blocking=True)

    def arrival(self) -> Event | None:
        """Happens when all copies so far have arrived."""
        return None if self.stream is None else self.stream.record_event()

    def now(self) -> Event | None:
        """Happens when the device's arithmetic has come to this point."""
        stream = self.stream and torch.cuda.current_stream(self.device)
        return stream.record_event() if stream else None

    def ask(self, numbers: Tensor) -> Callable[[], Tensor]:
        """Ask for some numbers of the device. What is returned waits for them, and gives them on
        the host. It waits in a loop: that is quicker than being woken, and the link has nothing to
        do meanwhile.
        """
        there, event = numbers.to("cpu", non_blocking=True), self.now()  # pinned

        def read() -> Tensor:
            if event is not None:
                event.synchronize()
            return there

        return read

    def host(self, like: Tensor) -> Tensor:
        """Host memory of a tensor's shape, pinned where there is a GPU."""
        return torch.empty_like(like, device="cpu", pin_memory=self.stream is not None)

    def wait(self, event: Event | None) -> None:
        """The device's arithmetic goes on when `event` has happened. The CPU does not wait."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def begin(self) -> None:
        """Copies start after what the device has been asked to do so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
