"""Three ways to compute the chosen experts, for the slot `dispatch`. All compute the same function.

| strategy | how | good for |
|---|---|---|
| `loop` | each expert over its tokens, in turn; reads the counts on the host | study |
| `gather` | copies the chosen experts' weights beside each token, N K of them | few tokens |
| `grouped` | sorts tokens by expert; a grouped product reads each expert once | prompts |

A fourth, `triton`, reads experts in place for any number of tokens: r1/kernels/experts.py.

Shapes: N tokens, K experts per token, E experts, D hidden_size, I moe_intermediate_size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.errors import setting
from r1.model.moe import Experts
from r1.model.router import Route
from r1.model.strategy import Strategy, Use

GATHER_BYTES = 256 * 2**20  # the most that `gather` copies at a time; it splits longer inputs
GROUPED_ALIGNMENT = 16  # torch's grouped_mm needs rows of a multiple of so many bytes


class Dispatch(Strategy):
    """The weighted sum of each token's chosen experts."""

    rounds = False  # whether it rounds inputs to FP8 itself, of experts that ask for it: rounded.py
    route: Route | None = None  # how routers of prompts choose with it; None: as router.py says

    def __call__(self, experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x (N, D), indices int64 (N, K) into `experts`, weights fp32 (N, K) -> (N, D).

        Where `experts` are partial, an index `experts.count` is no expert.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    def scratch(
        self, experts: Experts, tokens: int, chosen: int, itemsize: int, *, compiled: bool
    ) -> int:
        """Bytes of tensors that `tokens` tokens of `chosen` experts need at a time.

        It is an estimate (r1/footprint.py). Here: input, inner values and outputs of every choice,
        and the outputs times their weights in fp32, which a compiled sum never stores.
        """
        dim, inner = experts.down_proj.shape[1:]
        each = (2 * dim + inner) * itemsize + (0 if compiled else 4 * dim)
        return tokens * (chosen * each + 4 * dim)


class Loop(Dispatch):
    """The definition, written out: a loop over experts."""

    name = "loop"

    def why_not(self, use: Use) -> str | None:
        reads = "it reads its counts on the host"
        if use.compiled:
            return f"{reads}, which {setting('compile')} can't hold: use gather or grouped"
        return f"{reads}, {no_graph(use)}" if use.captured else None

    def __call__(self, experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        order, token, ends = by_expert(indices, experts.count)  # (N K,), (N K,), (E,)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        start = 0
        for expert, end in enumerate(ends.tolist()):  # .tolist() waits for the GPU
            if end > start:
                rows = token[start:end]  # the tokens that chose this expert
                h = experts.inner(lambda m: F.linear(x[rows], m.one(expert, x.dtype)))  # noqa: B023
                y = F.linear(h, experts.down_proj.one(expert, x.dtype))  # (rows, D)
                out.index_add_(0, rows, y * weights.flatten()[order[start:end], None])
            start = end
        return out.to(x.dtype)

    def scratch(
        self, experts: Experts, tokens: int, chosen: int, itemsize: int, *, compiled: bool
    ) -> int:
        dim, inner = experts.down_proj.shape[1:]
        most = -(-tokens * chosen // experts.count)  # tokens of one expert, if they spread evenly
        one = experts.inner_numbers * experts.gate_proj.unpacked_bytes
        return one + tokens * 8 * dim + most * (2 * dim + 3 * inner) * itemsize


class Gather(Dispatch):
    """A matrix-vector product for each token and choice; no host sync, any shape."""

    name = "gather"

    def __call__(self, experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        each = indices.shape[1] * experts.inner_numbers * x.dtype.itemsize  # bytes of a token
        most = max(1, GATHER_BYTES // each)  # tokens
        if x.shape[0] > most:
            parts = zip(x.split(most), indices.split(most), weights.split(most), strict=True)
            return torch.cat([self(experts, *part) for part in parts])
        chosen = indices.flatten()  # (N K,)
        if experts.partial:  # any expert will do for what is left out below
            chosen = chosen.clamp(max=experts.count - 1)
        xs = x[:, None].expand(-1, indices.shape[1], -1).flatten(0, 1)[..., None]  # (N K, D, 1)
        h = experts.inner(lambda m: torch.bmm(m.pick(chosen, x.dtype), xs).squeeze(-1))  # (N K, I)
        y = torch.bmm(experts.down_proj.pick(chosen, h.dtype), h[..., None])  # (N K, D, 1)
        y = y.squeeze(-1).unflatten(0, indices.shape)  # (N, K, D)
        if experts.partial:
            y = y.masked_fill(indices[..., None] == experts.count, 0)
        return (y * weights[..., None]).sum(dim=1).to(x.dtype)  # fp32 until `to`, as weights are

    def scratch(
        self, experts: Experts, tokens: int, chosen: int, itemsize: int, *, compiled: bool
    ) -> int:
        numbers = chosen * experts.inner_numbers
        if compiled:  # the product reads the experts in place
            return super().scratch(experts, tokens, chosen, itemsize, compiled=compiled)
        copied = min(tokens, max(1, GATHER_BYTES // (numbers * itemsize)))
        copies = copied * numbers * (itemsize + experts.gate_proj.unpacked_bytes)
        return copies + super().scratch(experts, tokens, chosen, itemsize, compiled=compiled)


class Grouped(Dispatch):
    """Sorts by expert, multiplies in grouped products (each expert is read once), sorts back."""

    name = "grouped"

    def why_not(self, use: Use) -> str | None:
        shape, sizes = use.config.experts, {}
        if shape.n_routed_experts:
            sizes["hidden_size"] = use.config.hidden_size
            sizes["moe_intermediate_size"] = shape.moe_intermediate_size
        for name, size in sizes.items():
            if size * use.dtype.itemsize % GROUPED_ALIGNMENT:
                wants = f"torch's grouped_mm wants rows of a multiple of {GROUPED_ALIGNMENT} bytes"
                return f"{wants}, and {name} is {size} in {use.dtype}; use gather"
        why = use.machine("grouped_mm")
        if use.gpu and use.dtype != torch.bfloat16:
            why = f"torch's grouped_mm has a GPU kernel for bf16 only, not for {use.dtype_name}"
        if use.captured and why:
            return f"it reads its counts on the host, because {why}, {no_graph(use)}"
        return None

    def __call__(self, experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        order, token, ends = by_expert(indices, experts.count)  # (N K,), (N K,), (E,)
        xs = x.index_select(0, token)  # (N K, D)
        h = experts.inner(lambda m: m.grouped(xs, ends))  # (N K, I)
        y = experts.down_proj.grouped(h, ends)  # (N K, D)
        ranks = torch.arange(len(order), device=order.device)  # (N K,)
        inverse = torch.empty_like(order).index_copy_(0, order, ranks)  # inverse[order[i]] = i
        y = y.index_select(0, inverse).unflatten(0, indices.shape)  # (N, K, D), in tokens' order
        if experts.partial:  # behind the last end nothing was computed
            y = y.masked_fill(indices[..., None] == experts.count, 0)
        return (y * weights[..., None]).sum(dim=1).to(x.dtype)  # fp32 until `to`, as weights are

    def scratch(
        self, experts: Experts, tokens: int, chosen: int, itemsize: int, *, compiled: bool
    ) -> int:
        # Packed stacks are made dense in pieces, which are then put together: twice the numbers.
        dense = experts.count * experts.inner_numbers * 2 * itemsize
        packed = experts.gate_proj.unpacked_bytes > 0
        sums = super().scratch(experts, tokens, chosen, itemsize, compiled=compiled)
        return sums + (dense if packed else 0)


STRATEGIES: tuple[Dispatch, ...] = (Loop(), Gather(), Grouped())


def no_graph(use: Use) -> str:
    """The end of a refusal: a graph repeats launches, and can't wait for a number."""
    return f"which no graph can hold: use gather or triton, or leave {setting(use.capture)} off"


def by_expert(indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the N K choices (N, K) by expert; returns `order`, `token` and `ends`.

    The sorted choice i is number order[i] (N K,) of the unsorted, and belongs to token[i] (N K,).
    ends is int32 (E,): expert e owns the sorted choices from ends[e - 1] (or 0) to ends[e] - 1.
    Choices of no expert come last, behind all ends.
    """
    narrow = torch.int16 if experts <= 2**15 else torch.int64  # fewer bytes sort faster on a GPU
    sorted_experts, order = indices.flatten().to(narrow).sort(stable=True)
    ids = torch.arange(experts, dtype=narrow, device=indices.device)
    ends = torch.searchsorted(sorted_experts, ids, right=True, out_int32=True)
    return order, order // indices.shape[1], ends
