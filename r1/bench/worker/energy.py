"""The energy of decode steps, by the GPU's own counter.

NVIDIA's driver counts joules since it was loaded (NVML, nvmlDeviceGetTotalEnergyConsumption). The
counter moves some times a second, so steps are repeated for SECONDS.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch

from r1.bench.process import Answer
from r1.bench.worker import steps
from r1.bench.worker.subject import Subject
from r1.device import synchronize

SECONDS = 2.0
LIBRARY = "libnvidia-ml.so.1"


def meter(device: torch.device) -> Callable[[], float] | None:
    """A function that reads the joules so far. None where no such counter is found."""
    if device.type == "cpu" or torch.version.hip:
        return None
    try:
        library = ctypes.CDLL(LIBRARY)
        identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    except (OSError, AttributeError):  # no driver's library, or an older torch
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(identity, ctypes.byref(handle)):
        return None

    def read() -> float:
        status = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return float("nan") if status else millijoules.value / 1e3

    return None if read() != read() else read


def energy(subject: Subject) -> Answer:
    """Mean power of decode steps in watts, and joules of a token of all rows together."""
    w, read = subject.workload, None
    if subject.engine.drafter is None and subject.place.count == 1 and w.new > 1:
        read = meter(subject.device)
    if read is None:
        return {"mean_power_w": None, "joules_per_token": None}
    step = steps.next_turn(subject)
    step()  # a captured step is recorded by now
    tokens = 0
    synchronize(subject.device)
    start, before = time.perf_counter(), read()
    while True:
        subject.cache.lengths.fill_(w.depth + w.prompt)
        for _ in range(w.new - 1):
            step()
        tokens += w.batch * (w.new - 1)
        synchronize(subject.device)
        seconds = time.perf_counter() - start
        if seconds >= SECONDS:
            break
    joules = read() - before
    return {"mean_power_w": joules / seconds, "joules_per_token": joules / tokens}
