"""The machine's ceilings, measured: copy bandwidth, matrix products, launches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from r1.device import DTYPES, synchronize
from r1.roofline import Work


@dataclass(frozen=True)
class Rates:
    """This machine's measured rates."""

    copy: float
    """Bytes per second of a large copy, read and written."""
    matmul: float
    """FLOP per second of a large matrix product."""
    launch: float
    """Seconds that one more tiny kernel costs in eager mode; 0 on a CPU."""
    replay: float
    """The same inside a CUDA graph."""

    def seconds(self, work: Work) -> float:
        """The floor for one step: bytes or operations, whichever takes longer."""
        return max(work.nbytes / self.copy, work.flops / self.matmul)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB (a CPU: 128 MiB)."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def measure_rates(device: torch.device, dtypes: Iterable[str]) -> dict[str, Rates]:
    """Measure the device, matrix products in each of `dtypes` ("bf16", ...); some seconds."""
    gpu, copy = device.type == "cuda", copy_rate(device)
    size = 8192 if gpu else 1024
    matmul = {}
    for dtype in dtypes:
        square = torch.randn(size, size, dtype=torch.float32, device=device).to(DTYPES[dtype])
        matmul[dtype] = 2 * size**3 / _best(partial(torch.mm, square, square), device)
    launch, replay = _launches(device) if gpu else (0.0, 0.0)
    return {dtype: Rates(copy, rate, launch, replay) for dtype, rate in matmul.items()}


def _launches(device: torch.device) -> tuple[float, float]:
    """Seconds of one more tiny kernel, eager and inside a graph."""
    tiny = torch.zeros(1, dtype=torch.float32, device=device)

    def many() -> None:
        for _ in range(1000):
            tiny.add_(1)

    graph = torch.cuda.CUDAGraph()
    many()
    with torch.cuda.graph(graph):
        many()
    return _best(many, device) / 1000, _best(graph.replay, device) / 1000


def bottleneck(
    work: Work, rates: Rates, kernels: int | None, captured: bool, seconds: float
) -> str:
    """The bound of a step of `seconds`: the largest of memory, compute and launches.

    Launches take kernels x gap. On a CPU they are not counted, and time that memory and compute do
    not explain is the framework's.
    """
    parts = {"memory": work.nbytes / rates.copy, "compute": work.flops / rates.matmul}
    if kernels is not None:
        parts["launches"] = kernels * (rates.replay if captured else rates.launch)
    elif max(parts.values()) < seconds / 2:
        return "framework"
    return max(parts, key=lambda name: parts[name])


def _best(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Seconds of the fastest of some calls: a ceiling is not an average."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])
