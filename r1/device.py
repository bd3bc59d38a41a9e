"""The device that runs the model: its name in torch, its dtypes, its free memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes by their names on the command line."""


def torch_device(name: str) -> torch.device:
    """Torch's device for "cpu", "cuda" or "rocm". Torch calls ROCm "cuda" too."""
    return torch.device("cpu" if name == "cpu" else "cuda")


def available_bytes(device: torch.device) -> int:
    """Free memory in bytes: the GPU's, or the host's within the limit of its cgroup."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
        cgroup = Path("/sys/fs/cgroup")
        limit, used = (
            int((cgroup / name).read_text()) for name in ("memory.max", "memory.current")
        )
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        page_cache = int(stat["inactive_file"])  # the kernel frees it on demand
        available = min(available, limit - used + page_cache)
    except (OSError, KeyError, ValueError):
        pass  # not Linux, no cgroup, or no limit ("max"): keep the best estimate so far
    return available


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Where the user may have set torch's allocator, the first one before the others."""


def grow_segments() -> None:
    """Let torch's allocator take GPU memory in segments that grow.

    This stays so for the process, and for all that it allocates later: torch has one allocator, a
    MemPool follows its settings, and those of a running process should not go to and fro. Setting
    it takes back what was set before, so the user's own settings are given again. (torch 2.10 does
    not tell them, so they are taken from the environment.)
    """
    read = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    before = read() if read else next(filter(None, map(os.environ.get, ALLOCATOR)), "")
    torch._C._accelerator_setAllocatorSettings(f"{before},expandable_segments:True".lstrip(","))


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all its work. A CPU has none pending."""
    if device.type != "cpu":
        torch.cuda.synchronize()
