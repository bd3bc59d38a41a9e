"""The commands of the reference's process: build it, write its text, measure the rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from safetensors.torch import save_file

from r1 import build
from r1.bench import parity
from r1.bench.process import Answer
from r1.bench.rates import measure_rates
from r1.bench.upcast import upcast
from r1.bench.worker import steps
from r1.bench.worker.reading import REFERENCE, ROUNDING
from r1.bench.worker.rounding import as_tensors, measure_rounding
from r1.bench.worker.subject import Subject
from r1.device import available_bytes, torch_device
from r1.placement.mesh import Mesh
from r1.switches.resolve import resolve


def build_reference(subject: Subject) -> Answer:
    """Build the fp32 eager model.

    If fp32 weights do not fit the memory, it has bf16 weights and computes in fp32.
    """
    w = subject.workload
    config = w.config()
    backend = resolve(subject.backend, config, batch=w.batch)
    needed = build.weight_bytes(config, backend) + 2 * build.HEADROOM
    if needed < available_bytes(torch_device(backend.device)):
        return subject.build()
    subject.backend = dataclasses.replace(subject.backend, dtype="bf16")
    built = subject.load()
    upcast(subject.engine.model)
    steps.cache_in_fp32(subject)
    subject.prepare()
    return built


def write_reference(subject: Subject, switches: Iterable[str]) -> Answer:
    """The command "reference": continue the prompts greedily, and keep tokens and logits.

    Also keeps what rounding does to them, by each of the `switches` that make arms round. Answers
    how many different experts a MoE layer uses in a step.
    """
    w = subject.workload
    rows, compared = parity.rows_and_steps(w.batch, w.new, subject.engine.config.vocab_size)
    kept, text = [], []
    logits = steps.prefill(subject)  # (B, W)
    with steps.counted_experts(subject) as hits:
        for step in range(max(w.new, 2)):
            if step in compared:
                kept.append(logits[:rows].cpu())
            text.append(logits.argmax(dim=-1))
            if step + 1 < max(w.new, 2):
                logits = steps.decode(subject, text[-1][:, None])[:, -1]
    reference = {
        "tokens": torch.stack(text[: w.new]).cpu(),
        "steps": torch.tensor(compared),
        "logits": torch.stack(kept),
    }
    made = {switch: measure_rounding(subject, switch, reference) for switch in switches}
    if subject.place.leads:
        save_file(reference, subject.folder / REFERENCE)
        save_file(as_tensors(made), subject.folder / ROUNDING)
    every = [n for each in subject.engine.mesh.gather(hits) for n in each]  # of all stages
    return {"experts_hit": sum(every) / len(every) if every else 0.0}


def rates(
    subject: Subject,
    dtypes: Iterable[str],
    link: bool = False,
    disk: bool = False,
    ram: bool = False,
) -> Answer:
    """The machine's measured copy bandwidth and matmul rate, by dtype; with `link`, that of copies
    from host memory too; with `disk`, that of reads of the checkpoint's files; with `ram`, of host
    memory. Devices that share the model copy from host memory at a time: of the slowest link.
    """
    files, device = subject.workload.model if disk else None, subject.connect()
    asked = subject.backend
    mesh = Mesh.here(asked.tp, asked.ep, device.type, asked.pp)
    measured = measure_rates(device, dtypes, link, files, ram, meet=lambda: mesh.gather(None))
    slowest = min(mesh.gather(min(each.link for each in measured.values())))
    if device.type != "cpu":
        torch.cuda.empty_cache()  # a model that is made then has all that is free
    return {dtype: vars(each) | {"link": slowest} for dtype, each in measured.items()}
