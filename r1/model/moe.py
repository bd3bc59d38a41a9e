"""Mixture of experts (V3 paper, section 2.1.2): a router, routed experts, and shared experts.

The slot `dispatch` computes the chosen experts: see dispatch.py.

Shapes: B rows, S tokens of a row, N = B S, K experts per token, E experts held, D hidden_size,
I moe_intermediate_size, M rows of draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

from torch import Tensor, nn

from r1.model.config import Config
from r1.model.layers import MLP, Multiply, matmul, swiglu
from r1.model.router import Route, Router
from r1.storage.dense import Dense
from r1.storage.joined import products
from r1.storage.matrix import Matrix

EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")
"""The stacks of `Experts`, by name."""
Run = Callable[["Experts", Tensor, Tensor, Tensor], Tensor]
"""The call of a strategy of dispatch.py: experts, x, indices and weights -> weighted sums."""


class Experts(nn.Module):
    """The SwiGLU experts of one layer, all on this device.

    For experts that lie elsewhere (on several GPUs, or in host memory), a subclass overrides `here`
    and `combine`. The strategies of dispatch.py and the kernels stay as they are.
    """

    gate_proj: Matrix  # (E, I, D)
    up_proj: Matrix  # (E, I, D)
    down_proj: Matrix  # (E, D, I)
    leads: bool = True  # this place adds what only one of several may add (see kernels/block.py)

    def __init__(self, config: Config, ids: range | None = None) -> None:
        """`ids`: the checkpoint's numbers of the experts that this device holds. None: all."""
        super().__init__()
        self.ids = range(config.experts.n_routed_experts) if ids is None else ids
        dim, inner = config.hidden_size, config.experts.moe_intermediate_size
        self.gate_proj = Dense.empty(len(self.ids), inner, dim)
        self.up_proj = Dense.empty(len(self.ids), inner, dim)
        self.down_proj = Dense.empty(len(self.ids), dim, inner)
        self.count = len(self.ids)  # how many experts the stacks hold
        self.partial = self.count < config.experts.n_routed_experts  # there may be others' choices
        self.inner_numbers = 2 * inner * dim  # elements of one expert's gate_proj and up_proj

    def here(self, indices: Tensor, weights: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Map (N, K) choices to places in the stacks; returns indices and weights of each pass.

        A choice whose expert a pass does not hold gets the index `count`, if this place is
        `partial`: no expert is read for it, and its weight is of no use. (Weight 0 and any valid
        index have the same result, and cost more.) Each pass is run before the next is asked for,
        so the stacks may change between them. Here: one pass.
        """
        return [(indices, weights)]

    def look_ahead(self, x: Tensor) -> None:
        """Called with the input (N, D) before `here`. A place that fetches experts may use it."""

    def home(self, number: int) -> tuple[Experts, int]:
        """The stack where expert ids[number] lies for good, and its place there.

        Loading and saving ask for it.
        """
        return self, number

    def combine(self, y: Tensor) -> Tensor:
        """Add up the outputs (N, D) of several places. Here: one place."""
        return y

    def forward(self, run: Run, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts, (N, D), as the strategy `run` computes it."""
        y: Tensor | None = None
        for choices in self.here(indices, weights):
            part = run(self, x, *choices)
            y = part if y is None else y + part
        return self.combine(cast(Tensor, y))

    def inner(self, product: Callable[[Matrix], Tensor]) -> Tensor:
        """The experts' inner layer, (..., I). `product` multiplies the input by one matrix."""
        gate, up = products(product, self.gate_proj, self.up_proj)  # (..., I) each
        return swiglu(gate, up)


class MoE(nn.Module):
    """The feed-forward of a sparse layer."""

    dispatch: dict[str, Run]  # the strategy of each phase, "prefill" and "decode"; from build.py

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = Router(config)
        # of a phase, another way than the router's own, if the strategy has one; from build.py
        self.route: dict[str, Route | None] = {}
        self.experts = Experts(config)
        # The shared experts are one MLP: side by side, they sum to the same.
        width = config.experts.n_shared_experts * config.experts.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, width) if width else None
        # fp32 (M, E): a benchmark chooses by these (bench/routing.py)
        self.draws: Tensor | None = None

    def forward(self, x: Tensor, phase: str, multiply: Multiply = matmul) -> Tensor:
        """(B, S, D) -> (B, S, D). `multiply` is for the shared experts."""
        flat = x.flatten(0, 1)  # (N, D)
        how = [self.route[phase]] if self.route.get(phase) else []
        indices, weights = self.gate(flat, self.draws, *how)  # (N, K) each
        y = self.experts(self.dispatch[phase], flat, indices, weights).view_as(x)  # (B, S, D)
        return y if self.shared_experts is None else y + self.shared_experts(x, multiply)
