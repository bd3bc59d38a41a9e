"""The figure of the router: one token of tiny-r1 chooses its experts."""

from __future__ import annotations

from pathlib import Path

import shared
from canvas import MUTED, Canvas

import r1
from r1.model.moe import MoE
from r1.model.shapes import R1
from r1.tour.router import Choice
from r1.tour.run import follow, load, prompt_of

TEXT, LAYER, PLACE = "12+30=?", 1, 7
"""The token: its bias and its groups both change the choice."""
LEFT, STEP = 30, 47
"""Where the first expert stands, and pixels from one to the next."""
SCALE, BASE = 190, 228
"""Pixels of a score of 1, and where bars stand."""


def router() -> str:
    """Scores, bias, groups, choice and weights, from above to below."""
    engine = load(
        Path(shared.ROOT / "weights" / "tiny-r1"), {"device": "cpu", "dtype": "fp32"}, drafts=1
    )
    tour = follow(engine, prompt_of(engine, TEXT), LAYER, new=1)
    mlp = engine.model.layers[LAYER].mlp
    assert isinstance(mlp, MoE) and engine.tokenizer is not None
    piece = engine.tokenizer.decode([tour.prompt.tokens[PLACE]])
    return drawn(Choice.of(tour.read, mlp.gate), engine.config, piece)


def drawn(choice: Choice, config: r1.Config, piece: str) -> str:
    """The picture of one token's choice."""
    e = config.experts
    scores, bias = choice.scores[PLACE].tolist(), choice.bias.tolist()
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    assert choice.group_scores is not None and choice.closed is not None
    group_scores, closed = choice.group_scores[PLACE].tolist(), choice.closed[PLACE].tolist()
    chosen = dict(zip(choice.indices[PLACE].tolist(), choice.weights[PLACE].tolist(), strict=True))
    c = Canvas(610, "The router: scores and bias, groups, the best experts, unbiased weights")
    c.heading(
        24, f"The router: token {PLACE}, “{piece}”, of “{TEXT}” in layer {LAYER} of tiny-r1",
        f"{e.n_routed_experts} experts in {e.n_group} groups; R1 has {R1.experts.n_routed_experts} "
        f"in {R1.experts.n_group}. Blue: the score s. Orange: the bias b on top of it. Red: a "
        "negative b, taken off.",
    )  # fmt: skip
    size = e.n_routed_experts // e.n_group
    c.step(76, "1. Score: s = sigmoid(logits). The numbers are s + b.")
    for group in range(e.n_group):
        x, width = LEFT + group * size * STEP - 10, size * STEP - 4
        kind = "plain" if closed[group] else "cache"
        c.box(x, 92, width, 186, kind=kind)
        counted = [f"{group_scores[group]:.3f}", "closed" if closed[group] else "open"]
        c.box(x, 318, width, 44, counted, "no" if closed[group] else kind)
    for expert, (s, b) in enumerate(zip(scores, bias, strict=True)):
        x = LEFT + expert * STEP
        c.bar(x, BASE - s * SCALE, 24, s * SCALE, "query")
        c.bar(x, BASE - (s + max(b, 0)) * SCALE, 24, abs(b) * SCALE, "weight" if b > 0 else "no")
        c.text(x + 12, BASE + 14, f"{s + b:.3f}", 12)
        c.text(x + 12, BASE + 33, f"e{expert}", 12.5, bold=expert in chosen)
    open_ = f"The best {e.topk_group} are open."
    c.step(300, f"2. Groups: a group counts as the sum of its best two s + b. {open_}")
    c.step(388, f"3. Choose the best {e.num_experts_per_tok} s + b of the open groups.")
    best_closed = max((x for x in range(len(biased)) if closed[x // size]), key=lambda x: biased[x])
    rank = sorted(biased, reverse=True).index(biased[best_closed]) + 1
    for expert in (*chosen, best_closed):
        kind = "cache" if expert in chosen else "no"
        c.box(LEFT + expert * STEP - 6, 404, 36, 26, f"e{expert}", kind, 12.5)
    x = LEFT + best_closed * STEP + 36
    c.text(x, 410, f"number {rank} of all {len(scores)},", 12, anchor="start", color=MUTED)
    c.text(x, 426, "but its group is closed", 12, anchor="start", color=MUTED)
    c.step(456, "4. Weigh by s alone: b helps to choose, but does not change the weights.")
    for expert, weight in chosen.items():
        x = LEFT + expert * STEP
        c.bar(x, 530 - 30 * weight, 24, 30 * weight, "query")
        c.text(x + 12, 543, f"{weight:.2f}", 12.5, bold=True)
    total = sum(scores[expert] for expert in chosen)
    factor = f"{e.routed_scaling_factor:g} s / {total:.3f}"
    c.note(
        572,
        f"weight = {factor}, where {total:.3f} is the sum of the chosen s. The output is the sum "
        "of weight x expert(x),",
        "plus the shared expert, which every token uses.",
    )
    return c.svg()
