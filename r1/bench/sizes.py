"""Check a workload's sizes before anything is made: the context, and the memory."""

from __future__ import annotations

from dataclasses import replace

from r1.bench.workload import Workload
from r1.build import HEADROOM, weight_bytes
from r1.device import available_bytes, torch_device
from r1.errors import InputError, setting
from r1.footprint import Sizes, footprint
from r1.model.config import Config
from r1.roofline import model_of
from r1.run.runner import round_capacity
from r1.switches.backend import Backend

TOKEN = 64
"""Bytes of a prompt's or an answer's token: a Python number, its places in lists, and tensors."""


def check_sizes(
    w: Workload, config: Config, backend: Backend, *, loaded: bool = False, draft: int = 0,
    free: int | None = None,
) -> None:  # fmt: skip
    """Raise InputError if the workload is longer than the context, or can't fit the memory.

    `backend` is resolved. `loaded`: the weights are in the memory already. The estimate
    (footprint.py) may be a little too small, so a workload that passes may still be refused later.
    `draft`: bytes of one token in a draft model's cache. `free`: what the device has, if that is
    not what is free here and now.
    """
    context = config.max_position_embeddings
    if w.tokens > context:
        sizes = f"--depth, --prompt and --new are {w.tokens} tokens together"
        raise InputError(f"{sizes}, more than the context of {config.context}: take fewer")
    mtp = backend.speculate == "mtp"
    weights = 0
    if not loaded:
        weights = weight_bytes(config, backend, mtp=mtp) + HEADROOM
    needed = work_bytes(w, config, backend, draft)
    available = available_bytes(torch_device(backend.device)) if free is None else free
    if weights > available:
        raise _too_large(w, config, backend, weights, available)
    if available < weights + needed:
        beside = f" beside the model's {weights / 1e9:.1f} GB" if weights else ""
        raise InputError(
            f"--batch {w.batch} of {w.tokens} tokens needs {needed / 1e9:.1f} GB{beside} and "
            f"{backend.device} has {available / 1e9:.1f} GB free: use a smaller one, or fewer "
            "tokens"
        )


def _too_large(
    w: Workload, config: Config, backend: Backend, needed: int, available: int
) -> InputError:
    """The error of a baseline that does not fit, with advice that changes the baseline.

    The switch of an arm does not: of --quant only "auto" counts, which keeps a checkpoint's format.
    """
    could = {("dtype", "bf16"): replace(backend, dtype="bf16")} if backend.dtype == "fp32" else {}
    if kind := config.files.kind:
        could["quant", "auto"] = replace(backend, quant=kind)
    advice = [
        setting(*switch)
        for switch, smaller in could.items()
        if weight_bytes(config, smaller) + HEADROOM <= available
    ]
    advice += [setting("layers", "N")] if w.model is None else []
    return InputError(
        f"the model of the baseline needs {needed / 1e9:.1f} GB in {backend.dtype} and "
        f"{backend.device} has {available / 1e9:.1f} GB free: use "
        f"{' or '.join([*advice, 'a larger machine'])}"
    )


def work_bytes(w: Workload, config: Config, backend: Backend, draft: int = 0) -> int:
    """The bytes of the cache, the tokens, and what a prompt and a step make on the way.

    Of the latter, what exceeds HEADROOM. `draft`: see check_sizes.
    """
    model = model_of(config, backend, backend.speculate == "mtp")
    needed = footprint(model, backend, Sizes(w.batch, w.prompt, w.new, w.depth), weights=1)
    drafts = w.batch * round_capacity(w.tokens) * draft
    tokens = w.batch * w.tokens * TOKEN
    return needed.cache + drafts + tokens + max(0, needed.beside - HEADROOM)
