"""A token's choice of experts, from its logits, by every rule of r1/model/router.py.

One program makes it, and the kernels after it wait. So what counts are the steps that need the ones
before: reductions over the program's threads. There are two for all groups, and two for each chosen
expert. (R1's choice takes some 2,000 cycles of an H100 so, by its instructions. With three
reductions for each group, and argmax for each expert, these were 5,900.)

Shapes: E routed experts, G groups, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from r1.kernels.chip import power_of_two
from r1.kernels.linear import gain_columns
from r1.model.config import ExpertShape


class Rule(NamedTuple):
    """A model's rule as the constants of `choose`."""

    EXPERTS: int
    PAD: int
    """Places of experts (`expert_at`)."""
    SPAN: int
    """Places of a group."""
    CHOSEN: int
    CHOSEN_PAD: int
    GROUPS: int
    KEPT: int
    """Groups that experts are chosen from."""
    BEST: int
    """Experts whose scores are a group's."""
    SIGMOID: int
    NORMED: int

    @staticmethod
    def of(e: ExpertShape) -> Rule:
        experts, chosen = e.n_routed_experts, e.num_experts_per_tok
        groups = 1 if e.topk_method == "greedy" else e.n_group
        span = power_of_two(experts // groups)
        return Rule(
            experts, power_of_two(groups) * span, span, chosen, power_of_two(chosen), groups,
            e.topk_group, 2 if e.topk_method == "noaux_tc" else 1, int(e.scoring_func == "sigmoid"),
            int(e.norm_topk_prob),
        )  # fmt: skip


@triton.jit
def expert_at(place, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr):
    """The expert at a place, and whether there is one. Each group has SPAN places, as Triton's
    tensors need it: a power of two.
    """
    SIZE: tl.constexpr = EXPERTS // GROUPS
    group, member = place // SPAN, place % SPAN
    return group * SIZE + member, (group < GROUPS) & (member < SIZE)


@triton.jit
def load_bias(
    bias, EXPERTS: tl.constexpr, PAD: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr
):
    """The bias of the expert at each of PAD places, or 0. Where no expert is, any number."""
    expert, _real = expert_at(tl.arange(0, PAD), EXPERTS, GROUPS, SPAN)
    return gain_columns(bias, expert, EXPERTS)


@triton.jit
def load_logits(
    logits, EXPERTS: tl.constexpr, PAD: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr
):
    """A token's logit of the expert at each of PAD places, or minus infinity."""
    expert, real = expert_at(tl.arange(0, PAD), EXPERTS, GROUPS, SPAN)
    return tl.load(logits + expert, mask=real, other=float("-inf"))


@triton.jit
def choose(
    logit, added, draws, drawn, token, indices, weights, factor, EXPERTS: tl.constexpr,
    PAD: tl.constexpr, SPAN: tl.constexpr, CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr, SIGMOID: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    """A token's choice by its `logit`s; of equals the first wins. `draws` (drawn, EXPERTS) stand in
    for the scores, if given. `logit`, `added`: what `load_logits` and `load_bias` have loaded.
    """
    expert, real = expert_at(tl.arange(0, PAD), EXPERTS, GROUPS, SPAN)
    if SIGMOID:
        scores = tl.sigmoid(logit)
    else:
        powers = tl.exp(logit - tl.max(logit, axis=0))
        scores = powers / tl.sum(powers, axis=0)
    choice = scores
    if draws is not None:
        choice = tl.load(draws + token % drawn * EXPERTS + expert, mask=real, other=0.0)
    choice += added
    # NaN scores still select valid experts. Their weight stays NaN.
    choice = tl.where(choice == choice, choice, -1e30)
    choice = tl.where(real, choice, float("-inf"))
    if GROUPS > 1:
        choice = within_groups(tl.reshape(choice, (PAD // SPAN, SPAN)), KEPT, BEST)
    place = largest_places(tl.reshape(choice, (PAD,)), CHOSEN, CHOSEN_PAD)
    k = tl.arange(0, CHOSEN_PAD)
    weight = tl.where(k < CHOSEN, tl.gather(scores, place, axis=0), 0.0)  # (CHOSEN_PAD,)
    if NORMED:
        weight /= tl.sum(weight, axis=0) + 1e-20
    index, _real = expert_at(place, EXPERTS, GROUPS, SPAN)
    tl.store(indices + token * CHOSEN + k, index.to(tl.int64), mask=k < CHOSEN)
    tl.store(weights + token * CHOSEN + k, weight * factor, mask=k < CHOSEN)


@triton.jit
def within_groups(choice, KEPT: tl.constexpr, BEST: tl.constexpr):
    """`choice` (groups, SPAN), with minus infinity outside of the KEPT groups whose BEST experts,
    one or two, have the largest sum.
    """
    if BEST == 2:
        none = tl.full(choice.shape, float("-inf"), tl.float32)
        best, second = tl.reduce((choice, none), 1, two_largest)
        worth = best + second
    else:
        worth = tl.max(choice, axis=1)
    group = tl.arange(0, choice.shape[0])
    ours, theirs = worth[:, None], worth[None, :]
    ahead = (theirs > ours) | ((theirs == ours) & (group[None, :] < group[:, None]))
    rank = tl.sum(ahead.to(tl.int32), axis=1)
    return tl.where((rank < KEPT)[:, None], choice, float("-inf"))


@triton.jit
def two_largest(a, b, c, d):
    """Of a >= b and c >= d."""
    return tl.maximum(a, c), tl.maximum(tl.minimum(a, c), tl.maximum(b, d))


@triton.jit
def largest_places(v, CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr):
    """The places of the CHOSEN largest numbers of v, fp32, the largest first: int32 (CHOSEN_PAD,).

    They are compared as whole numbers, whose maximum over a warp is one instruction on NVIDIA's
    chips from sm_80 on. An fp32 number with its place takes five steps, each of ten.
    """
    PAD: tl.constexpr = v.shape[0]
    bits = (v + 0.0).to(tl.int32, bitcast=True)  # minus zero becomes zero
    rest = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the numbers
    here, k = tl.arange(0, PAD), tl.arange(0, CHOSEN_PAD)
    places = tl.zeros((CHOSEN_PAD,), tl.int32)
    for i in tl.static_range(CHOSEN):
        most = tl.max(rest, axis=0)
        first = tl.min(tl.where(rest == most, here, PAD), axis=0)
        places = tl.where(k == i, first, places)
        rest = tl.where(here == first, -0x80000000, rest)  # less than any number
    return places
