"""torch.compile, one block at a time, with two rules of ours for decode steps on a GPU.

With one row, a matrix product is a matrix-vector product, whose time is the reading of the weights.
The library's matrix kernels pad the row to a tile, and can't fuse the gather of the chosen experts.
The rules turn such a product into a multiplication and a sum. Inductor makes a reduction of them
that reads each weight once, straight from the stacked experts.

Shapes: as in matrix products, (n, k) times (k, m); b matrices in a batch.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table

# The router's products are fp32 on purpose: TensorFloat32 would round what decides between experts.
warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")

RECOMPILE_LIMIT = 2**16
"""Each shape of a decode step is compiled anew. Dynamo's own limits (8 for a function, 256 for all)
make that an error after a few shapes, and an engine lives long."""

aten = torch.ops.aten
GPU_OPTIONS = {
    # Store the inputs of a reduction that were computed elementwise (SwiGLU, a norm); otherwise
    # every row of the matrix computes them again.
    "realize_reads_threshold": 1,
}


def compile_block(block: nn.Module, phase: str, device: torch.device) -> Callable[..., Tensor]:
    """One block as a compiled callable; blocks of one kind share the code.

    A graph break is an error. Not the module is compiled but its call: torch would wrap the module
    in another one, whose own call costs as much as a small kernel.
    """
    call = block.__call__
    if phase == "prefill":
        return torch.compile(call, fullgraph=True, dynamic=True)
    if device.type == "cpu":
        return torch.compile(call, fullgraph=True, dynamic=False)
    return torch.compile(call, fullgraph=True, dynamic=False, backend=matrix_vector_backend)


def matrix_vector_backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Inductor with the two rules below."""
    rules = {**select_decomp_table(), aten.mm.default: _mm, aten.bmm.default: _bmm}
    return compile_fx(graph, inputs, decompositions=rules, config_patches=GPU_OPTIONS)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """(1, k) @ (k, m), summed in fp32."""
    if a.shape[0] != 1:
        return NotImplemented
    return (a.float().unsqueeze(2) * b.float().unsqueeze(0)).sum(dim=1).to(a.dtype)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """(b, 1, k) @ (b, k, m) or (b, n, k) @ (b, k, 1), summed in fp32."""
    if a.shape[1] != 1 and b.shape[2] != 1:
        return NotImplemented
    return (a.float().unsqueeze(3) * b.float().unsqueeze(1)).sum(dim=2).to(a.dtype)


class _Patch(threading.local):
    """Each thread's own: dynamo's settings are a thread's, and one patch is not entered twice.

    It is made once, for making one costs 0.1 ms.
    """

    def __init__(self) -> None:
        self.limits = torch._dynamo.config.patch(
            recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT
        )


_patch = _Patch()


def limits() -> Any:
    """A context in which dynamo compiles as many shapes as we need; outside it nothing changes."""
    inside = torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT
    return nullcontext() if inside else _patch.limits
