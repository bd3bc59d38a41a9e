"""Where the parts of a model lie. A way to spread a model is a subclass of Placement."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from r1.placement.mesh import Mesh
from r1.storage.matrix import Matrix

Part = tuple[slice, ...]
"""A piece of a tensor: start and stop in each dimension."""


class Placement:
    """Everything on one device. build.py asks it while it makes and loads a model."""

    mesh = Mesh()
    """The processes that share the model."""

    def arrange(self, model: Any) -> None:
        """Swap modules of a Transformer that has no memory yet, such as experts held elsewhere."""

    def matrix(self, path: str, matrix: Matrix) -> Matrix:
        """The part of a matrix that this process holds, in the same storage, without numbers.

        `path` is that of the module that owns it; for a stack of experts, with the matrix's name.
        """
        return matrix

    def device(self, name: str, module: nn.Module, device: torch.device) -> torch.device:
        """The device of a module's own tensors; `name` is its path in the model."""
        return device

    @property
    def complete(self) -> bool:
        """Whether this process holds all of every tensor."""
        return type(self) is Placement

    def sizes(self, model: nn.Module, device: torch.device) -> Counter[str]:
        """Bytes that `allocate` takes, by the type of device ("cuda", "cpu")."""
        needed = Counter[str]()
        for name, module in model.named_modules():
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            where = self.device(name, module, device).type
            needed[where] += sum(tensor.nbytes for tensor in own)
        return needed

    def allocate(self, model: Any, device: torch.device) -> None:
        """Give a Transformer's tensors memory. Raises InputError where there is too little."""
        places = {name: self.device(name, each, device) for name, each in model.named_modules()}
        for name, module in model.named_modules():
            module.to_empty(device=places[name], recurse=False)

    def holds(self, key: str) -> bool:
        """Whether this process holds the checkpoint's tensor `key`, or a part of it."""
        return True

    def part(self, key: str, shape: tuple[int, ...]) -> Part:
        """The part of the checkpoint's tensor `key` that this process holds."""
        return tuple(slice(0, size) for size in shape)
