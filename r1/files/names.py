"""Where each of a checkpoint's tensors lies in the model: one table of names.

The names are the checkpoint's, but for a leading `model.`, the MTP layers (a checkpoint numbers
them after the decoder's layers) and the experts, which the model keeps stacked.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from r1.model.moe import Experts
from r1.model.transformer import Transformer
from r1.storage.matrix import Matrix

EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")


def places(model: Transformer) -> dict[str, Tensor]:
    """Views of the model's tensors by checkpoint key, in the model's order.

    One file tensor may be a part of a joined matrix, and several may make one matrix. Buffers that
    are saved count like parameters. A tied output head is not named twice.
    """
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Matrix):
            continue  # its owner tells its names
        for key, tensor in _tensors(module, _key(name, model), seen):
            out[key] = tensor
    return out


def _tensors(module: nn.Module, key: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors that a module owns itself."""
    if isinstance(module, Experts):
        stacks = [(name, getattr(module, name).stored()) for name in EXPERT_MATRICES]
        for place, expert in enumerate(module.ids):
            for name, stored in stacks:
                for ending, tensor in stored.items():
                    yield f"{key}.{expert}.{name}.{ending}", tensor[place]
        return
    matrix = getattr(module, "matrix", None)
    if isinstance(matrix, Matrix) and id(matrix) not in seen:
        seen.add(id(matrix))
        for ending, tensor in matrix.stored().items():
            yield f"{key}.{ending}", tensor
    for name, tensor in module.named_parameters(recurse=False):
        yield f"{key}.{name}", tensor.data
    for name, tensor in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield f"{key}.{name}", tensor


def _key(name: str, model: Transformer) -> str:
    """A module's name in the checkpoint."""
    if name.startswith("mtp."):
        _, depth, *rest = name.split(".", 2)
        layer = model.config.num_hidden_layers + int(depth)
        name = ".".join([f"layers.{layer}", *rest]).replace(".block", "", 1)
    return name if name.startswith("lm_head") else f"model.{name}"


def is_projection(key: str) -> bool:
    """Whether a checkpoint with FP8 blocks stores this tensor in FP8, as R1's does."""
    projection = key.endswith(("_proj.weight", ".kv_a_proj_with_mqa.weight"))
    return projection and not key.endswith(".eh_proj.weight")


def elsewhere(model: Transformer) -> set[str]:
    """The checkpoint's names of routed experts that this model's stacks do not hold."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    every = range(model.config.experts.n_routed_experts)
    return {
        f"{_key(name, model)}.{expert}.{matrix}.weight"
        for name, module in found.items()
        for expert in every
        if expert not in module.ids
        for matrix in EXPERT_MATRICES
    }
