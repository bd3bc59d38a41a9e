"""Mixture of experts (V3 paper, section 2.1.2): a router, stacked experts behind one slot, and
shared experts.

| strategy | how | for |
|---|---|---|
| `loop` | one expert after the other over its tokens; reads the counts on the host | reading; the reference |
| `gather` | copies the chosen experts' weights beside each token: N K of them | decode with few tokens |
| `grouped` | sorts tokens by expert, then torch's grouped matrix product reads each expert once | prefill, large batches |

A fourth, `triton`, reads experts in place, for any number of tokens, and has SwiGLU and the weights
in its two products: r1/kernels/experts.py.

Shapes: N tokens, K experts per token, E experts, D hidden_size, I moe_intermediate_size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r1.model.config import Config
from r1.model.layers import MLP, swiglu
from r1.model.router import Router

GATHER_BYTES = 256 * 2**20
"""What `gather` copies at most at a time; longer inputs are cut."""


class Experts(nn.Module):
    """The routed experts' weights, stacked; gate above up, as `F.linear` wants them: (out, in)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        experts, dim, inner = (
            config.experts.n_routed_experts,
            config.hidden_size,
            config.experts.moe_intermediate_size,
        )
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, dim))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, inner))


class Dispatch(Protocol):
    """x (N, D), indices (N, K), fp32 weights (N, K) -> the weighted sum of the chosen experts'
    outputs, (N, D)."""

    def __call__(self, experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor: ...


class MoE(nn.Module):
    """The feed-forward of a sparse layer."""

    dispatch: dict[str, Dispatch]
    """The strategy for each phase, "prefill" and "decode"; filled by build.py."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.experts.n_shared_experts
        self.shared_experts = (
            MLP(config.hidden_size, shared * config.experts.moe_intermediate_size)
            if shared
            else None
        )

    def forward(self, x: Tensor, phase: str) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        flat = x.flatten(0, 1)  # (N, D)
        indices, weights = self.gate(flat)
        y = self.dispatch[phase](self.experts, flat, indices, weights).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)


def loop(experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The definition, written out. One host sync (the counts): no graph can hold it."""
    order, token, ends = by_expert(indices, experts.gate_up_proj.shape[0])
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            rows = token[start:end]  # the tokens that chose this expert
            h = swiglu(F.linear(x[rows], experts.gate_up_proj[expert].to(x.dtype)))
            y = F.linear(h, experts.down_proj[expert].to(x.dtype))  # (rows, D)
            out.index_add_(0, rows, y * weights.flatten()[order[start:end], None])
        start = end
    return out.to(x.dtype)


def gather(experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """A matrix-vector product for each token and choice, over copies of the chosen weights; no
    sync, any shape."""
    rows = max(1, GATHER_BYTES // (indices.shape[1] * experts.gate_up_proj[0].nbytes))
    if x.shape[0] > rows:
        parts = zip(x.split(rows), indices.split(rows), weights.split(rows), strict=True)
        return torch.cat([gather(experts, *part) for part in parts])
    chosen = indices.flatten()  # (N K,)
    xs = x[:, None].expand(-1, indices.shape[1], -1).flatten(0, 1)  # (N K, D)
    h = swiglu(
        torch.bmm(experts.gate_up_proj.index_select(0, chosen), xs[..., None]).squeeze(-1)
    )  # (N K, I)
    y = torch.bmm(experts.down_proj.index_select(0, chosen), h[..., None]).unflatten(
        0, indices.shape
    )  # (N, K, D, 1)
    return (y.squeeze(-1) * weights[..., None]).sum(dim=1).to(x.dtype)  # fp32: the weights are


def grouped(experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Sorted by expert, two grouped matrix products, and back; no sync, each expert's weights are
    read once."""
    order, token, ends = by_expert(indices, experts.gate_up_proj.shape[0])
    h = swiglu(grouped_mm(x.index_select(0, token), experts.gate_up_proj, ends))  # (N K, I)
    y = grouped_mm(h, experts.down_proj, ends)  # (N K, D)
    place = torch.empty_like(order).index_copy_(
        0, order, torch.arange(len(order), device=order.device)
    )  # order's inverse
    y = y.index_select(0, place).unflatten(0, indices.shape)  # (N, K, D): back in the tokens' order
    return (y * weights[..., None]).sum(dim=1).to(x.dtype)  # fp32: the weights are


STRATEGIES: dict[str, Dispatch] = {"loop": loop, "gather": gather, "grouped": grouped}


def by_expert(indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the N K choices (N, K) by expert.

    Returns `order` (N K), a sorted choice's place among the unsorted; `token` (N K), the token it
    came from; and `ends`, int32 (E,): expert e owns the sorted choices from ends[e - 1] to ends[e].
    """
    narrow = torch.int16 if experts <= 2**15 else torch.int64  # a GPU sorts byte by byte
    sorted_experts, order = indices.flatten().to(narrow).sort(stable=True)
    ids = torch.arange(experts, dtype=narrow, device=indices.device)
    ends = torch.searchsorted(sorted_experts, ids, right=True, out_int32=True)
    return order, order // indices.shape[1], ends


@torch.library.custom_op("r1::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.mT, offs=ends)


@_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("r1::grouped_outer", mutates_args=())
def _grouped_outer(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Each group's y^T x: (M, out) and (M, in) -> (E, out, in)."""
    empty = ends.diff(prepend=ends.new_zeros(1)) == 0
    # A product over no tokens is 0, but on some GPUs torch's kernel leaves it unwritten (pytorch
    # issue 172439).
    return F.grouped_mm(y.mT, x, offs=ends).masked_fill(empty[:, None, None], 0)


@_grouped_outer.register_fake
def _(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], y.shape[1], x.shape[1])


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """y = x W^T in each group, so dx = dy W and dW = dy^T x: grouped products both."""
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return (
        _grouped_mm(grad, weight.mT, ends) if ctx.needs_input_grad[0] else None,
        _grouped_outer(grad, x, ends) if ctx.needs_input_grad[1] else None,
        None,
    )


_grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_remember)


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x (M, in), sorted by group, times their group's weight (E, out, in) -> (M, out).

    An operator of ours around torch's, whose shape inference knows bf16 only, and which autocast
    doesn't know at all."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _grouped_mm(x, weight, ends)
