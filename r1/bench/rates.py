"""The machine's ceilings, measured: copies, matrix products, launches, the link, the drive."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from r1.device import DTYPES, synchronize
from r1.files.direct import Files, Range
from r1.placement.link import Link, host_rows
from r1.placement.sources import THREADS
from r1.roofline import Work

SPAN, SPANS = 2**24, 256
"""Bytes of one read where a drive is measured, about those of an expert, and the most reads."""


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

    link: float = 0.0
    """Bytes per second of copies from pinned host memory; 0: not measured."""

    disk: float = 0.0
    """Bytes per second of reads of the checkpoint's files; 0: not measured.

    Measured at the start. A row takes the rate of its own reads, where there are some
    (worker/fetching.py).
    """

    ram: float = 0.0
    """Bytes per second of host memory, read by torch's threads; 0: not measured."""

    def seconds(self, work: Work) -> float:
        """The floor for one step: bytes or operations, whichever takes longest."""
        host = work.host_bytes / self.ram if self.ram else 0.0
        fetched = work.link_bytes / self.link if self.link else 0.0
        read = work.disk_bytes / self.disk if self.disk else 0.0
        return max(work.nbytes / self.copy, work.flops / self.matmul, fetched, read, host)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB (a CPU: 128 MiB)."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def link_rate(device: torch.device, meet: Callable[[], object] = lambda: None) -> float:
    """Bytes a second from pinned host memory, in copies of 16 MiB, as large as experts are.

    Where processes share a model, all copy at a time: `meet` waits for all of them.
    """
    count = 64 if device.type == "cuda" else 8
    rows, link = host_rows(count, 2**24, device), Link(device)
    places = torch.zeros(rows.shape, dtype=torch.uint8, device=device)

    def copy() -> None:
        for place, row in zip(places, rows, strict=True):
            link.copy(place, row, None)

    return rows.nbytes / _best(copy, device, meet=meet)


def ram_rate(size: int = 2**30) -> float:
    """Bytes a second of so many in host memory, each read once by the threads that torch has."""
    memory = torch.ones(size // 4, dtype=torch.float32)
    return memory.nbytes / _best(memory.sum, torch.device("cpu"))


def disk_rate(folder: str | Path) -> float:
    """Bytes a second of a folder's safetensors, read as experts are (files/direct.py), no model.

    Any parts of them, in any order.
    """
    sizes = {path: path.stat().st_size for path in sorted(Path(folder).glob("*.safetensors"))}
    spans: list[Range] = [
        (path, start, min(start + SPAN, size))
        for path, size in sizes.items()
        for start in range(0, size, SPAN)
    ]
    random.Random(0).shuffle(spans)
    spans, files = spans[:SPANS], Files(sizes)

    def read(span: Range) -> None:
        files.read([span])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, spans[:THREADS]))  # each thread gets its memory
        start = time.perf_counter()
        list(pool.map(read, spans))
        seconds = time.perf_counter() - start
    return sum(stop - first for _, first, stop in spans) / seconds


def measure_rates(
    device: torch.device,
    dtypes: Iterable[str],
    link: bool = False,
    files: str | None = None,
    ram: bool = False,
    meet: Callable[[], object] = lambda: None,
) -> dict[str, Rates]:
    """Measure the device, matrix products in each of `dtypes` ("bf16", ...); some seconds.

    With `link`, copies from host memory too; reads of the folder `files`, if there is one; and with
    `ram` of host memory. `meet`: see link_rate.
    """
    gpu, copy = device.type == "cuda", copy_rate(device)
    size = 8192 if gpu else 1024
    matmul = {}
    for dtype in dtypes:
        square = torch.randn(size, size, dtype=torch.float32, device=device).to(DTYPES[dtype])
        matmul[dtype] = 2 * size**3 / _best(partial(torch.mm, square, square), device)
    launch, replay = _launches(device) if gpu else (0.0, 0.0)
    host = link_rate(device, meet) if link else 0.0
    disk = disk_rate(files) if files else 0.0
    read = ram_rate(2**30 if gpu else 2**27) if ram else 0.0
    more = (launch, replay, host, disk, read)
    return {dtype: Rates(copy, rate, *more) for dtype, rate in matmul.items()}


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
    """The bound of a step of `seconds`: the largest of memory, compute, launches, link, disk and
    the host's memory.

    Launches take kernels x gap. On a CPU they are not counted, and time that memory and compute do
    not explain is the framework's.
    """
    parts = {"memory": work.nbytes / rates.copy, "compute": work.flops / rates.matmul}
    if kernels is not None:
        parts["launches"] = kernels * (rates.replay if captured else rates.launch)
    if work.link_bytes and rates.link:
        parts["link"] = work.link_bytes / rates.link
    if work.disk_bytes and rates.disk:
        parts["disk"] = work.disk_bytes / rates.disk
    if work.host_bytes and rates.ram:
        parts["host"] = work.host_bytes / rates.ram
    if kernels is None and max(parts.values()) < seconds / 2:
        return "framework"
    return max(parts, key=lambda name: parts[name])


def _best(
    call: Callable[[], object], device: torch.device, repeats: int = 10,
    meet: Callable[[], object] = lambda: None,
) -> float:  # fmt: skip
    """Seconds of the fastest of some calls: a ceiling is not an average. `meet` comes before each
    of them.
    """
    times = []
    for _ in range(repeats):
        synchronize(device)
        meet()
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])
