"""The page of the router: which experts each token chose, and why.

Shapes: N tokens, E experts, G groups, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r1.model.config import ExpertShape
from r1.model.moe import MoE
from r1.model.router import Router
from r1.tour.text import INDENT, flow, padded, paragraph
from r1.tour.watch import Made, named

MOST_TOKENS = 24
"""Tokens of a prompt that are shown one by one: the last ones."""
MOST_GROUPS = 8
"""Groups of a token in one line."""
MOST_CHOICES = 12
"""Experts that are shown of one token: the best ones."""
TOKEN = 32
"""Columns of a token."""


@dataclass(frozen=True)
class Choice:
    """What a router computed for the tokens of one call, on the CPU. Choices go by weight."""

    scores: Tensor  # fp32 (N, E), called s here
    bias: Tensor  # fp32 (E,), called b; zeros where the router has none
    group_scores: Tensor | None  # fp32 (N, G); None without groups
    closed: Tensor | None  # bool (N, G)
    indices: Tensor  # int64 (N, K)
    weights: Tensor  # fp32 (N, K)

    @staticmethod
    def of(made: list[Made], gate: Router) -> Choice:
        """From what was watched while the router ran."""
        indices, weights = named(made, MoE, "indices"), named(made, MoE, "weights")
        scores = named([m for m in made if m.method == "forward"], Router, "scores")
        assert indices is not None and weights is not None and scores is not None
        bias = getattr(gate, "e_score_correction_bias", torch.zeros(scores.shape[1]))
        groups, closed = named(made, Router, "group_scores"), named(made, Router, "closed")
        order = weights.argsort(dim=-1, descending=True)
        return Choice(
            scores.cpu(), bias.cpu(), None if groups is None else groups.cpu(),
            None if closed is None else closed.cpu(), indices.gather(1, order).cpu(),
            weights.gather(1, order).cpu(),
        )  # fmt: skip


def router_page(
    made: list[Made], mlp: object, layer: int, pieces: list[str], place: int
) -> list[str]:
    """The page. `mlp` is the layer's feed-forward, `pieces` are the prompt's tokens as text.

    `place` is that of the token whose choice is explained.
    """
    if not isinstance(mlp, MoE):
        dense = f"Layer {layer} is dense: all tokens use the same feed-forward."
        return ["3. Which experts?", *paragraph(dense)]
    choice = Choice.of(made, mlp.gate)
    head = f"3. Which experts? The router of layer {layer}"
    return [
        head, *paragraph(*rule(mlp.gate.shape)), "", *tokens(choice, pieces), "",
        *why(choice, pieces, place),
    ]  # fmt: skip


def rule(e: ExpertShape) -> list[str]:
    """How a router of this shape chooses, in sentences."""
    biased = e.topk_method == "noaux_tc"
    takes = f"It takes those of the largest {'s + b' if biased else 's'}"
    if e.topk_method != "greedy" and e.n_group > 1:
        counts = "the sum of its best two" if biased else "its best one"
        takes += f" in the best {e.topk_group} of {e.n_group} groups; a group counts as {counts}"
    bias = "b is a bias that training moved until all experts had about the same load."
    factor = f"{e.routed_scaling_factor:g} " if e.routed_scaling_factor != 1 else ""
    weights = f"{factor}s / (the sum of the chosen s)" if e.norm_topk_prob else f"{factor}s"
    return [
        f"There are {e.n_routed_experts} experts, and a token takes {e.num_experts_per_tok}.",
        f"s = {e.scoring_func}(logits). {takes}.",
        bias if biased else "",
        f"The weights are {weights}{', without b' if biased else ''}.",
    ]


def tokens(choice: Choice, pieces: list[str]) -> list[str]:
    """A line for each token: its groups, its experts and their weights."""
    scores, closed = choice.group_scores, choice.closed
    grouped = scores is not None and closed is not None
    width = TOKEN + (6 * min(scores.shape[1], MOST_GROUPS) + 2 if scores is not None else 0)
    heading = padded(f"{INDENT}token", TOKEN) + ("groups (*: open)" if grouped else "")
    lines = [padded(heading, width) + "experts: weights"]
    first = max(0, len(pieces) - MOST_TOKENS)
    lines += [f"{INDENT}... {first} tokens before these ..."] if first else []
    for place in range(first, len(pieces)):
        started = [padded(f"{place:5} {pieces[place]}", TOKEN)]
        if scores is not None and closed is not None:
            each = zip(scores[place].tolist(), closed[place].tolist(), strict=True)
            parts = [f"{score:.2f}{' ' if shut else '*'}" for score, shut in each]
            started = flow(started[0], parts, " " * TOKEN, gap=" ")
        chosen = zip(choice.indices[place].tolist(), choice.weights[place].tolist(), strict=True)
        weights = [f"{expert}: {weight:.2f}" for expert, weight in chosen]
        lines += [*started[:-1], *flow(padded(started[-1], width), weights, " " * TOKEN)]
    return lines


def why(choice: Choice, pieces: list[str], place: int) -> list[str]:
    """The best experts of one token, chosen or not, and the reason."""
    scores, biased = choice.scores[place], choice.scores[place] + choice.bias
    chosen = choice.indices[place].tolist()
    weight = dict(zip(chosen, choice.weights[place].tolist(), strict=True))
    best = {*biased.argsort(descending=True)[:MOST_CHOICES].tolist(), *weight}
    lines = [
        f"{INDENT}Why? The {len(best)} best of {len(scores)} experts for token {place}, "
        f"{pieces[place]}:",
        f"{INDENT}expert  group      s        b    s + b",
    ]
    for expert in sorted(best, key=lambda each: -float(biased[each])):
        group, reason = "-", f"no: {len(weight)} others are better"
        if choice.closed is not None:
            number = expert * choice.closed.shape[1] // len(scores)
            group = str(number)
            reason = f"no: group {number} is closed" if choice.closed[place, number] else reason
        reason = f"yes, weight {weight[expert]:.2f}" if expert in weight else reason
        lines.append(
            f"{INDENT}{expert:6} {group:>6} {scores[expert]:6.3f}  {choice.bias[expert]:+7.3f}  "
            f"{biased[expert]:7.3f}   {reason}"
        )
    return lines
