"""The figures of latent attention, and of absorption."""

from __future__ import annotations

from canvas import MUTED, Canvas

from r1.model.attend import Absorbed, Expand, Naive
from r1.model.shapes import R1
from r1.tour import weigh

A = R1.attention
H, P, R, V = A.num_attention_heads, A.qk_nope_head_dim, A.qk_rope_head_dim, A.v_head_dim
C, Q, D = A.kv_lora_rank, A.q_lora_rank, R1.hidden_size
LATENT, FULL = weigh.entry_numbers(R1, weigh.LATENT), weigh.entry_numbers(R1, weigh.FULL)


def latent_attention() -> str:
    """From one token's x to the attention's output: what is projected, cached and rotated."""
    c = Canvas(520, "Latent attention: the path of one token through a layer's attention")
    c.heading(
        24,
        "Latent attention: one token's way through mla.py",
        "Sizes are R1's. Orange: weights. Blue: the query. Green: what is cached.",
    )
    # x
    c.box(345, 62, 140, 34, f"x: D = {D:,}", "plain")
    # query side
    c.arrow((345, 79), (170, 79), (170, 112))
    c.box(75, 112, 190, 40, ["q_a_proj", f"{D:,} to {Q:,}"], "weight", 12.5)
    c.arrow((170, 152), (170, 174))
    c.box(75, 174, 190, 34, f"c_q: Q = {Q:,}, then a norm", "query", 12.5)
    c.arrow((170, 208), (170, 230))
    c.box(75, 230, 190, 40, ["q_b_proj", f"{Q:,} to H (P + R) = {H * (P + R):,}"], "weight", 12.5)
    c.arrow((125, 270), (125, 288))
    c.arrow((240, 270), (240, 288))
    c.box(40, 296, 150, 40, ["q_nope", f"{H} heads x P = {P}"], "query", 12.5, stack=2)
    c.box(218, 296, 150, 40, ["q_pe", f"{H} heads x R = {R}"], "query", 12.5, stack=2)
    c.text(310, 364, "then rotated", 12, color=MUTED, anchor="start")
    # key side
    c.arrow((485, 79), (640, 79), (640, 112))
    label = ["kv_a_proj_with_mqa", f"{D:,} to C + R = {LATENT}"]
    c.box(535, 112, 210, 40, label, "weight", 12.5)
    c.arrow((575, 152), (575, 174))
    c.arrow((705, 152), (705, 174))
    c.box(490, 174, 165, 40, ["c_kv", f"C = {C}, then a norm"], "cache", 12.5)
    c.box(670, 174, 125, 40, ["k_pe", f"R = {R}, rotated"], "cache", 12.5)
    c.arrow((575, 214), (575, 244))
    c.arrow((732, 214), (732, 244))
    c.box(490, 244, 305, 44, ["The cache keeps these two alone:",
          f"{LATENT} numbers of a token, for all {H} heads"], "white", 12.5)  # fmt: skip
    # attention
    c.arrow((115, 336), (115, 392))
    c.arrow((295, 336), (295, 392))
    c.arrow((640, 288), (640, 392))
    c.text(652, 330, "of all cached tokens", 12, color=MUTED, anchor="start")
    order = "scores q · k, softmax, sum of values; the next figure shows in what order"
    c.box(40, 392, 755, 44, ["the slot `attend`", order], "head", 12.5)
    c.arrow((240, 436), (240, 462))
    c.box(110, 462, 260, 36, f"o: {H} heads x V = {V}", "query", 12.5)
    c.arrow((370, 480), (440, 480))
    c.box(440, 462, 240, 36, f"o_proj: H V = {H * V:,} to D = {D:,}", "weight", 12.5)
    c.arrow((680, 480), (706, 480))
    c.text(714, 480, "added to x", 12, color=MUTED, anchor="start")
    return c.svg()


def absorption() -> str:
    """The same scores and sums in two orders of products, for one head and the cached tokens."""
    c = Canvas(790, "Absorption: two orders of the same products")
    c.heading(
        24, "Absorption: the same products in two orders",
        f"One head of R1's {H}, one new token, T cached tokens. Green comes from the cache; orange "
        "are weights.",
    )  # fmt: skip
    expanded(c, 84)
    absorbed(c, 322)
    c.box(20, 520, 790, 34, kind="white")
    c.text(220, 537, "q · (W_UK c) = (W_UKᵀ q) · c", 13, mono=True)
    c.text(600, 537, "sum p (W_UV c) = W_UV (sum p c)", 13, mono=True)
    table(c, 586)
    c.note(
        744,
        "Each strategy reads W_UK and W_UV once in a step, however many tokens are cached.",
        "A prompt shares the made keys among all its queries. So `expand` is the best for it, and "
        "`absorbed` for decode.",
    )
    return c.svg()


def expanded(c: Canvas, top: float) -> None:
    """First keys and values, then scores and the weighted sum."""
    head = "1. naive, expand: make keys and values first, then attend to them"
    c.step(top, head)
    y = top + 28
    c.box(30, y, 130, 150, ["c_kv", f"T x C = T x {C}"], "cache")
    for x in (160, 352):
        c.arrow((x, y + 40), (x + 42, y + 40))
        c.arrow((x, y + 112), (x + 42, y + 112))
    c.box(202, y + 18, 150, 44, ["W_UK", f"P x C = {P} x {C}"], "weight", 12.5)
    c.box(202, y + 90, 150, 44, ["W_UV", f"V x C = {V} x {C}"], "weight", 12.5)
    c.box(394, y + 10, 96, 60, ["k_nope", f"T x {P}"], "head", 12.5, stack=2)
    c.box(394, y + 84, 96, 60, ["v", f"T x {V}"], "head", 12.5, stack=2)
    c.text(442, y + 160, "naive keeps them in the cache;", 12, color=MUTED)
    c.text(442, y + 176, "expand makes them in each call", 12, color=MUTED)
    c.box(552, y - 14, 104, 30, f"q_nope: {P}", "query", 12.5)
    c.arrow((604, y + 16), (604, y + 36))
    c.arrow((498, y + 51), (552, y + 51))
    c.box(552, y + 36, 104, 30, "scores: T", "plain", 12.5)
    c.text(668, y + 51, "+ q_pe · k_pe", 12, color=MUTED, anchor="start")
    c.arrow((604, y + 66), (604, y + 100))
    c.text(614, y + 83, "softmax: p", 12, color=MUTED, anchor="start")
    c.arrow((498, y + 115), (552, y + 115))
    c.box(552, y + 100, 104, 30, "sum p v", "plain", 12.5)
    c.arrow((656, y + 115), (704, y + 115))
    c.box(704, y + 100, 100, 30, f"o: V = {V}", "query", 12.5)


def absorbed(c: Canvas, top: float) -> None:
    """First the query times W_UK, and W_UV last."""
    head = "2. absorbed: bring the query to the latents first, and the sum of latents back last"
    c.step(top, head)
    y = top + 30
    c.box(30, y, 104, 30, f"q_nope: {P}", "query", 12.5)
    c.arrow((134, y + 15), (160, y + 15))
    c.box(160, y - 7, 150, 44, ["W_UKᵀ", f"C x P = {C} x {P}"], "weight", 12.5)
    c.arrow((310, y + 15), (336, y + 15))
    c.box(336, y, 104, 30, f"q_c: C = {C}", "query", 12.5)
    c.arrow((440, y + 15), (480, y + 15))
    c.box(480, y, 130, 30, "scores: T", "plain", 12.5)
    c.text(622, y + 15, "+ q_pe · k_pe", 12, color=MUTED, anchor="start")
    latents = ["c_kv", f"T x C = T x {C}", f"the same for all {H} heads"]
    c.box(100, y + 64, 240, 86, latents, "cache")
    c.arrow((340, y + 86), (500, y + 86), (500, y + 30))
    c.text(490, y + 56, "q_c · c_kv", 12, color=MUTED, anchor="end")
    c.arrow((530, y + 30), (530, y + 114))
    c.text(540, y + 68, "softmax: p", 12, color=MUTED, anchor="start")
    c.arrow((340, y + 129), (396, y + 129))
    c.box(396, y + 114, 150, 30, f"sum p c_kv: C = {C}", "plain", 12.5)
    c.arrow((546, y + 129), (572, y + 129))
    c.box(572, y + 107, 130, 44, ["W_UV", f"V x C = {V} x {C}"], "weight", 12)
    c.arrow((702, y + 129), (726, y + 129))
    c.box(726, y + 114, 84, 30, f"o: V = {V}", "query", 12.5)


def table(c: Canvas, top: float) -> None:
    """What each strategy does for one cached token, in one layer of R1."""
    columns = (30, 480, 640, 800)
    heads = (f"for one cached token, all {H} heads of a layer", "naive", "expand", "absorbed")
    made = H * (P + V)
    scored = [strategy.flops(A) for strategy in (Naive(), Expand(), Absorbed())]
    rows: list[tuple[str, float, float, float]] = [
        ("numbers that a step reads of the cache", FULL, LATENT, LATENT),
        ("numbers that it makes, k_nope and v", 0, made, 0),
        ("operations to make them", 0, 2 * made * C, 0),
        ("operations of the scores and the sum", scored[0], scored[1], scored[2]),
    ]
    for x, head in zip(columns, heads, strict=True):
        c.text(x, top, head, 13, anchor="start" if x == 30 else "end", bold=True)
    c.arrow((20, top + 14), (810, top + 14), tip=False)
    for number, (label, *cells) in enumerate(rows, 1):
        y = top + 8 + 26 * number
        c.text(columns[0], y, label, 13, anchor="start")
        for x, cell in zip(columns[1:], cells, strict=True):
            c.text(x, y, f"{cell:,.0f}", 13, anchor="end")
