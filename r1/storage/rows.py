"""Experts as rows of bytes: each expert's tensors side by side, so that one copy moves it whole.

The matrix objects of a stack become views of a buffer (E, width), whatever their storage: numbers,
scales and zero points of one expert lie in one row.

Shapes: E experts of a stack.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from r1.storage.matrix import Matrix

ALIGNMENT = 256
"""Bytes: where a tensor may begin in a row. Kernels read 16 bytes at a time, and copies more."""


def aligned(nbytes: int) -> int:
    """The room that a tensor of so many bytes takes in a row."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Rows:
    """The layout of a row, for a module whose tensors are all stacks (E, ...) of matrix objects."""

    def __init__(self, experts: nn.Module) -> None:
        self.experts = experts
        self.starts: list[int] = []
        self.width = 0
        """Bytes of one expert, with what aligns its tensors."""
        for module, name in _tensors(experts):
            self.starts.append(self.width)
            each = getattr(module, name)
            nbytes = each[0].numel() * each.itemsize
            self.width += aligned(nbytes)

    @property
    def layout(self) -> list[tuple[object, ...]]:
        """What two modules must have in common for a row of one to be a row of the other."""
        tensors = [(module, name, getattr(module, name)) for module, name in _tensors(self.experts)]
        return [
            (type(module), getattr(module, "spec", None), name, tensor.shape[1:], tensor.dtype)
            for module, name, tensor in tensors
        ]

    def place(self, buffer: Tensor) -> None:
        """Make the tensors views of `buffer`, uint8 (E, width); E may be another one than before.

        The numbers are those of the buffer: what the tensors held is not copied.
        """
        for (module, name), start in zip(list(_tensors(self.experts)), self.starts, strict=True):
            old = getattr(module, name)
            shape, nbytes = old.shape[1:], old[0].numel() * old.itemsize
            view = buffer[:, start : start + nbytes].view(old.dtype).unflatten(1, shape)
            is_parameter = isinstance(old, nn.Parameter)
            setattr(module, name, nn.Parameter(view, requires_grad=False) if is_parameter else view)
        for module in self.experts.modules():
            if isinstance(module, Matrix):
                module.shape = torch.Size((len(buffer), *module.shape[1:]))

    def views(self, row: Tensor) -> list[Tensor]:
        """The tensors of one expert, in order, as views of a row's bytes (width,)."""
        found = []
        for (module, name), start in zip(_tensors(self.experts), self.starts, strict=True):
            like = getattr(module, name)
            nbytes = like[0].numel() * like.itemsize
            found.append(row[start : start + nbytes].view(like.dtype).view(like.shape[1:]))
        return found

    def move(self, buffer: Tensor) -> None:
        """Copy the tensors' numbers to `buffer`, uint8 (E, width), and make them views of it."""
        before = [getattr(module, name) for module, name in _tensors(self.experts)]
        self.place(buffer)
        for (module, name), old in zip(_tensors(self.experts), before, strict=True):
            getattr(module, name).data.copy_(old)


def _tensors(experts: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Each tensor of the module's matrices once: its owner and its name there."""
    for module in experts.modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        yield from ((module, name) for name, _ in own)
