"""The pages of a tour, as lines of text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import r1
from r1.model.attend import Attend, UpProjection
from r1.model.dispatch import Dispatch
from r1.model.gqa_attend import GroupedAttend
from r1.model.layers import MLP
from r1.model.moe import MoE
from r1.model.shapes import R1
from r1.model.transformer import Block
from r1.tour import weigh
from r1.tour.letters import Letters, inner_sizes, numbers, sizes_of
from r1.tour.router import MOST_TOKENS, router_page
from r1.tour.run import Tour, Turn
from r1.tour.text import INDENT, columns, flow, padded, paragraph
from r1.tour.watch import Made

R1_DTYPE = "bf16"
"""The dtype in which R1's bytes are counted."""
CONTEXT = 4096
"""The cached tokens that the next token's bytes are counted for."""

ABSORBS = "q_c is the query with W_UK absorbed, to be compared with the latents themselves."


class Pages:
    """All pages of one tour. `name` is the model's.

    `place` is that of the token whose experts are explained: -1 is the prompt's last.
    """

    def __init__(self, engine: r1.Engine, tour: Tour, name: str, place: int = -1) -> None:
        self.place = range(len(tour.prompt.tokens))[place]
        self.engine, self.tour, self.name = engine, tour, name[:16]
        self.config, self.backend = engine.config, engine.backend
        self.mlp = cast(Block, engine.model.layers[tour.layer]).mlp

    def lines(self) -> list[str]:
        pieces = [self.piece(token) for token in self.tour.prompt.tokens]
        pages = [
            [
                f"{self.name}: one prompt through the model, {self.backend.dtype} on "
                f"{self.backend.device}",
                "The letters are those of r1/README.md. R1 is DeepSeek-R1, for as many tokens.",
            ],
            self.text(pieces),
            self.prompt(),
            router_page(self.tour.read, self.mlp, self.tour.layer, pieces, self.place),
            self.step(),
            self.cache(),
            self.bytes_of_a_token(),
            self.drafts(),
        ]
        return [line for page in pages for line in (*page, "")][:-1]

    def piece(self, token: int) -> str:
        """A token as text, in quotes."""
        tokenizer = self.engine.tokenizer
        return repr(tokenizer.decode([token])) if tokenizer else f"token {token}"

    def text(self, pieces: list[str]) -> list[str]:
        prompt = self.tour.prompt
        how = f"{len(pieces)} token ids were given"
        if prompt.text is not None:
            template = f"in the chat template {prompt.template}" if prompt.template else "as it is"
            how = f"{prompt.text!r}, {template}, makes {len(pieces)} tokens; here with their ids"
        first = max(0, len(pieces) - MOST_TOKENS)
        listed = [f"{p} {t}" for p, t in zip(pieces, prompt.tokens, strict=True)][first:]
        if first:
            how += f" (the first {first} are left out)"
        return ["1. Text becomes tokens", *paragraph(f"{how}:"), *flow(INDENT, listed, INDENT)]

    def prompt(self) -> list[str]:
        tokens, last = len(self.tour.prompt.tokens), self.config.num_hidden_layers - 1
        return [
            "2. The prompt is read",
            *paragraph(
                f"Its S = {tokens} tokens go through the model at once. They are B = 1 row, and "
                f"see T = {tokens} keys, their own. Here is what layer {self.tour.layer} (of 0 to "
                f"{last}) makes, line by line of its code.",
                self.strategies(self.backend.prefill_attention, self.backend.prefill_moe),
            ),
            *self.table(self.tour.read, tokens, tokens),
            *paragraph(
                f"The output head makes W = {self.config.vocab_size} logits of the last token's x. "
                f"The largest chooses the first new token: {self.piece(self.tour.new[0])}."
            ),
        ]

    def strategies(self, attention: str, experts: str) -> str:
        sparse = f", the experts are `{experts}`" if isinstance(self.mlp, MoE) else ""
        return f"The attention is `{attention}`{sparse}."

    def step(self) -> list[str]:
        slots = self.tour.slots
        sees = f"It sees the cache, which has T = {slots} slots; a bias hides the unwritten ones."
        shown = Attend | UpProjection | GroupedAttend | Dispatch
        made = [m for m in self.tour.step if isinstance(m.owner, shown)]
        return [
            "4. One token more",
            *paragraph(
                f"The new token goes in alone: S = 1. {sees}",
                self.strategies(self.backend.attention, self.backend.moe),
                ABSORBS if any(m.name == "q_c" for m in made) else "",
                "All other lines are as before, with S = 1.",
            ),
            *self.table(made, 1, slots),
        ]

    def table(self, made: list[Made], new: int, slots: int) -> list[str]:
        """Each tensor: where it is made, its name, its shape in letters and in numbers.

        Letters are left out where they are not known to be this shape's. `new` and `slots` are S
        and T.
        """
        lines = [f"{INDENT}{'':23}{'name':13}{'shape':19}{self.name:20}R1"]
        own, other = (sizes_of(config, 1, new, slots) for config in (self.config, R1))
        depth = min((m.depth for m in made), default=0)
        for m in last_of_each(made):
            kind = self.inner(m)
            inner, inner_r1 = ({"I": inner_sizes(c)[kind]} for c in (self.config, R1))
            shape = tuple(m.tensor.shape)
            letters = m.letters if m.letters and numbers(m.letters, own | inner) == shape else ()
            where = "  " * (m.depth - depth) + f"{m.file}:{m.line}"
            at_r1 = times(numbers(letters, other | inner_r1) or ())
            line = f"{where:23}{m.name:13}{written(letters):19}{times(shape):20}{at_r1}"
            lines.append(f"{INDENT}{line}".rstrip())
        return lines

    def inner(self, made: Made) -> str:
        """Whose inner size the letter I is, at a line of code."""
        if isinstance(made.owner, Dispatch):
            return "expert"
        return "shared" if isinstance(made.owner, MLP) and isinstance(self.mlp, MoE) else "dense"

    def cache(self) -> list[str]:
        both = ((self.config, self.backend.dtype), (R1, R1_DTYPE))
        rows = [f"{INDENT}{'':40}{f'{self.name}, {both[0][1]}':>22}{f'R1, {R1_DTYPE}':>20}"]

        def row(label: str, numbers: Iterable[float | None]) -> str:
            own, other = ("-" if each is None else f"{each:,.0f}" for each in numbers)
            return f"{INDENT}{label:40}{own:>22}{other:>20}"

        for label, kind in (("latent and k_pe", weigh.LATENT), ("full keys, values", weigh.FULL)):
            held = [weigh.held(config, kind, dtype) for config, dtype in both]
            numbers, each, megabytes = zip(*held, strict=True)
            rows.append(row(f"{label}, of a layer: numbers", numbers))
            rows.append(row("  of all layers: bytes", each))
            rows.append(row("  of a full context: MB", megabytes))
        rows.append(row("layers", (c.num_hidden_layers for c, _ in both)))
        rows.append(row("context: tokens", (c.max_position_embeddings for c, _ in both)))
        drafts = self.engine.drafter is not None
        layers = self.config.num_hidden_layers + drafts
        mtp = ", the MTP layer's too" if drafts else ""
        return [
            "5. The cache: what one token leaves in it",
            *rows,
            *paragraph(
                f"This tour's cache holds 1 row of {self.tour.slots} slots in {layers} layers"
                f"{mtp}: {self.tour.cache_bytes:,} bytes."
            ),
        ]

    def bytes_of_a_token(self) -> list[str]:
        dtype = self.backend.dtype
        own = weigh.step_bytes(self.config, dtype, CONTEXT)
        other = weigh.step_bytes(R1, R1_DTYPE, CONTEXT)
        total, total_r1 = sum(own.values()), sum(other.values())
        lines = [f"{INDENT}{'':24}{f'{self.name}, {dtype}: MB':>30}{f'R1, {R1_DTYPE}: MB':>24}"]
        for part in other:
            mine, theirs = own.get(part, 0), other[part]
            lines.append(
                f"{INDENT}{part:24}{mine / 1e6:>22,.3f}{mine / total:8.1%}"
                f"{theirs / 1e6:>16,.1f}{theirs / total_r1:8.1%}"
            )
        lines.append(f"{INDENT}{'sum':24}{total / 1e6:>22,.3f}{'':8}{total_r1 / 1e6:>16,.1f}")
        return [f"6. What the next token reads, after {CONTEXT:,} cached ones", *lines]

    def drafts(self) -> list[str]:
        turns, new = self.tour.turns, self.tour.new
        if not turns:
            why = "One new token was asked for, and the prompt gave it"
            if self.engine.drafter is None:
                why = "There is no MTP layer here"
            elif new[-1] in self.engine.stop_ids:
                why = "The first new token ends the text"
            return ["7. Drafts", *paragraph(f"{why}, so nothing is drafted.")]
        k = len(turns[0].read) - 1
        accepted = sum(turn.accepted for turn in turns)
        texts = [" ".join(map(self.piece, turn.read[1:])) for turn in turns]
        width = max(34, *(columns(text) + 1 for text in texts))
        table = [f"{INDENT}{'turn':6}{'last token':16}{'drafts':{width}}{'accepted':12}new tokens"]
        for number, (turn, drafts) in enumerate(zip(turns, texts, strict=True), 1):
            last = padded(self.piece(turn.read[0]), 16)
            line = f"{INDENT}{number:<6}{last}{padded(drafts, width)}"
            table.append(f"{line}{turn.accepted:<12}{' '.join(map(self.piece, self.kept(turn)))}")
        text = self.engine.tokenizer.decode(new) if self.engine.tokenizer else None
        return [
            "7. Drafts",
            *paragraph(
                f"The MTP layer drafts k = {k} tokens. The model reads the last token and the "
                f"drafts in one step of S = {k + 1} tokens, and keeps the drafts that it would "
                "have chosen itself. The token after them is its own choice, too."
            ),
            *self.table(self.tour.drafted, k + 1, self.tour.slots),
            "",
            *table,
            *paragraph(
                f"{accepted} of {k * len(turns)} drafts were accepted: {len(turns)} steps gave "
                f"{len(new) - 1} tokens, after the prompt had given one.",
                f"The text so far: {text!r}" if text is not None else "",
            ),
        ]

    def kept(self, turn: Turn) -> list[int]:
        """A turn's new tokens, up to a stop token."""
        stops = [n for n, token in enumerate(turn.new, 1) if token in self.engine.stop_ids]
        return turn.new[: min(stops, default=len(turn.new))]


def times(shape: Iterable[int]) -> str:
    """A shape as "1 x 12 x 160"."""
    return " x ".join(map(str, shape))


def written(letters: Letters) -> str:
    """A shape in letters as the code writes it: "(N K,)"; nothing for none."""
    return f"({', '.join(letters)}{',' if len(letters) == 1 else ''})" if letters else ""


def last_of_each(made: list[Made]) -> list[Made]:
    """Of each name that a call's line made again and again, in a loop, only the last one."""
    seen: set[tuple[int, int, str]] = set()
    kept = []
    for m in reversed(made):
        if (m.call, m.line, m.name) not in seen:
            seen.add((m.call, m.line, m.name))
            kept.append(m)
    return kept[::-1]
