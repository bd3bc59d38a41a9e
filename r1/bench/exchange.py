"""What devices that share a model exchange in a decode step: how long it takes, and the bytes.

The kernels are told by their names: NCCL's (RCCL's), torch's for symmetric memory, and ours. Their
own time includes waiting for the slowest device. What of it is exposed, no other kernel hides:
timeline.py says what each kernel adds to the step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from r1.bench.timeline import ON_GPU
from r1.bench.workload import Workload
from r1.device import DTYPES
from r1.model.config import Config
from r1.switches.backend import Backend

KERNELS = re.compile(r"nccl|all_reduce_kernel", re.IGNORECASE)


def busy_us(trace: dict[str, Any]) -> float:
    """Microseconds of these kernels in a Chrome trace, each from its start to its end.

    Where launches overlap, a kernel that started early waits for the one ahead of it: that counts.
    """
    events = (e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("cat") in ON_GPU)
    return float(sum(e["dur"] for e in events if KERNELS.search(e["name"])))


def exposed(parts: Sequence[dict[str, Any]]) -> float:
    """The share of a step that these kernels add to it, from its `timeline.parts`."""
    whole = sum(part["us"] for part in parts)
    return sum(part["us"] for part in parts if KERNELS.search(part["kernel"])) / (whole or 1)


def handed_bytes(config: Config, backend: Backend, tokens: int) -> int:
    """The most bytes that a device hands over in a step of so many tokens: its part of each sum,
    and of the logits. `backend` is resolved. A drafter's own are not counted.
    """
    itemsize = DTYPES[backend.compute].itemsize
    hidden, layers = tokens * config.hidden_size * itemsize, config.num_hidden_layers
    logits = 4 if backend.kernels == "triton" else itemsize
    parts, total = backend.tp * backend.ep, 0
    if parts > 1:  # a sum for the embedding, and one or two for each layer
        total += hidden * (1 + (layers // backend.pp) * (2 if backend.tp > 1 else 1))
        total += tokens * config.vocab_size // parts * logits
    if backend.pp > 1:  # a stage hands on hidden states, and the last one logits
        total += max(hidden, tokens * config.vocab_size * 4)
    return total


def fields(
    w: Workload, config: Config, backend: Backend, kernels: dict[str, Any]
) -> dict[str, Any]:
    """The fields of an arm's row, none for one device. `kernels`: what its process profiled."""
    if backend.ranks == 1:
        return {}
    nbytes = handed_bytes(config, backend, w.batch * backend.step_tokens)
    timed = {}
    if kernels["parts"] is not None:
        share = exposed(kernels["parts"])
        timed = {"exchange_ms": kernels["exchange_us"] / 1e3, "exchange_exposed": share}
    return {**timed, "exchange_mb": nbytes / 1e6}
