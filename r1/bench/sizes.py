"""Check a workload's sizes before anything is made: the context, and the memory."""

from __future__ import annotations

from dataclasses import replace

from r1.bench.workload import Workload
from r1.build import HEADROOM, weight_bytes
from r1.device import DTYPES, available_bytes, torch_device
from r1.errors import InputError, setting
from r1.model.cache import bytes_per_token
from r1.model.config import Config
from r1.switches.backend import Backend
from r1.switches.strategies import attention_of

TOKEN = 64
"""Bytes of a prompt's or an answer's token: a Python number, its places in lists, and tensors."""


def check_sizes(
    w: Workload, config: Config, backend: Backend, *, loaded: bool = False, draft: int = 0
) -> None:
    """Raise InputError if the workload is longer than the context, or can't fit the memory.

    `backend` is resolved. `loaded`: the weights are in the memory already. The estimate leaves out
    activations, so a workload that passes may still be refused later. `draft`: bytes of one token
    in a draft model's cache.
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
    available = available_bytes(torch_device(backend.device))
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
    """The bytes of the cache, the tokens, and the logits of a step. `draft`: see check_sizes."""
    layers = -(-config.num_hidden_layers // backend.pp) + (backend.speculate == "mtp")
    entry = attention_of(config.attention)[backend.attention].entry(config.attention)
    per_token = bytes_per_token(entry, DTYPES[backend.dtype], layers) + draft
    cache = w.batch * w.tokens * per_token
    logits = w.batch * backend.step_tokens * config.vocab_size * 4
    return cache + w.batch * w.tokens * TOKEN + logits
