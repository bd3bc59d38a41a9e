"""Build a model: allocate it, load it, and put the chosen strategies into its slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r1.device import DTYPES, available_bytes, grow_segments, torch_device
from r1.errors import InputError, setting
from r1.files.draw import randomize
from r1.files.load import Report, load
from r1.footprint import HEADROOM, least
from r1.model import gqa
from r1.model.config import Config
from r1.model.dispatch import Dispatch
from r1.model.gqa import GQA
from r1.model.mla import MLA
from r1.model.moe import Experts, MoE
from r1.model.mtp import MTPLayer
from r1.model.rope import rotate_each, rotate_jointly
from r1.model.rounded import Rounded
from r1.model.router import Router
from r1.model.temper import tempered
from r1.model.transformer import Transformer
from r1.placement import host, profile
from r1.placement.mesh import Mesh
from r1.placement.offload import Offloaded, Slotted
from r1.placement.parallel import Parallel
from r1.placement.placement import Placement
from r1.placement.ranks import crew
from r1.placement.stages import Stages
from r1.placement.streamed import StreamedExperts
from r1.storage import int4_cpu
from r1.storage.activations import FROM_TOKENS
from r1.storage.kinds import kind_of
from r1.storing import join_matrices, quantize_matrices, share_matrices
from r1.switches import offload
from r1.switches.allreduce import ALLREDUCE
from r1.switches.backend import Backend
from r1.switches.precision import specs_of
from r1.switches.strategies import EXPERTS, attention_of


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
    placement = placement or placement_of(config, backend, connected(backend))
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
    packed: bool = False,
) -> Transformer:
    """A model of random weights, made on the device: N(0, 0.02), norms of 1, biases of 0.

    `packed`: see randomize.
    """
    if backend.experts == "disk":
        raise InputError(
            f"{setting('experts', 'disk')} reads experts from a checkpoint's files, and random "
            f"weights have none: use {setting('experts', 'host')}, or a checkpoint's folder"
        )
    mtp = mtp or backend.speculate == "mtp"
    placement = placement or placement_of(config, backend, connected(backend))
    model = allocate(config, backend, mtp=mtp, placement=placement, cut=setting("layers", "N"))
    whole = None if placement.complete else sketch(config, backend, mtp=mtp, placement=Placement())
    randomize(model, seed, whole, placement, packed=packed)
    _repack(model, backend)
    return finish(model, backend)


def connected(backend: Backend) -> Mesh:
    """The processes that share the model. Raises InputError if they are more or fewer."""
    return Mesh.here(backend.tp, backend.ep, torch_device(backend.device).type, backend.pp)


def placement_of(config: Config, backend: Backend, mesh: Mesh | None = None) -> Placement:
    """Where the parts of the model lie, as a resolved `backend` says. Raises InputError.

    Without a mesh it tells sizes only, those of the first stage's device with the largest share.
    """
    placement = Placement()
    if backend.ranks > 1:
        mesh = mesh or Mesh(backend.tp, backend.ep, pp=backend.pp)
        kind = Stages if mesh.pp > 1 else Parallel
        shared = mesh.group is not None and mesh.parts > 1
        make_sum = ALLREDUCE[backend.allreduce].sum if shared else None
        placement = kind(config, mesh, specs_of(config.files, backend.quant), make_sum)
    if backend.experts == "device":
        return placement
    recorded = backend.expert_profile
    how = Slotted(
        backend.expert_slots,
        backend.expert_policy,
        profile.load(recorded, config) if recorded else None,
        backend.guess_experts,
        files=backend.experts == "disk",
        host=backend.experts == "cpu",
        repacked=backend.experts == "cpu" and offload.stored_kind(backend, config) == "int4",
        cache=int(backend.expert_cache_gb * 1e9),
        sharers=min(crew().here, backend.ranks),
    )
    return Offloaded(placement, how)


def sketch(
    config: Config, backend: Backend, *, mtp: bool = False, placement: Placement | None = None
) -> Transformer:
    """The model without memory: modules, storage and dtypes are as they will be.

    Of a model that devices share, it is the part of rank 0, unless `placement` tells another. No
    rank of the first stage has more.
    """
    placement = placement or placement_of(config, backend)
    with torch.device("meta"):
        model = Transformer(config)
        if mtp:
            depths = range(config.num_nextn_predict_layers)
            model.mtp.extend(MTPLayer(config, depth) for depth in depths)
        placement.arrange(model)
    model.to(DTYPES[backend.dtype])
    for module in model.modules():
        if isinstance(module, Router):
            module.float()  # under every dtype: see router.py
    with torch.device("meta"):
        quantize_matrices(model, backend)
        share_matrices(model, placement)
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
    placement = placement or placement_of(config, backend)
    model = sketch(config, backend, mtp=mtp, placement=placement)
    device = torch_device(backend.device)
    sizes = placement.sizes(model, device)
    # All ranks look before one of them takes memory that others see as free.
    placement.mesh.together(lambda: check_memory(sizes, model, backend, cut))
    placement.allocate(model, device)
    model.derive()
    return model


def check_memory(
    sizes: Mapping[str, int], model: Transformer, backend: Backend, cut: str | None,
    free: Callable[[torch.device], int] | None = None,
) -> None:  # fmt: skip
    """Raise InputError where the bytes of each kind of device are not free.

    The processes of a host share its memory, and each takes so much. `free` tells what a device
    has, if that is not what is free here and now.
    """
    own = torch_device(backend.device).type
    for kind, nbytes in sizes.items():
        needed = nbytes + (least(model, backend) if kind == own else HEADROOM)
        if kind == "cpu":
            needed *= min(crew().here, backend.ranks)
        if needed > (available := (free or available_bytes)(torch.device(kind))):
            where = backend.device if kind == own else "the host"
            raise _too_large(needed, available, where, model, backend, cut)


def _too_large(
    needed: int, available: int, where: str, model: Transformer, backend: Backend, cut: str | None
) -> InputError:
    """The error of a model that does not fit, with advice that helps."""
    halved = backend.dtype == "fp32" and backend.amp == "off" and needed / 2 <= available
    could = [setting("dtype", "bf16") if halved else None]
    if kind_of(backend.quant) != "int4" and "triton" not in (backend.moe, backend.prefill_moe):
        smaller, device = replace(backend, quant="int4"), torch_device(backend.device)
        with suppress(InputError):  # devices might have to split a block
            small = sketch(model.config, smaller, mtp=len(model.mtp) > 0)
            own = placement_of(model.config, smaller).sizes(small, device)[device.type]
            if own + least(small, smaller) <= available:
                could.append(setting("quant", "int4"))
    here = backend.experts == "device" and model.config.experts.n_routed_experts > 0
    if backend.device != "cpu" and here:
        less = replace(backend, experts="host")
        if weight_bytes(model.config, less, mtp=len(model.mtp) > 0) + HEADROOM <= available:
            could.append(setting("experts", "host"))
    advice = " or ".join(each for each in (*could, cut, "a larger machine") if each)
    kinds = dict.fromkeys((backend.dtype, backend.quant, backend.quant_head))  # each once
    stored = " and ".join(kind for kind in kinds if kind != "none")
    return InputError(
        f"the model needs {needed / 1e9:.1f} GB in {stored} and {where} has "
        f"{available / 1e9:.1f} GB free: use {advice}"
    )


def _repack(model: Transformer, backend: Backend) -> None:
    """Bring packed numbers into the order that is read best here. No number changes."""
    if backend.device == "cpu" and backend.compute == "bf16":
        streamed = () if backend.experts == "device" else (Experts,)  # they stay rows of bytes
        int4_cpu.repack(model, leave=streamed)
    if backend.experts == "cpu":
        layers = [each for each in model.modules() if isinstance(each, StreamedExperts)]
        host.repack(layers, torch_device(backend.device))


def finish(model: Transformer, backend: Backend) -> Transformer:
    """Fill the slots with the strategies that `backend` names."""
    sparse = model.config.experts.n_routed_experts > 0
    experts = {"prefill": backend.prefill_moe, "decode": backend.moe} if sparse else {}
    table: Mapping[str, Any] = attention_of(model.config.attention)
    attend = {"prefill": table[backend.prefill_attention], "decode": table[backend.attention]}
    dispatch: dict[str, Dispatch] = {phase: EXPERTS[name] for phase, name in experts.items()}
    if backend.quant_activations != "none":
        dispatch = {phase: Rounded(s, FROM_TOKENS[phase]) for phase, s in dispatch.items()}
    for strategy in (*attend.values(), *dispatch.values()):
        strategy.prepare()
    for module in model.modules():
        if isinstance(module, MLA):
            shape = module.shape
            module.attend = {phase: tempered(each, shape) for phase, each in attend.items()}
            module.rotate = rotate_jointly if backend.join == "on" else rotate_each
        elif isinstance(module, GQA):
            module.attend = dict(attend)
            module.rotate = gqa.rotate_jointly if backend.join == "on" else gqa.rotate_each
        elif isinstance(module, MoE):
            module.dispatch, module.route = dict(dispatch), {"prefill": dispatch["prefill"].route}
    return model.eval().requires_grad_(False)


def parameters(module: nn.Module) -> int:
    """How many numbers a module has."""
    return sum(p.numel() for p in module.parameters())


def count_parameters(config: Config, *, mtp: bool = False) -> int:
    """How many numbers a model of this config has, with its MTP layers or without."""
    backend = Backend(dtype="fp32", join="off", quant="none")
    return parameters(sketch(config, backend, mtp=mtp))


def weight_bytes(config: Config, backend: Backend, *, mtp: bool = False) -> int:
    """Bytes of the device for all tensors, as a resolved `backend` places and stores them.

    Where devices share the model: of the one with the largest share.
    """
    return placed_bytes(config, backend, mtp=mtp)[torch_device(backend.device).type]


def placed_bytes(config: Config, backend: Backend, *, mtp: bool = False) -> Counter[str]:
    """The same by the type of device ("cuda", "cpu"), of one process."""
    device, most = torch_device(backend.device), Counter[str]()
    for stage in range(backend.pp):
        first = Mesh(backend.tp, backend.ep, stage * backend.tp * backend.ep, pp=backend.pp)
        placement = placement_of(config, backend, first)
        model = sketch(config, backend, mtp=mtp, placement=placement)
        most |= placement.sizes(model, device)
    return most
