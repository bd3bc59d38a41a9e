"""The router of a prompt: logits by the matrix units, and then each token's choice (choice.py).

fp32 products have no matrix units, for TensorFloat32 would round what decides between experts. But
x is bf16, and an fp32 weight is the sum of three bf16 numbers, which hold 8 of its 24 bits each. So
three products of bf16 numbers, which are exact, add up to the same.

Shapes: N tokens, D hidden_size, E routed experts, K experts per token, M rows of draws.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.chip import Chip, ceil_div, let_next_start, product, wait_for_previous
from r1.kernels.choice import Rule, choose, load_bias, load_logits
from r1.model.router import Router

EXPERTS, TOKENS, COLUMNS, STAGES = 64, 32, 64, 4
"""Of a program. Few tokens, so that 4,096 of them are work for all processors."""
PARTS = 2
"""Programs that share these logits: each takes a part of D. A step is a chain of products, so two
programs of a processor wait less than one.
"""


def route(gate: Router, x: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`Router.forward` of x (N, D), where that is bf16. Other numbers are left to the router."""
    if x.dtype != torch.bfloat16:
        return gate.forward(x, draws)
    e = gate.shape
    bias = gate.e_score_correction_bias if e.topk_method == "noaux_tc" else None
    given = (x, gate.weight, bias, draws, e.routed_scaling_factor, list(Rule.of(e)))
    return _operator(*given) if torch.compiler.is_compiling() else launch(Chip.of(x.device), *given)


def launch(
    chip: Chip, x: Tensor, weight: Tensor, bias: Tensor | None, draws: Tensor | None,
    factor: float, rule: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (N, D), weight (E, D), bias (E,), draws (M, E), a `Rule` -> `Router.forward`'s results."""
    x, how = x.contiguous(), Rule(*rule)
    (tokens, dim), experts = x.shape, how.EXPERTS
    logits = x.new_empty(PARTS, tokens, experts, dtype=torch.float32)
    indices, weights = results(x, how.CHOSEN)
    chip.run(
        logits_kernel, (ceil_div(tokens, TOKENS), ceil_div(experts, EXPERTS), PARTS), x, weight,
        logits, tokens, experts, DIM=dim, PART=ceil_div(dim, PARTS * COLUMNS) * COLUMNS,
        BLOCK_E=EXPERTS, ROWS=TOKENS, BLOCK_D=COLUMNS, warps=4, stages=STAGES,
    )  # fmt: skip
    drawn = 0 if draws is None else len(draws)
    chip.run(
        choose_kernel, (tokens,), logits, bias, draws, drawn, indices, weights, factor, tokens,
        PARTS=PARTS, **how._asdict(), warps=1,
    )  # fmt: skip
    return indices, weights


def results(x: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Memory for indices, int64 (N, K), and weights, fp32 (N, K)."""
    shape = len(x), chosen
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("r1::route", mutates_args=())
def _operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, draws: Tensor | None, factor: float,
    rule: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`launch`, which torch.compile takes as a whole."""
    return launch(Chip.of(x.device), x, weight, bias, draws, factor, rule)


@_operator.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, draws: Tensor | None, factor: float,
    rule: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return results(x, Rule(*rule).CHOSEN)


@triton.jit
def logits_kernel(
    x, weight, logits, tokens, experts, DIM: tl.constexpr, PART: tl.constexpr,
    BLOCK_E: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What PART columns add to the logits of BLOCK_E experts for ROWS tokens: transposed, as
    experts are the more. Each part has logits of its own, (PARTS, N, E).
    """
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[None, :]
    expert = (tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E))[:, None]
    column = tl.arange(0, BLOCK_D)
    wait_for_previous(PDL)
    let_next_start(PDL)
    sums = tl.zeros((BLOCK_E, ROWS), tl.float32)
    start = tl.program_id(2) * PART
    for first in range(0, PART, BLOCK_D):
        at = start + first + column
        inside = (at < DIM)[None, :] & (expert < experts)
        w = tl.load(weight + expert * DIM + at[None, :], mask=inside, other=0.0)
        inside = (at < DIM)[:, None] & (token < tokens)
        v = tl.load(x + token * DIM + at[:, None], mask=inside, other=0.0)  # (BLOCK_D, ROWS)
        high = first_bits(w)
        middle = first_bits(w - high)
        low = w - high - middle
        # The units cut what they add up to some bits more than fp32 has. So what is small comes
        # first, and a step's sums are added in fp32.
        step = product(low.to(tl.bfloat16), v, tl.zeros(sums.shape, tl.float32))
        step = product(middle.to(tl.bfloat16), v, step)
        sums += product(high.to(tl.bfloat16), v, step)
    place = logits + (tl.program_id(2) * tokens + token) * experts + expert
    tl.store(place, sums, mask=(token < tokens) & (expert < experts))


@triton.jit
def first_bits(v):
    """fp32 numbers without the last 16 bits of each: bf16 holds them. (To round them instead would
    take three conversions of single numbers, which are slow.)
    """
    return (v.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def choose_kernel(
    logits, bias, draws, drawn, indices, weights, factor, tokens, PARTS: tl.constexpr,
    EXPERTS: tl.constexpr, PAD: tl.constexpr, SPAN: tl.constexpr, CHOSEN: tl.constexpr,
    CHOSEN_PAD: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
    SIGMOID: tl.constexpr, NORMED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token's choice, by the sums of its logits' parts."""
    added = load_bias(bias, EXPERTS, PAD, GROUPS, SPAN)
    wait_for_previous(PDL)
    let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    logit = load_logits(logits + token * EXPERTS, EXPERTS, PAD, GROUPS, SPAN)
    for part in tl.static_range(1, PARTS):
        place = logits + (part * tokens + token) * EXPERTS
        logit += load_logits(place, EXPERTS, PAD, GROUPS, SPAN)
    choose(
        logit, added, draws, drawn, token, indices, weights, factor,
        EXPERTS, PAD, SPAN, CHOSEN, CHOSEN_PAD, GROUPS, KEPT, BEST, SIGMOID, NORMED,
    )  # fmt: skip
