"""The device by torch's name: its dtypes, its free memory, waiting for it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The names of dtypes on the command line."""


def torch_device(name: str) -> torch.device:
    """ "cpu", "cuda" or "rocm" as torch's device: ROCm answers to "cuda"."""
    return torch.device("cpu" if name == "cpu" else "cuda")


def available_bytes(device: torch.device) -> int:
    """Memory that can still be had, in bytes: the GPU's free memory, or the host's within its
    cgroup's limit."""
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
        available = min(
            available, limit - used + int(stat["inactive_file"])
        )  # page cache gives way
    except (OSError, KeyError, ValueError):
        pass  # not Linux, no cgroup, or no limit ("max"): what we have is the best known
    return available


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given; a CPU has."""
    if device.type != "cpu":
        torch.cuda.synchronize()
