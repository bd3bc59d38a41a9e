"""The figures of the cache, and of the bytes that one token reads."""

from __future__ import annotations

from canvas import MUTED, Canvas

from r1.model.shapes import R1
from r1.tour import weigh

A = R1.attention
LATENT, FULL = weigh.entry_numbers(R1, weigh.LATENT), weigh.entry_numbers(R1, weigh.FULL)
DTYPE, CONTEXT = "bf16", 4096
PARTS = {
    "chosen experts": "head",
    "shared experts": "faint",
    "attention": "query",
    "dense feed-forwards": "plain",
    "output head": "weight",
    "routers": "no",
    "cache": "cache",
}
"""The parts of a step's bytes, and their colors. (The rows of the embedding are too few to see.)"""


def cache() -> str:
    """What a token leaves in the cache, to scale; and which slots of it a step sees."""
    c = Canvas(546, "The cache: what one token leaves in it, and which slots a step sees")
    c.heading(24, "The cache", "Above: what one token leaves in one layer of R1, to scale. Below: "
              "rows and slots of the cache.")  # fmt: skip
    per_number = 790 / FULL
    c.step(76, f"Full keys and values: H (P + R + V) = {FULL:,} numbers (`naive`)")
    keys = A.num_attention_heads * A.qk_head_dim * per_number
    c.box(20, 90, keys, 30, f"keys of {A.num_attention_heads} heads", "head", 12.5)
    c.box(20 + keys, 90, 790 - keys, 30, f"values of {A.num_attention_heads} heads", "head", 12.5)
    c.step(146, f"c_kv and k_pe: C + R = {LATENT} numbers, {FULL / LATENT:.0f} times fewer")
    c.bar(20, 160, LATENT * per_number, 30, "cache")
    latent, full = (weigh.cache_bytes(R1, kind, DTYPE) for kind in (weigh.LATENT, weigh.FULL))
    context = R1.max_position_embeddings
    c.text(44, 175, f"In {R1.num_hidden_layers} layers and {DTYPE}: {latent:,} bytes a token, not "
           f"{full:,}; {latent * context / 1e9:.1f} GB for {context:,} tokens, not "
           f"{full * context / 1e9:.0f} GB.", 12.5, anchor="start")  # fmt: skip
    slots(c, 226)
    return c.svg()


def slots(c: Canvas, top: float) -> None:
    """Three rows of a cache, and what lies in each slot."""
    lengths, longest, drafts = (6, 2, 7), 7, 2
    step = f"It reads the new token t and {drafts} drafts d: S = {drafts + 1}."
    first = "The first decode step after prompts of"
    c.step(top, f"{first} {lengths[0]}, {lengths[1]} and {lengths[2]} tokens. {step}")
    left, wide = 150, 46
    names = ("written by the prompt", "written by this step", "padding of a shorter prompt",
             "not yet written")  # fmt: skip
    for slot in range(14):
        c.text(left + slot * wide + 21, top + 24, str(slot), 12, color=MUTED)
    for row, length in enumerate(lengths):
        y = top + 38 + row * 46
        c.step(y + 16, f"row {row}")
        c.text(66, y + 16, f"length {length}", 12.5, anchor="start", color=MUTED)
        for slot in range(14):
            kind, text = "white", ""
            if slot < length:
                kind = "cache"
            elif slot <= length + drafts:
                kind, text = "query", "d" if slot > length else "t"
            elif slot < longest:
                kind = "plain"
            c.box(left + slot * wide, y, 42, 32, text, kind, 12.5)
    y = top + 190
    for number, (name, kind) in enumerate(zip(names, ("cache", "query", "plain", "white"),
                                              strict=True)):  # fmt: skip
        x = (20, 205, 390, 620)[number]
        c.box(x, y, 24, 18, kind=kind)
        c.text(x + 32, y + 9, name, 12.5, anchor="start")
    c.note(
        y + 44,
        "Each row has a length of its own. A token sees the slots from 0 to its own; all later "
        "ones are hidden from it.",
        "After the step a row's length grows by 1, and by 1 for each accepted draft. Rejected "
        "drafts stay behind the",
        "length, where no token sees them, and the next step writes over them. Nothing is moved, "
        "and no address",
        "changes: CUDA graphs need that.",
    )


def bytes_of_a_token() -> str:
    """Bars: the bytes that a step reads for one row, by the number of rows and the context."""
    c = Canvas(474, "Where the bytes of a token go")
    c.heading(
        24, f"Where the bytes of a token go: R1 in {DTYPE}",
        "What a decode step reads, divided by its rows. Several rows are taken to choose their "
        "experts uniformly.",
    )  # fmt: skip
    x = 20.0
    for name, kind in PARTS.items():
        c.bar(x, 66, 14, 14, kind)
        c.text(x + 19, 73, name, 12, anchor="start")
        x += 31 + 7.1 * len(name)
    most = R1.max_position_embeddings
    cases = [(1, CONTEXT), (1, most), (8, CONTEXT), (32, CONTEXT), (128, CONTEXT)]
    one = sum(weigh.step_bytes(R1, DTYPE, most).values())
    for number, (rows, context) in enumerate(cases):
        parts = weigh.step_bytes(R1, DTYPE, context, rows)
        y = 104 + number * 66
        label = f"{rows} row{'s' if rows > 1 else ''} of {context:,} tokens"
        c.step(y, f"{label}: {sum(parts.values()) / rows / 1e9:.1f} GB each")
        x = 20.0
        for name, kind in PARTS.items():
            share = parts[name] / rows
            width = share / one * 790
            c.bar(x, y + 13, width, 30, kind)
            if width > 36:
                c.text(x + width / 2, y + 28, f"{share / 1e9:.1f}", 12.5)
            x += width
    full = weigh.cache_bytes(R1, weigh.FULL, DTYPE) * most / 1e9
    would = f"the cache of {most:,} tokens would be {full:.0f} GB, and each step would read it."
    c.note(444, f"With full keys and values, {would}")
    return c.svg()
