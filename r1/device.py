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


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all its work. A CPU has none pending."""
    if device.type != "cpu":
        torch.cuda.synchronize()
