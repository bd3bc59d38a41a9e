"""The decode kernels that bench_kernels.py times: each with its inputs, its bytes and its twin.

Those of attention are in attention_cases.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r1 import Config, build
from r1.model.layers import Linear
from r1.model.moe import Experts
from r1.storage.dense import Dense
from r1.storage.kinds import KINDS, USUAL
from r1.storage.matrix import Matrix

EPS = 1e-6
MOST_COPIES = 128


@dataclass
class Case:
    """One kernel, or the few kernels of one function, at one size."""

    name: str
    nbytes: int
    """Bytes that must be read and written, each once."""
    flops: int
    copies: list[Any]
    """Copies of the weights, or of other inputs that must be cold."""
    run: Callable[[Any, Any], Any]
    """Runs the kernel on one of the copies. Launch parameters come second; None: the default."""
    twin: Callable[[Any], Any]
    """The same function in torch."""
    default: Any
    """The default launch parameters; None for a kernel without any."""
    outputs: Callable[[Any], Sequence[Tensor]] = lambda result: [result]
    """From the kernel's result to all tensors that it made, for comparison with the twin's."""


def randn(*size: int, scale: float = 1.0) -> Tensor:
    return torch.empty(size, dtype=torch.bfloat16).normal_(0.0, scale)


@dataclass
class Place:
    """The GPU on which the cases run: torch's default device."""

    chip: Any
    cold: int
    """The least bytes that a graph's weights take, so that the second-level cache has none of
    them."""
    quant: str = "none"
    """How the matrices of layers are stored."""
    round_x: bool = False
    """Whether the inputs of FP8 matrices become FP8."""

    def copies(self, nbytes: int) -> int:
        return max(2, min(MOST_COPIES, -(-self.cold // nbytes)))


def stored(weight: Tensor, quant: str) -> Matrix:
    """A matrix (out, in), or a stack of them, as `quant` stores it."""
    return Dense(weight) if quant == "none" else KINDS[quant].of(weight, USUAL[quant])


def step_case(place: Place, c: Config, tokens: int, context: int) -> Case:
    from r1.kernels.step import begin_step, begin_step_torch

    frequency = torch.rand(c.attention.qk_rope_head_dim // 2)

    def run(lengths: Tensor, _use: None) -> tuple[Tensor, Tensor, Tensor]:
        return begin_step(place.chip, lengths, 1, frequency, 1.0, c.attention.rope_interleave)

    def twin(lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return begin_step_torch(lengths, 1, frequency, 1.0, c.attention.rope_interleave)

    # It has no launch parameters, and no input that must be cold.
    nbytes = tokens * (2 * 8 + 2 * 4 * c.attention.qk_rope_head_dim)
    return Case(
        "step",
        nbytes,
        4 * tokens * c.attention.qk_rope_head_dim,
        [torch.full((tokens,), context - 1) for _ in range(8)],
        run,
        twin,
        None,
        list,
    )


def linear_case(
    name: str, place: Place, tokens: int, inputs: int, outputs: int, *, norm: bool = False,
    residual: bool = False, head: bool = False,
) -> Case:  # fmt: skip
    """With `head` it is the output head: its logits are fp32, and it is not quantized."""
    from r1.kernels.fixed import storage_sizes
    from r1.kernels.linear import linear, linear_torch
    from r1.kernels.linear_launch import LinearLaunch
    from r1.kernels.tiles import operand

    x = randn(tokens, inputs)
    dtype = torch.float32 if head else torch.bfloat16
    given: dict[str, Any] = {
        "norm": randn(inputs) if norm else None,
        "eps": EPS,
        "dtype": dtype,
    }
    given["residual"] = randn(tokens, outputs) if residual else None
    round_x = given["round_x"] = place.round_x and not head

    def run(weight: Matrix, use: LinearLaunch | None) -> Tensor:
        return linear(place.chip, x, weight, **given, launch=use)

    def twin(weight: Matrix) -> Tensor:
        return linear_torch(x, weight, **given)

    plain = randn(outputs, inputs, scale=inputs**-0.5)
    weight = stored(plain, "none" if head else place.quant)
    copies = place.copies(weight.nbytes) - 1
    weights = [weight, *(copy.deepcopy(weight) for _ in range(copies))]
    matrix = operand(weight, place.chip.ptx)
    bits = storage_sizes(place.chip, x, inputs, matrix, round_x=round_x)
    sizes = (tokens, inputs, outputs, 2, *bits)
    default = LinearLaunch.default(sizes, place.chip)
    moved = 2 * x.numel() + dtype.itemsize * tokens * outputs
    flops = 2 * tokens * outputs * inputs
    return Case(name, weight.nbytes + moved, flops, weights, run, twin, default)


def prompt_case(name: str, place: Place, tokens: int, inputs: int, outputs: int) -> Case:
    """A packed matrix made dense in one pass, then torch's product: of any number of tokens, so
    that it can be compared with `linear_case` of the same number.
    """
    from r1.kernels.prompt import dense

    x = randn(tokens, inputs)

    def run(weight: Matrix, _use: None) -> Tensor:
        return F.linear(x, dense(place.chip, weight, x.dtype))

    def twin(weight: Matrix) -> Tensor:
        return weight.matmul(x)

    weight = stored(randn(outputs, inputs, scale=inputs**-0.5), place.quant)
    copies = place.copies(weight.nbytes) - 1
    weights = [weight, *(copy.deepcopy(weight) for _ in range(copies))]
    # The dense numbers are written, and read again.
    moved = weight.nbytes + 2 * (2 * outputs * inputs + x.numel() + tokens * outputs)
    return Case(name, moved, 2 * tokens * outputs * inputs, weights, run, twin, None)


def gated_case(place: Place, c: Config, tokens: int) -> Case:
    """The norm, gate, up and SwiGLU of a dense feed-forward."""
    from r1.kernels.fixed import storage_sizes
    from r1.kernels.gated import gated, gated_torch
    from r1.kernels.linear_launch import LinearLaunch
    from r1.kernels.tiles import operand
    from r1.model.layers import MLP

    dim, inner = c.hidden_size, c.intermediate_size
    x, gain = randn(tokens, dim), randn(dim)

    def made() -> MLP:
        mlp: MLP = filled(lambda: MLP(dim, inner), dim**-0.5, place.quant)
        del mlp.down_proj
        return mlp

    def run(mlp: MLP, use: LinearLaunch | None) -> Tensor:
        return gated(place.chip, x, mlp, gain, EPS, use, place.round_x)

    def twin(mlp: MLP) -> Tensor:
        return gated_torch(x, mlp, gain, EPS, place.round_x)

    first = made()
    matrix = first.gate_proj.matrix
    nbytes = 2 * matrix.nbytes
    copies = [first, *(made() for _ in range(place.copies(nbytes) - 1))]
    stored_as = operand(matrix, place.chip.ptx)
    bits = storage_sizes(place.chip, x, dim, stored_as, round_x=place.round_x)
    sizes = (tokens, dim, 2 * inner, 2, *bits)
    default = LinearLaunch.default(sizes, place.chip)
    moved = 2 * x.numel() + 2 * tokens * inner
    flops = 4 * tokens * dim * inner
    return Case("dense_up", nbytes + moved, flops, copies, run, twin, default)


def route_case(place: Place, c: Config, tokens: int) -> Case:
    from r1.kernels.router import RouterLaunch, route, route_torch
    from r1.model.router import Router

    x, gain = randn(tokens, c.hidden_size), randn(c.hidden_size)

    def run(gate: Router, use: RouterLaunch | None) -> tuple[Tensor, Tensor, Tensor]:
        return route(place.chip, gate, x, gain, EPS, launch=use)

    def twin(gate: Router) -> tuple[Tensor, Tensor, Tensor]:
        return route_torch(gate, x, gain, EPS)

    def outputs(found: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        """The choices as weights of all experts, most 0: a token's choices have no order."""
        h, indices, weights = found
        return [h, torch.zeros(tokens, c.experts.n_routed_experts).scatter(1, indices, weights)]

    nbytes = 4 * c.experts.n_routed_experts * c.hidden_size
    gates = [Router(c).requires_grad_(False) for _ in range(place.copies(nbytes))]
    for gate in gates:
        gate.weight.normal_(0.0, 0.02)
    flops = 2 * tokens * c.experts.n_routed_experts * c.hidden_size
    default = RouterLaunch.default((tokens, c.experts.n_routed_experts, c.hidden_size), place.chip)
    return Case("route", nbytes + 4 * x.numel(), flops, gates, run, twin, default, outputs)


def filled(make: Callable[[], nn.Module], scale: float, quant: str) -> Any:
    """A module of random numbers, its gate and up matrices joined as a model's are."""
    device = torch.get_default_device()
    with torch.device("meta"):
        module = make().bfloat16().requires_grad_(False)
    module.to_empty(device=device)
    for parameter in module.parameters():
        parameter.normal_(0.0, scale)
    for each in module.modules():
        if isinstance(each, Linear):
            each.matrix = stored(each.matrix.dense(), quant)
        elif isinstance(each, Experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(each, name, stored(getattr(each, name).dense(), quant))
    build.join_matrices(module)
    return module


def experts_case(place: Place, c: Config, tokens: int) -> Case:
    from r1.kernels.experts import Swiglu, experts, experts_torch, stored_sizes
    from r1.kernels.experts_launch import ExpertsLaunch
    from r1.model.dispatch import Grouped
    from r1.model.layers import MLP, matmul
    from r1.model.moe import Experts
    from r1.model.rounded import Rounded
    from r1.storage import activations
    from r1.storage.activations import NEVER

    dim, inner, count, chosen = (
        c.hidden_size,
        c.experts.moe_intermediate_size,
        c.experts.n_routed_experts,
        c.experts.num_experts_per_tok,
    )
    more = c.experts.n_shared_experts
    routed = filled(lambda: Experts(c), 0.02, place.quant)
    matrices = (routed.gate_proj, routed.up_proj, routed.down_proj)
    one = sum(matrix.nbytes for matrix in matrices) // count  # bytes of an expert
    weights, residual, gain = torch.rand(tokens, chosen), randn(tokens, dim), randn(dim)
    x = F.rms_norm(residual, (dim,), gain, EPS)

    def run(cold: tuple[Tensor, MLP], use: ExpertsLaunch | None) -> Tensor:
        return experts(
            place.chip, x, cold[0], weights, routed, cold[1], residual, gain, EPS, use,
            round_x=place.round_x,
        )  # fmt: skip

    def twin(cold: tuple[Tensor, MLP]) -> Tensor:
        if tokens == 1:
            return experts_torch(
                x, cold[0], weights, routed, cold[1], residual, round_x=place.round_x
            )
        # torch's way for several tokens
        way = Rounded(Grouped(), 1 if place.round_x else NEVER)
        shared = cold[1](x, activations.multiply if place.round_x else matmul)
        return residual + way(routed, x, cold[0], weights) + shared

    drawn = [torch.rand(tokens, count).topk(chosen).indices for _ in range(8)]
    shared = [filled(lambda: MLP(dim, more * inner), 0.02, place.quant) for _ in drawn]
    hit = sum(i.unique().numel() for i in drawn) / len(drawn)
    operands = Swiglu.of(place.chip, *matrices)
    bits = stored_sizes(place.chip, x, inner, operands, None, place.round_x)
    sizes = (tokens, chosen, count, dim, inner, 2, *bits)
    default = ExpertsLaunch.default(sizes, place.chip)
    moved = int((hit + more) * one + 4 * x.numel())
    flops = tokens * (chosen + more) * 2 * 3 * dim * inner
    cold = list(zip(drawn, shared, strict=True))
    return Case(f"experts, {hit:.1f} hit", moved, flops, cold, run, twin, default)
