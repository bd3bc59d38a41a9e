"""Build a model: allocate it, load it, and put the chosen strategies into its slots."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from r1.device import DTYPES, available_bytes, grow_segments, torch_device
from r1.errors import InputError, setting
from r1.files.load import Report, load
from r1.files.names import EXPERT_MATRICES, key_of, slots
from r1.model.config import Config
from r1.model.layers import MLP, Linear
from r1.model.mla import MLA
from r1.model.moe import Experts, MoE
from r1.model.mtp import MTPLayer
from r1.model.rope import rotate_each, rotate_jointly
from r1.model.router import Router
from r1.model.transformer import Transformer
from r1.placement.placement import Placement
from r1.storage import int4_cpu
from r1.storage.joined import join
from r1.storage.kinds import KINDS
from r1.storage.matrix import Matrix
from r1.switches.backend import Backend
from r1.switches.precision import spec_of
from r1.switches.strategies import ATTENTION, EXPERTS

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
    placement: Placement | None = None,
) -> tuple[Transformer, Report]:
    """The model of `directory`, loaded, with the strategies of the resolved `backend`.

    Raises InputError.

    `mtp` loads the MTP layers too; `speculate` in the backend does so in any case.
    """
    mtp = mtp or backend.speculate == "mtp"
    if mtp and not config.num_nextn_predict_layers:
        has = "config.json has num_nextn_predict_layers = 0, so there is no MTP layer to load"
        raise InputError(f"{directory}: {has}")
    model = allocate(config, backend, mtp=mtp, placement=placement)
    with torch.device("cpu"):  # safetensors maps files to the caller's default device
        report = load(model, directory, placement, quiet=quiet)
    _repack(model, backend)
    return finish(model, backend), report


def from_shape(
    config: Config,
    backend: Backend,
    *,
    seed: int = 0,
    mtp: bool = False,
    placement: Placement | None = None,
) -> Transformer:
    """A model of random weights, made on the device: N(0, 0.02), norms of 1, no gate bias."""
    mtp = mtp or backend.speculate == "mtp"
    model = allocate(config, backend, mtp=mtp, placement=placement, cut=setting("layers", "N"))
    randomize(model, seed)
    _repack(model, backend)
    return finish(model, backend)


def sketch(
    config: Config, backend: Backend, *, mtp: bool = False, placement: Placement | None = None
) -> Transformer:
    """The model without memory: modules, storage and dtypes are as they will be."""
    with torch.device("meta"):
        model = Transformer(config)
        if mtp:
            depths = range(config.num_nextn_predict_layers)
            model.mtp.extend(MTPLayer(config, depth) for depth in depths)
        (placement or Placement()).arrange(model)
    model.to(DTYPES[backend.dtype])
    for module in model.modules():
        if isinstance(module, Router):
            module.float()  # under every dtype: see router.py
    with torch.device("meta"):
        quantize_matrices(model, backend)
        if backend.join == "on":
            join_matrices(model)
    return model


def allocate(
    config: Config,
    backend: Backend,
    *,
    mtp: bool,
    placement: Placement | None = None,
    cut: str | None = None,
) -> Transformer:
    """The model with memory for its tensors, not yet set.

    Raises InputError where they would not fit, before any is made. `cut` is the setting that gives
    the model fewer layers, if there is one: a checkpoint is loaded whole.
    """
    if backend.memory == "expandable":
        grow_segments()
    placement = placement or Placement()
    model = sketch(config, backend, mtp=mtp, placement=placement)
    device = torch_device(backend.device)
    devices = {
        name: placement.device(name, module, device) for name, module in model.named_modules()
    }
    needed = Counter[str]()
    for name, module in model.named_modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        needed[devices[name].type] += sum(tensor.nbytes for tensor in own)
    for kind, nbytes in needed.items():
        if nbytes + HEADROOM > (available := available_bytes(torch.device(kind))):
            raise _too_large(nbytes + HEADROOM, available, model, backend, cut)
    for name, module in model.named_modules():
        module.to_empty(device=devices[name], recurse=False)
    model.derive()
    return model


def _too_large(
    needed: int, available: int, model: Transformer, backend: Backend, cut: str | None
) -> InputError:
    """The error of a model that does not fit, with advice that helps."""
    halved = backend.dtype == "fp32" and backend.amp == "off" and needed / 2 <= available
    could = [setting("dtype", "bf16") if halved else None]
    if backend.quant != "int4" and "triton" not in (backend.moe, backend.prefill_moe):
        smaller = replace(backend, quant="int4")
        if weight_bytes(model.config, smaller, mtp=len(model.mtp) > 0) + HEADROOM <= available:
            could.append(setting("quant", "int4"))
    advice = " or ".join(each for each in (*could, cut, "a larger machine") if each)
    kinds = {backend.dtype: 1, backend.quant: 1, backend.quant_head: 1}  # a set in order
    stored = " and ".join(kind for kind in kinds if kind != "none")
    return InputError(
        f"the model needs {needed / 1e9:.1f} GB in {stored} and {backend.device} has "
        f"{available / 1e9:.1f} GB free: use {advice}"
    )


def quantize_matrices(model: Transformer, backend: Backend) -> None:
    """Give each matrix the storage that a resolved `quant` asks for, with no numbers yet."""
    files = model.config.files

    def storage(matrix: Matrix, name: str) -> Matrix:
        spec = spec_of(name, files, backend.quant, backend.quant_head)
        if spec is None:
            return matrix
        return KINDS[spec.kind].empty(spec, matrix.shape, DTYPES[backend.dtype])

    for path, module in model.named_modules():
        name = key_of(path, model)
        if isinstance(module, Linear):
            module.matrix = storage(module.matrix, name)
        elif isinstance(module, Experts):
            for each in EXPERT_MATRICES:
                setattr(module, each, storage(getattr(module, each), f"{name}.{each}"))


def join_matrices(model: nn.Module) -> None:
    """Store matrices of the same input as one, in every layer (storage/joined.py)."""
    for module in model.modules():
        if isinstance(module, MLA):
            direct = module.shape.q_lora_rank is None
            _join(module.q_proj if direct else module.q_a_proj, module.kv_a_proj_with_mqa)
        elif isinstance(module, MLP):
            _join(module.gate_proj, module.up_proj)
        elif isinstance(module, Experts):
            module.gate_proj, module.up_proj = join(module.gate_proj, module.up_proj)


def _join(*layers: Linear) -> None:
    for layer, part in zip(layers, join(*(layer.matrix for layer in layers)), strict=True):
        layer.matrix = part


def randomize(model: Transformer, seed: int) -> None:
    """Set every tensor from `seed`: the same bf16 numbers in every dtype, joined or not.

    Quantized matrices are made of the same numbers, one by one, so the model is never held as it
    was before.
    """
    device = model.norm.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for key, slot in slots(model).items():
            if key.endswith("e_score_correction_bias"):
                slot.weight.zero_()
            elif len(slot.shape) == 1:
                slot.weight.fill_(1.0)
            elif slot.spec is None:
                _draw(slot.weight, generator)
            else:
                drawn = torch.empty(slot.shape, dtype=torch.bfloat16, device=device)
                _draw(drawn, generator)
                slot.fill(KINDS[slot.spec.kind].quantize(drawn, slot.spec))


def _draw(place: Tensor, generator: torch.Generator) -> None:
    for part in place.view(-1).split(DRAW_ELEMENTS):
        drawn = torch.empty(part.shape, dtype=torch.float32, device=part.device)
        part.copy_(drawn.normal_(0.0, 0.02, generator=generator).bfloat16())


def _repack(model: Transformer, backend: Backend) -> None:
    """Bring packed numbers into the order that is read best here. No number changes."""
    if backend.device == "cpu" and backend.compute == "bf16":
        int4_cpu.repack(model)


def finish(model: Transformer, backend: Backend) -> Transformer:
    """Fill the slots with the strategies that `backend` names."""
    attention = {"prefill": backend.prefill_attention, "decode": backend.attention}
    experts = {"prefill": backend.prefill_moe, "decode": backend.moe}
    attend = {phase: ATTENTION[name] for phase, name in attention.items()}
    dispatch = {phase: EXPERTS[name] for phase, name in experts.items()}
    for strategy in (*attend.values(), *dispatch.values()):
        strategy.prepare()
    for module in model.modules():
        if isinstance(module, MLA):
            module.attend = dict(attend)
            module.rotate = rotate_jointly if backend.join == "on" else rotate_each
        elif isinstance(module, MoE):
            module.dispatch = dict(dispatch)
    return model.eval().requires_grad_(False)


def parameters(module: nn.Module) -> int:
    """How many numbers a module has."""
    return sum(p.numel() for p in module.parameters())


def count_parameters(config: Config, *, mtp: bool = False) -> int:
    """How many numbers a model of this config has, with its MTP layers or without."""
    backend = Backend(dtype="fp32", join="off", quant="none")
    return parameters(sketch(config, backend, mtp=mtp))


def weight_bytes(config: Config, backend: Backend, *, mtp: bool = False) -> int:
    """Bytes of all tensors as a resolved `backend` stores them, in its dtype and quantized."""
    model = sketch(config, backend, mtp=mtp)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
