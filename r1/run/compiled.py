"""torch.compile, a block at a time, and what a decode step on a GPU wants of it.

With one row, a matrix product is a matrix-vector product, bound by reading the weights; the
library's matrix kernels pad the row to a tile and can't take the gather of the chosen experts in.
So a decode step is compiled with two rules of ours: such a product *is* a multiplication and a sum,
from which Inductor makes a reduction that reads each weight once, straight from the stacked
experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table

aten = torch.ops.aten
GPU_OPTIONS = {
    # Inputs of a reduction that were computed elementwise (SwiGLU, a norm) are stored before it:
    # else every row of the matrix computes them again.
    "realize_reads_threshold": 1,
}


def compile_block(block: nn.Module, phase: str, device: torch.device) -> Callable[..., Tensor]:
    """One block as a compiled callable; blocks of one kind share the code. A graph break is an
    error."""
    # The router's fp32 products are fp32 on purpose: TensorFloat32 would round what decides between
    # experts.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    if phase == "prefill":
        return torch.compile(block, fullgraph=True, dynamic=True)
    if device.type == "cpu":
        return torch.compile(block, fullgraph=True, dynamic=False)
    return torch.compile(block, fullgraph=True, dynamic=False, backend=matrix_vector_backend)


def matrix_vector_backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Inductor with the two rules below."""
    rules = {**select_decomp_table(), aten.mm.default: _mm, aten.bmm.default: _bmm}
    return compile_fx(graph, inputs, decompositions=rules, config_patches=GPU_OPTIONS)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """(1, K) @ (K, N), summed in fp32."""
    if a.shape[0] != 1:
        return NotImplemented
    return (a.float().unsqueeze(2) * b.float().unsqueeze(0)).sum(dim=1).to(a.dtype)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """(B, 1, K) @ (B, K, N) or (B, M, K) @ (B, K, 1), summed in fp32."""
    if a.shape[1] != 1 and b.shape[2] != 1:
        return NotImplemented
    return (a.float().unsqueeze(3) * b.float().unsqueeze(1)).sum(dim=2).to(a.dtype)
