"""meta -> memory check -> allocate -> load -> derive -> fill the slots: the only reader of the
switches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from r1.device import DTYPES, available_bytes, torch_device
from r1.errors import InputError
from r1.files import checkpoint
from r1.model import attend, moe
from r1.model.config import Config
from r1.model.mla import MLA
from r1.model.moe import MoE
from r1.model.mtp import MTPLayer
from r1.model.transformer import Transformer
from r1.switches.backend import Backend

HEADROOM = 256 * 2**20
"""Bytes beside the weights without which no step runs: activations, the cache of a short prompt."""

DRAW_ELEMENTS = 2**24
"""Random numbers drawn at a time: bounds the fp32 scratch."""


def from_checkpoint(
    directory: str | Path,
    config: Config,
    backend: Backend,
    *,
    mtp: bool = False,
    quiet: bool = False,
) -> tuple[Transformer, checkpoint.Report]:
    """The model of `directory`, loaded, with the resolved `backend`'s strategies. Raises
    InputError.

    `mtp` loads the MTP layers too; `speculate` in the backend does so in any case.
    """
    mtp = mtp or backend.speculate == "mtp"
    if mtp and not config.num_nextn_predict_layers:
        raise InputError(
            f"{directory}: config.json has num_nextn_predict_layers = 0, so there is no MTP layer to load"
        )
    model = allocate(config, backend, mtp=mtp)
    report = checkpoint.load(model, directory, quiet=quiet)
    return finish(model, backend), report


def from_shape(
    config: Config, backend: Backend, *, seed: int = 0, mtp: bool = False
) -> Transformer:
    """A model of random weights, made on the device: N(0, 0.02), norms of 1, no gate bias."""
    model = allocate(config, backend, mtp=mtp or backend.speculate == "mtp")
    randomize(model, seed)
    return finish(model, backend)


def allocate(config: Config, backend: Backend, *, mtp: bool) -> Transformer:
    """The model's parameters on the device, not yet set. Raises InputError where they would not
    fit, before they are made."""
    device, dtype = torch_device(backend.device), DTYPES[backend.dtype]
    with torch.device("meta"), _default_dtype(dtype):
        model = Transformer(config)
        if mtp:
            model.mtp.extend(
                MTPLayer(config, depth) for depth in range(config.num_nextn_predict_layers)
            )
    needed = sum(p.nbytes for p in model.parameters()) + HEADROOM
    available = available_bytes(device)
    if needed > available:
        raise InputError(
            f"the model needs {needed / 1e9:.1f} GB in {backend.dtype} and {backend.device} has {available / 1e9:.1f} GB free: "
            "use a smaller dtype, fewer layers, or a larger machine"
        )
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def randomize(model: Transformer, seed: int) -> None:
    """Set every parameter from `seed`, in place on its device; the same numbers (bf16 ones) in
    every dtype."""
    device = model.norm.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("e_score_correction_bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                flat = parameter.view(-1)
                for part in flat.split(DRAW_ELEMENTS):
                    drawn = torch.empty(part.shape, dtype=torch.float32, device=device)
                    part.copy_(drawn.normal_(0.0, 0.02, generator=generator).bfloat16())


def finish(model: Transformer, backend: Backend) -> Transformer:
    """Derive what isn't stored, and fill the slots with the strategies that `backend` names."""
    model.derive()
    attention, experts = dict(attend.STRATEGIES), dict(moe.STRATEGIES)
    if "triton" in (backend.attention, backend.moe, backend.prefill_moe):
        from r1 import kernels  # Triton is optional: only who asks for it imports it

        attention["triton"], experts["triton"] = kernels.attend, kernels.dispatch
    for module in model.modules():
        if isinstance(module, MLA):
            module.attend = {
                "prefill": attention[backend.prefill_attention],
                "decode": attention[backend.attention],
            }
        elif isinstance(module, MoE):
            module.dispatch = {
                "prefill": experts[backend.prefill_moe],
                "decode": experts[backend.moe],
            }
    return model.eval().requires_grad_(False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def parameters(module: nn.Module) -> int:
    """How many numbers a module has."""
    return sum(p.numel() for p in module.parameters())


def count_parameters(config: Config, *, mtp: bool = False) -> int:
    """How many numbers a model of this config has, with its MTP layers or without; nothing is
    allocated."""
    with torch.device("meta"):
        extra = [
            MTPLayer(config, depth)
            for depth in range(config.num_nextn_predict_layers if mtp else 0)
        ]
        return sum(map(parameters, [Transformer(config), *extra]))
