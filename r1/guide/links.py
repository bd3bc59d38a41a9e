"""What moves between memories: from host memory or a drive to the device, and between devices.

bench.py measures the same rates (r1/bench/rates.py). Here they come from published figures. A rate
that has no source is not there, and what needs it is not expected (`only_floor`).
"""

from __future__ import annotations

from dataclasses import replace

from r1 import roofline
from r1.bench.rates import Rates
from r1.guide.gpus import MEASURED, Gpu, all_gpus
from r1.guide.setup import Setup
from r1.model.config import Config
from r1.placement.symmetric import limit
from r1.roofline import Work
from r1.switches.backend import Backend

LEAST_STEP_GB = 0.1
"""A step that reads less waits for launches, not for memory: it says nothing about larger ones."""


def host_rate(gpu: Gpu) -> float:
    """Bytes a second of copies from host memory; 0 where the link is not known."""
    measured = all_gpus()[MEASURED].figures
    share = measured["host_copy_gb_s"] / measured["host_link_gb_s"]
    return (gpu.get("host_link_gb_s") or 0.0) * 1e9 * share


def with_fetches(setup: Setup, work: Work, experts_hit: float, slots: int) -> Work:
    """A step's work, and the experts that it copies to the device and reads from files.

    Routing is even: slots hold their share of what is visited (roofline.fetched_bytes), and host
    memory its share of what slots lack.
    """
    if not setup.streams:
        return work
    ep = setup.backend.ep
    here = setup.config.experts.n_routed_experts // ep  # experts of a device
    found = slots / here
    link = roofline.fetched_bytes(setup.config, setup.on_device, experts_hit, slots, found)
    from_files = setup.places.experts == "disk" and slots < here
    missed = 1 - min(1.0, setup.cached() / ep / (here - slots)) if from_files else 0.0
    read = link * missed * setup.file_bytes / setup.expert_bytes
    return replace(work, link_bytes=link, disk_bytes=read)


def parts_ms(setup: Setup, work: Work, rates: Rates, tokens: int) -> dict[str, float]:
    """What each part of the machine takes for a step of so many tokens, at the least.

    Those that work at the same time: the floor is the largest. Sums between devices come on top.
    """
    parts = {"memory": work.nbytes / rates.copy, "arithmetic": work.flops / rates.matmul}
    if rates.link:
        parts["host link"] = work.link_bytes / rates.link
    if rates.disk:
        parts["drive"] = work.disk_bytes / rates.disk
    sums = exchange_seconds(setup.config, setup.backend, setup.gpu, tokens)
    parts["sums between GPUs"] = sums or 0.0
    return {name: 1e3 * seconds for name, seconds in parts.items() if seconds}


def exchange_seconds(config: Config, backend: Backend, gpu: Gpu, tokens: int) -> float | None:
    """The sums of one call: two in each layer, of every token's hidden state. None: not known.

    A sum takes the latency, which is less for small sums with allreduce=triton, and 2 (n - 1) / n
    of its bytes over one direction of the link. Where only the link's bandwidth is published, the
    latency is the one measured on an H100.
    """
    n = backend.tp * backend.ep
    if n == 1:
        return 0.0
    nbytes = tokens * config.hidden_size * 2
    link, latency = gpu.get("link_both_ways_gb_s"), sum_latency_us(gpu)
    if backend.allreduce == "triton" and nbytes <= limit("triton", n):
        latency = sum_latency_us(gpu, "link_kernel_latency_us")
    if not link or not latency or n > gpu.linked:
        return None
    moving = 2 * (n - 1) / n * nbytes / (link * 1e9 / 2)
    return 2 * config.num_hidden_layers * (latency / 1e6 + moving)


def sum_latency_us(gpu: Gpu, figure: str = "link_latency_us") -> float | None:
    """Of one small sum, in microseconds: the machine's own, or that of the one measured."""
    return gpu.get(figure) or all_gpus()[MEASURED].get(figure)


def only_floor(setup: Setup, work: Work) -> str | None:
    """Why no time can be expected of this step, whatever was measured; None if one can."""
    if work.nbytes < LEAST_STEP_GB * 1e9:
        least = f"less than {LEAST_STEP_GB:g} GB"
        return f"a step reads {least}, so it waits for launches, and no such row is kept"
    if setup.hosts > 1:
        return f"{setup.hosts} hosts are needed, and the network between them has no figure here"
    if exchange_seconds(setup.config, setup.backend, setup.gpu, 1) is None:
        return "these GPUs talk through the host, and the time of a sum that way was not measured"
    return None
