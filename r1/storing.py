"""Give each matrix of a model its storage, without numbers yet: quantized, shared, joined."""

from __future__ import annotations

from torch import nn

from r1.device import DTYPES
from r1.files.names import key_of
from r1.model.gqa import GQA
from r1.model.layers import MLP, Embedding, Linear
from r1.model.mla import MLA
from r1.model.moe import EXPERT_MATRICES, Experts
from r1.model.transformer import Transformer
from r1.placement.placement import Placement
from r1.storage.joined import join
from r1.storage.kinds import KINDS
from r1.storage.matrix import Matrix
from r1.switches.backend import Backend
from r1.switches.precision import spec_of


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


def share_matrices(model: Transformer, placement: Placement) -> None:
    """Leave of each matrix the part that this process holds."""
    for path, module in model.named_modules():
        if isinstance(module, (Linear, Embedding)):
            module.matrix = placement.matrix(path, module.matrix)
        elif isinstance(module, Experts):
            for each in EXPERT_MATRICES:
                part = placement.matrix(f"{path}.{each}", getattr(module, each))
                setattr(module, each, part)
            module.inner_numbers = 2 * module.gate_proj.shape[1:].numel()


def join_matrices(model: nn.Module) -> None:
    """Store matrices of the same input as one, in every layer (storage/joined.py)."""
    for module in model.modules():
        if isinstance(module, MLA):
            direct = module.shape.q_lora_rank is None
            _join(module.q_proj if direct else module.q_a_proj, module.kv_a_proj_with_mqa)
        elif isinstance(module, GQA):
            _join(module.q_proj, module.k_proj, module.v_proj)
        elif isinstance(module, MLP):
            _join(module.gate_proj, module.up_proj)
        elif isinstance(module, Experts):
            module.gate_proj, module.up_proj = join(module.gate_proj, module.up_proj)


def _join(*layers: Linear) -> None:
    for layer, part in zip(layers, join(*(layer.matrix for layer in layers)), strict=True):
        layer.matrix = part
