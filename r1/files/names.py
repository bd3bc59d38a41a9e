"""Where each of a checkpoint's tensors lies in the model: one table of names.

The names are the checkpoint's, but for a leading `model.`, the MTP layers (a checkpoint numbers
them after the decoder's layers) and the experts, which the model keeps stacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from r1.model.moe import EXPERT_MATRICES, Experts
from r1.model.transformer import Transformer
from r1.storage.joined import whole_of
from r1.storage.matrix import Matrix
from r1.storage.spec import Spec


@dataclass(frozen=True)
class Slot:
    """Where one of the checkpoint's weights lies in the model."""

    views: dict[str, Tensor]
    """Its tensors as the model stores them, by the endings of their names."""
    shape: tuple[int, ...]
    """The weight's own shape."""
    spec: Spec | None = None
    """How packed numbers are to be read; None: there is one tensor, the weight itself."""

    @property
    def weight(self) -> Tensor:
        """The view of a weight that is stored as it is."""
        (view,) = self.views.values()
        return view

    def fill(self, packed: dict[str, Tensor]) -> None:
        """Copy a quantized matrix's tensors, named as `views` are."""
        for ending, view in self.views.items():
            view.copy_(packed[ending])


def slots(model: Transformer) -> dict[str, Slot]:
    """The model's weights by checkpoint key, in the model's order.

    One weight may be a part of a joined matrix, and several may make one matrix. Buffers that are
    saved count like parameters. A tied output head is not named twice. The key is `NAME.weight`
    also where the model stores packed numbers.
    """
    out: dict[str, Slot] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Matrix):
            continue  # its owner tells its names
        out.update(_slots(module, key_of(name, model), seen))
    return out


def places(model: Transformer) -> dict[str, Tensor]:
    """Views of the model's tensors by checkpoint key: those of `slots`, one by one."""
    return {
        f"{key.rpartition('.')[0]}.{ending}": view
        for key, slot in slots(model).items()
        for ending, view in slot.views.items()
    }


def _slots(module: nn.Module, key: str, seen: set[int]) -> Iterator[tuple[str, Slot]]:
    """The checkpoint's weights that a module owns itself."""
    if isinstance(module, Experts):
        stacks: dict[int, list[dict[str, Slot]]] = {}
        for number, expert in enumerate(module.ids):
            stack, place = module.home(number)
            if id(stack) not in stacks:
                stacks[id(stack)] = expert_slots(stack)
            each = stacks[id(stack)][place]
            yield from ((f"{key}.{expert}.{name}.weight", slot) for name, slot in each.items())
        return
    matrix = getattr(module, "matrix", None)
    if isinstance(matrix, Matrix) and id(matrix) not in seen:
        seen.add(id(matrix))
        if stored_here := matrix.stored():  # not of a matrix that another device holds
            yield f"{key}.weight", _slot(matrix, stored_here)
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{key}.{name}", Slot({name: parameter.data}, tuple(parameter.shape))
    for name, tensor in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield f"{key}.{name}", Slot({name: tensor}, tuple(tensor.shape))


def expert_slots(experts: Experts) -> list[dict[str, Slot]]:
    """By place in the stacks, then by matrix: where an expert's weights lie."""
    stacks: dict[str, Matrix] = {name: getattr(experts, name) for name in EXPERT_MATRICES}
    stored = {name: stack.stored() for name, stack in stacks.items()}
    count = len(next(iter(stored["down_proj"].values())))
    return [
        {
            name: _slot(stack, {ending: each[place] for ending, each in stored[name].items()})
            for name, stack in stacks.items()
        }
        for place in range(count)
    ]


def _slot(matrix: Matrix, views: dict[str, Tensor]) -> Slot:
    whole = whole_of(matrix)
    return Slot(views, tuple(matrix.shape[-2:]), whole.spec)


def key_of(name: str, model: Transformer) -> str:
    """A module's name in the checkpoint."""
    if name.startswith("mtp."):
        _, depth, *rest = name.split(".", 2)
        layer = model.config.num_hidden_layers + int(depth)
        name = ".".join([f"layers.{layer}", *rest]).replace(".block", "", 1)
    elif name.startswith("layers.") and model.first_layer:
        _, place, *rest = name.split(".", 2)
        name = ".".join([f"layers.{model.first_layer + int(place)}", *rest])
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
        f"{key_of(name, model)}.{expert}.{matrix}.weight"
        for name, module in found.items()
        for expert in every
        if expert not in module.ids
        for matrix in EXPERT_MATRICES
    }
