"""The router in one kernel: norm, fp32 logits, and each token's choice of experts.

The logits are spread over the chip. The program that finishes a token's last logit makes its
choice (choice.py).

Shapes: N tokens, D hidden_size, E routed experts, G groups, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from r1.kernels.chip import (
    Chip,
    Choices,
    Sizes,
    ceil_div,
    let_next_start,
    power_of_two,
    wait_for_previous,
)
from r1.kernels.choice import Rule, choose, load_bias, load_logits
from r1.kernels.fixed import Fixed, store_fixed
from r1.kernels.linear import gain_columns
from r1.kernels.narrow import Form, store_pairs
from r1.model.router import Router


@dataclass(frozen=True)
class RouterLaunch:
    """Each program makes the logits of `experts` experts for one token.

    It reads `columns` of the hidden state at a time.
    """

    experts: int
    columns: int
    warps: int

    @staticmethod
    def default(sizes: Sizes, chip: Chip) -> RouterLaunch:
        tokens, experts, dim = sizes
        if tokens == 1 and 4096 < dim <= 8192:
            # An expert's whole row at once, 28 KB of R1's: all of it comes before the wait, and x
            # is loaded once, for the norm and the logit. Three programs fit a processor of Hopper.
            return RouterLaunch(1, power_of_two(dim), 4)
        columns = min(2048, power_of_two(dim))
        # Each program reads its token twice to norm it. Where that is much, there are few programs.
        return (
            RouterLaunch(8, min(512, columns), 4)
            if tokens * experts * dim > 2**23
            else RouterLaunch(1, columns, 2 if dim > 4096 else 1)
        )

    @property
    def choices(self) -> Choices:
        columns = (512, 1024, 2048, 4096, 8192)
        return {"columns": columns, "warps": (1, 2, 4, 8), "experts": (1, 2, 4, 8)}


def route(
    chip: Chip, gate: Router, x: Tensor, gain: Tensor, eps: float, draws: Tensor | None = None,
    launch: RouterLaunch | None = None, fixed: Fixed | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x (N, D), the norm's gain (D,) -> normed x (N, D), indices int64 (N, K), weights fp32 (N, K).

    With `draws`, fp32 (any number, E), tokens choose by them as `Router.forward` says. `fixed` is
    memory for the normed x: it is stored there, too, in the form that the memory has (narrow.py).

    Without `fixed`, after one token's router, `up_vector_kernel` reads megabytes before its own
    wait. So it starts late, or it would delay the few bytes that the logits wait for. (A step of
    Moonlight on an H200: 1,718 us in bf16, and 1,768 if it starts when the choice is made; 1,318
    and 1,312 in FP8.)
    """
    e, (tokens, dim) = gate.shape, x.shape
    experts, chosen = e.n_routed_experts, e.num_experts_per_tok
    use = launch or chip.launch(RouterLaunch, tokens, experts, dim)
    h, logits = torch.empty_like(x), x.new_empty(tokens, experts, dtype=torch.float32)
    indices = x.new_empty(tokens, chosen, dtype=torch.int64)
    weights = x.new_empty(tokens, chosen, dtype=torch.float32)
    biased, programs = e.topk_method == "noaux_tc", ceil_div(experts, use.experts)
    form = Form.of(fixed) if fixed else Form(dim)
    chip.run(
        route_kernel, (programs, tokens), x, gain, eps, gate.weight,
        gate.e_score_correction_bias if biased else None, draws,
        0 if draws is None else draws.shape[0], h, logits,
        tickets(x.device, power_of_two(tokens, 64)), indices, weights, e.routed_scaling_factor,
        fixed, DIM=dim, BLOCK_E=use.experts, BLOCK_D=use.columns,
        PART=power_of_two(ceil_div(dim, programs), form.group), EACH=form.group, FP8=form.fp8,
        EARLY=tokens > 1 or fixed is not None, **Rule.of(e)._asdict(), warps=use.warps,
    )  # fmt: skip
    return h, indices, weights


def route_torch(
    gate: Router, x: Tensor, gain: Tensor, eps: float, draws: Tensor | None = None,
    fixed: None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The twin."""
    h = gain * F.rms_norm(x, gain.shape, eps=eps)
    return h, *gate(h, draws)


ROUTE = {"torch": route_torch, "triton": route}


@cache
def tickets(device: torch.device, tokens: int) -> Tensor:
    """Zeros, int32 (tokens,): how many programs have finished a token's logits.

    The last program sets the count back to 0. So one tensor serves all launches, which follow one
    another on a device.
    """
    return torch.zeros(tokens, dtype=torch.int32, device=device)


@triton.jit
def route_kernel(
    x, gain, eps, weight, bias, draws, drawn, h, logits, tickets, indices, weights, factor, fixed,
    DIM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, EXPERTS: tl.constexpr,
    PART: tl.constexpr, EACH: tl.constexpr, FP8: tl.constexpr, PAD: tl.constexpr,
    SPAN: tl.constexpr, CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, BEST: tl.constexpr, SIGMOID: tl.constexpr, NORMED: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_E experts' logits of one token.

    A token's first program also writes the normed x, and its last one chooses. Each stores PART
    columns in `fixed`, if it is given; the last one has chosen before. The norm comes first and is
    rounded, as layers.py does: the choice between near-tied experts depends on such bits.
    EARLY: the next kernel may start after the wait, and otherwise when the logits stand (see
    `route`).
    """
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    token = tl.program_id(1).to(tl.int64)
    # x is a row, as weights are: so Triton gives both the same threads, and x needn't move.
    d, real = tl.arange(0, BLOCK_D)[None, :], (expert < EXPERTS)[:, None]
    x, logits = x + token * DIM, logits + token * EXPERTS
    place = weight + expert[:, None] * DIM + d
    w = tl.load(place, mask=real & (d < DIM), other=0.0)
    g, added = gain_columns(gain, d, DIM), load_bias(bias, EXPERTS, PAD, GROUPS, SPAN)
    wait_for_previous(PDL)  # weights, the gain and the bias don't need it
    if EARLY:
        let_next_start(PDL)
    scale = norm_factor(x, d, eps, DIM, BLOCK_D)
    sums = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for start in range(0, DIM, BLOCK_D):
        at = start + d
        v = normed(tl.load(x + at, mask=at < DIM, other=0.0), scale, g)
        if tl.program_id(0) == 0:
            tl.store(h + token * DIM + at, v, mask=at < DIM)
        sums += w * v.to(tl.float32)
        w = tl.load(place + start + BLOCK_D, mask=real & (at + BLOCK_D < DIM), other=0.0)
        g = gain_columns(gain, at + BLOCK_D, DIM)
    tl.store(logits + expert, tl.sum(sums, axis=1), mask=expert < EXPERTS)
    if not EARLY:
        let_next_start(PDL)
    tl.debug_barrier()  # all threads' logits stand before the ticket that says so
    if tl.atomic_add(tickets + token, 1) == tl.num_programs(0) - 1:
        tl.store(tickets + token, 0)
        logit = load_logits(logits, EXPERTS, PAD, GROUPS, SPAN)
        choose(
            logit, added, draws, drawn, token, indices, weights, factor,
            EXPERTS, PAD, SPAN, CHOSEN, CHOSEN_PAD, GROUPS, KEPT, BEST, SIGMOID, NORMED,
        )  # fmt: skip
    if fixed is not None:
        store_part(fixed, x, scale, gain, token, DIM, PART, EACH, FP8)


@triton.jit
def store_part(
    fixed, x, factor, gain, token, DIM: tl.constexpr, PART: tl.constexpr, EACH: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """Store this program's columns of a token's normed x, if there are so many, as pairs of FP8 or
    as fixed-point numbers. EACH of them have one scale.
    """
    first = tl.program_id(0) * PART
    if first < DIM:
        at = first + tl.arange(0, PART)[None, :]
        v = tl.load(x + at, mask=at < DIM, other=0.0)
        v = normed(v, factor, gain_columns(gain, at, DIM)).to(tl.float32)
        if FP8:
            store_pairs(fixed, v, token, first, DIM, EACH)
        else:
            store_fixed(fixed, v, token, 1, first, DIM, DIM, EACH)


@triton.jit
def normed(v, factor, gain):
    """Columns of a token, times the norm's factor and the gain: rounded after each."""
    rounded = (v.to(tl.float32) * factor).to(v.dtype).to(tl.float32)
    return (rounded * gain.to(tl.float32)).to(v.dtype)


@triton.jit
def norm_factor(x, d, eps, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """By what RMSNorm multiplies a token. (Where x is one block, it is loaded once for this and the
    product.)
    """
    squares = tl.zeros((1, BLOCK_D), tl.float32)
    for start in range(0, DIM, BLOCK_D):
        v = tl.load(x + start + d, mask=start + d < DIM, other=0.0).to(tl.float32)
        squares += v * v
    return tl.rsqrt(tl.sum(squares) / DIM + eps)
