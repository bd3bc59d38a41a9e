"""The figure of the MTP layer, and of one turn of speculation."""

from __future__ import annotations

from pathlib import Path

import shared
from canvas import MUTED, Canvas

from r1.model.shapes import R1
from r1.tour.run import Turn, follow, load, prompt_of

TEXT, DRAFTS = "12+30=?", 2
D = f"{R1.hidden_size:,}"
COLUMNS = (330, 510, 690)
"""The middle of each of the turn's places."""


def speculation() -> str:
    """The MTP layer above, and below it the first turn of a tour that rejects its second draft."""
    weights = Path(shared.ROOT / "weights" / "tiny-r1")
    engine = load(weights, {"device": "cpu", "dtype": "fp32"}, DRAFTS)
    tour = follow(engine, prompt_of(engine, TEXT), layer=0, new=12)
    assert engine.tokenizer is not None
    number = next(n for n, turn in enumerate(tour.turns) if n and turn.accepted == 1)
    decode = engine.tokenizer.decode
    texts = {token: repr(decode([token])) for token in range(engine.config.vocab_size)}
    return drawn(tour.turns[number], tour.turns[number + 1], number + 1, texts)


def drawn(turn: Turn, following: Turn, number: int, texts: dict[int, str]) -> str:
    """The picture of a turn; `following` is the next one. `texts`: each token in quotes."""
    c = Canvas(636, "The MTP layer, and a turn of speculation")
    c.heading(24, "The MTP layer drafts: from token i + 1 and the model's state at i, token i + 2",
              "Sizes are R1's. Orange: the MTP layer's own weights.")  # fmt: skip
    mtp_layer(c, 66)
    c.arrow((20, 214), (810, 214), tip=False)
    c.heading(
        240, f"One turn: the model judges {DRAFTS} drafts in one step",
        f"Turn {number} of `python -m r1.tour`, whose text is “12 + 30: ...”.",
    )  # fmt: skip
    last, *drafts = (texts[token] for token in turn.read)
    new = [texts[token] for token in turn.new]
    labels = ("place", "the model reads", "it would choose next", "the draft for that",
              "new tokens", "the MTP layer reads", "the next turn, at L + 2")  # fmt: skip
    rows = [300 + 44 * row for row in range(len(labels))]
    for y, label in zip(rows, labels, strict=True):
        c.step(y, label)
    for x, place in zip(COLUMNS, ("L", "L + 1", "L + 2"), strict=True):
        c.text(x, rows[0], place, 13, color=MUTED)
    again, *next_drafts = (texts[token] for token in following.read)
    cells: list[list[tuple[str, str] | None]] = [
        [(last, "plain"), (drafts[0], "query"), (drafts[1], "query")],
        [(new[0], "cache"), (new[1], "cache"), ("discarded", "white")],
        [(f"{drafts[0]}: accepted", "cache"), (f"{drafts[1]}: rejected", "no"), None],
        [(new[0], "cache"), (new[1], "cache"), None],
        [
            (f"state of {last}, {new[0]}", "weight"),
            (f"state of {drafts[0]}, {new[1]}", "weight"),
            None,
        ],
        [(again, "plain"), *((draft, "query") for draft in next_drafts)],
    ]
    for y, row in zip(rows[1:], cells, strict=True):
        for x, cell in zip(COLUMNS, row, strict=True):
            if cell:
                c.box(x - 80, y - 15, 160, 30, cell[0], cell[1], 13)
    c.note(
        600,
        "The first draft is made from the MTP layer's output at the last new token, the second "
        "from the layer's own output.",
        "The model reads its weights once for all 3 tokens; only the experts differ from token to "
        "token.",
    )
    return c.svg()


def mtp_layer(c: Canvas, y: float) -> None:
    """The layer, from left to right."""
    c.box(20, y, 200, 40, ["the model's state at i", f"D = {D}"], "plain", 12.5)
    c.box(20, y + 72, 200, 40, ["embedding of token i + 1", f"D = {D}"], "plain", 12.5)
    c.arrow((220, y + 20), (240, y + 20))
    c.arrow((220, y + 92), (240, y + 92))
    c.box(240, y + 3, 70, 34, "hnorm", "weight", 12.5)
    c.box(240, y + 75, 70, 34, "enorm", "weight", 12.5)
    c.arrow((310, y + 20), (330, y + 20), (330, y + 46), (348, y + 46))
    c.arrow((310, y + 92), (330, y + 92), (330, y + 66), (348, y + 66))
    c.box(348, y + 36, 92, 40, ["eh_proj", "2 D to D"], "weight", 12.5)
    c.arrow((440, y + 56), (462, y + 56))
    c.box(462, y + 30, 140, 52, ["a block", "attention, experts,", "own cache"], "weight", 11.5)
    c.arrow((602, y + 56), (622, y + 56))
    c.box(622, y + 39, 56, 34, "norm", "weight", 12.5)
    c.arrow((678, y + 56), (698, y + 56))
    c.box(698, y + 30, 112, 52, ["the model's", "output head"], "plain", 12.5)
    c.arrow((754, y + 82), (754, y + 104))
    c.text(810, y + 116, "logits of token i + 2", 12.5, bold=True, anchor="end")
