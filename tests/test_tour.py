"""`python -m r1.tour`: what it prints is what ran, and the model's shape comments are true.

Holds to account: r1/tour, and the shape comments of r1/model.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from cases import ROOT
from models import TINY, TINY_QWEN2, V2, V3, VARIANTS, drafting_engine, model
from refusals import check_sentence

from r1 import Backend, Config
from r1.files.save import save
from r1.model.attend import Absorbed
from r1.model.dispatch import Dispatch
from r1.model.layers import MLP
from r1.model.moe import MoE
from r1.model.router import Router
from r1.model.shapes import SHAPES
from r1.model.transformer import Block
from r1.roofline import expected_experts, step_work
from r1.run.engine import Engine
from r1.switches.resolve import resolve
from r1.tour import weigh
from r1.tour.__main__ import main
from r1.tour.letters import assignments, inner_sizes, number, numbers, sizes_of
from r1.tour.pages import Pages
from r1.tour.router import Choice, why
from r1.tour.run import Prompt, follow
from r1.tour.text import WIDTH, columns
from r1.tour.watch import Made, Watch, named

RECORDED = ROOT / "tests" / "tour.txt"
LINE = re.compile(r"(\.py):\d+ *")
"""Where a tensor is made: the number changes with any line above."""
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+\.\d+")

UNLIKE = V3.change(
    num_attention_heads=3, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=14, q_lora_rank=20,
    kv_lora_rank=24, hidden_size=32, n_routed_experts=28, num_experts_per_tok=6, n_group=4,
    topk_group=3, n_shared_experts=3, vocab_size=50,
)  # fmt: skip
"""No two letters have the same number, so a wrong one in a comment is found out."""
TOKENS = [3, 1, 4, 1, 5, 9, 2]


def engine_of(config: Config, **switches: Any) -> Engine:
    backend = resolve(Backend(device="cpu", dtype="fp32", **switches), config)
    return Engine(model(config, dtype="fp32", mtp=backend.speculate == "mtp", **switches), backend)


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert main([*argv]) == 0
    return capsys.readouterr().out.splitlines()


# ---------------------------- the text
def test_the_tour_is_the_recorded_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Word for word; computed numbers may differ by one in the last digit on another machine."""
    lines, recorded = (
        printed(capsys, "--place", "7"),
        RECORDED.read_text(encoding="utf-8").splitlines(),
    )
    assert len(lines) == len(recorded), "run python -m r1.tour --place 7 > tests/tour.txt"
    for line, before in zip(lines, recorded, strict=True):
        both = [LINE.sub(r"\1 ", text) for text in (line, before)]
        assert NUMBER.sub("#", both[0]) == NUMBER.sub("#", both[1])
        for a, b in zip(*map(NUMBER.findall, both), strict=True):
            digits = len(a.partition(".")[2])
            assert abs(float(a) - float(b)) < 1.5 * 10**-digits, (line, before)


VIEWS = {
    "dense": (V3, {}, 0),
    "textbook": (V3, {"attention": "naive", "moe": "loop", "prefill_moe": "loop"}, 1),
    "many groups": (V3.change(n_routed_experts=80, n_group=20, num_experts_per_tok=8), {}, 1),
    "greedy": (V2.change(topk_method="greedy"), {}, 1),
    "one layer of many": (TINY.change(num_hidden_layers=1, first_k_dense_replace=0), {}, 0),
    **{name: (config, {}, 1) for name, config in VARIANTS.items()},
}


@pytest.mark.parametrize("view", VIEWS)
def test_any_model_has_a_tour(view: str) -> None:
    """Lines fit a terminal, and the pages say what each model has and lacks."""
    config, switches, layer = VIEWS[view]
    engine = engine_of(config, **switches)
    prompt = Prompt(list(range(40)))
    lines = Pages(engine, follow(engine, prompt, layer, new=4), "a-model-of-a-long-name").lines()
    text = " ".join(" ".join(lines).split())
    assert max(map(columns, lines)) <= WIDTH
    assert all(f"{n}. " in text for n in range(1, 8)) and "the first 16 are left out" in text
    sparse, v3 = config.is_moe(layer), config.experts.topk_method == "noaux_tc"
    assert ("is dense" in text) == (not sparse)
    assert ("without b" in text) == (sparse and v3) and ("softmax" in text) == (sparse and not v3)
    assert ("nothing is drafted" in text) and ("q_c" in text) == (view != "textbook")


def test_the_turns_are_those_of_speculation() -> None:
    """Tokens are those of greedy decoding; a turn's are its accepted drafts, and one more."""
    engine = drafting_engine(V3.change(max_position_embeddings=400), seed=3, k=3)
    tour = follow(engine, Prompt(TOKENS), layer=1, new=30)
    (expected,) = engine.generate([TOKENS], max_new_tokens=30, temperature=0.0)
    assert tour.new[:30] == expected.tokens and len(tour.turns) == expected.steps
    assert len(tour.new) == 1 + sum(len(turn.new) for turn in tour.turns) >= 30
    assert sum(turn.accepted for turn in tour.turns) == expected.accepted > 0
    token = tour.new[0]
    for turn in tour.turns:
        assert turn.read[0] == token and turn.new[:-1] == turn.read[1 : turn.accepted + 1]
        assert turn.accepted == 3 or turn.new[-1] != turn.read[turn.accepted + 1]
        token = turn.new[-1]


def test_drafts_of_any_width_stand_in_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--draft-tokens", "5")
    start = next(n for n, line in enumerate(lines) if line.lstrip().startswith("turn "))
    at, rows = lines[start].index("accepted"), lines[start + 1 : -2]
    before = [next(row[:n] for n in range(len(row)) if columns(row[:n]) == at) for row in rows]
    assert any(columns(text.rstrip()) == at - 1 for text in before)  # one fills the column
    for text, row in zip(before, rows, strict=True):
        assert text.endswith(" ") and re.match(r"\d+ ", row[len(text) :]), row


def test_a_turn_ends_at_a_stop_token() -> None:
    engine = drafting_engine(V3.change(max_position_embeddings=400), seed=3, k=3)
    free = follow(engine, Prompt(TOKENS), layer=1, new=30).new
    stop = next(token for place, token in enumerate(free) if place > 5 and token not in free[:5])
    stopping = Engine(engine.model, engine.backend, None, frozenset([stop]))
    tour = follow(stopping, Prompt(TOKENS), layer=1, new=30)
    assert tour.new == free[: free.index(stop) + 1]
    at_once = Engine(engine.model, engine.backend, None, frozenset(free[:1]))
    at_once.drafter = engine.drafter
    pages = Pages(at_once, follow(at_once, Prompt(TOKENS), layer=1, new=30), "x").lines()
    assert "The first new token ends the text" in pages[-1]
    assert Pages(stopping, tour, "x").kept(tour.turns[-1])[-1] == stop


# ---------------------------- shapes
def test_sizes_of_letters() -> None:
    sizes = sizes_of(UNLIKE, rows=2, new=5, slots=7)
    assert [number(each, sizes) for each in ("H (P + R)", "N K", "E / G", "2 D", "1", "H + 1")] == [
        3 * 20, 10 * 6, 7, 64, 1, 4,
    ]  # fmt: skip
    assert [number(each, sizes) for each in ("rows", "...", "in W", "n", "")] == [None] * 5
    assert "Q" not in sizes_of(VARIANTS["moonlight"], 1, 1, 1)
    values = [value for letter, value in sizes.items() if letter not in ("topk_group", "I")]
    values += inner_sizes(UNLIKE).values()
    assert len(set(values)) == len(values), "two letters have the same number"


def inner_size(made: Made) -> dict[str, int]:
    kinds = {Dispatch: "expert", MLP: "shared"}
    kind = next((name for owner, name in kinds.items() if isinstance(made.owner, owner)), "dense")
    return {"I": inner_sizes(UNLIKE)[kind]}


@pytest.mark.parametrize("attention", ["naive", "expand", "absorbed"])
@pytest.mark.parametrize("experts", ["loop", "gather", "grouped"])
@pytest.mark.parametrize("low_rank", [True, False])
def test_the_models_shape_comments_are_true(attention: str, experts: str, low_rank: bool) -> None:
    """Every tensor that a comment of r1/model describes has the shape that it says, in numbers."""
    config = UNLIKE if low_rank else UNLIKE.change(q_lora_rank=None)
    switches = {"attention": attention, "moe": experts}
    engine = engine_of(config, **{f"prefill_{k}": v for k, v in switches.items()}, **switches)
    watch = Watch(cast(Block, engine.model.layers[1]))
    cache = engine.cache(2, 20)
    calls = {5: lambda: engine.runner.prefill([TOKENS[:5]] * 2, cache)}
    calls[3] = lambda: engine.runner.decode(torch.tensor([[1, 2, 3]] * 2), cache)
    checked = set()
    for new, call in calls.items():
        with watch():
            call()
        slots = new if new == 5 else cache.capacity
        sizes = sizes_of(config, rows=2, new=new, slots=slots)
        for made in watch.take():
            # Of the naive strategy keys_values makes the new tokens' keys alone.
            some = {"T": new} if attention == "naive" and made.method == "keys_values" else {}
            known = made.letters and numbers(made.letters, sizes | inner_size(made) | some)
            if known:
                assert tuple(made.tensor.shape) == known, (made.where, made.name, made.letters)
                checked.add(made.where)
    assert len(checked) > 25


def test_a_shape_comment_is_read(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(
        "a = f(x)  # (B, S) -> (B, H (P + R))\n"
        "b, c = f(\n    x\n)  # (B, S), (N K,)\n"
        "# (B,) each\n"
        "d, e = f(x)\n"
        "g, h = f(x)  # one of (B, S) alone\n"
        "i = '# (B, S)'\n"
    )
    found = {s.names: (s.first, s.last, s.shapes) for s in assignments(str(path))}
    assert found == {
        ("a",): (1, 1, (("B", "H (P + R)"),)),
        ("b", "c"): (2, 4, (("B", "S"), ("N K",))),
        ("d", "e"): (6, 6, (("B",), ("B",))),
        ("g", "h"): (7, 7, (None, None)),
        ("i",): (8, 8, (None,)),
    }


def test_watching_changes_nothing() -> None:
    """Neither the logits nor a trace that was set before, also where the model fails."""
    engine = engine_of(V3)
    watch = Watch(cast(Block, engine.model.layers[1]))
    plain = engine.logits(torch.tensor([TOKENS]))
    before = sys.gettrace()
    with watch():
        watched = engine.logits(torch.tensor([TOKENS]))
    assert torch.equal(plain, watched) and sys.gettrace() is before
    made = watch.take()
    assert made and not watch.take()
    hidden = named(made, Block, "h")
    assert hidden is not None and hidden.shape == (1, 7, 32) and named(made, Block, "no") is None
    with pytest.raises(IndexError), watch():
        engine.model(torch.tensor([[10**6]]), engine.model.step("prefill", torch.zeros(1, 1), 0))
    assert sys.gettrace() is before


class Halved(Absorbed):
    """A strategy as a user writes it."""

    def __call__(self, *arguments: Any) -> torch.Tensor:
        whole = super().__call__(*arguments)
        half = whole / 2  # (B, S, H, V)
        return half


def test_a_strategy_of_ones_own_is_shown() -> None:
    """Its own lines and those that it inherits; one that is in no file can't be, and runs."""
    engine = engine_of(V3)
    space: dict[str, Any] = {"Absorbed": Absorbed}
    exec(
        "class Typed(Absorbed):\n def __call__(self, *a): x = super().__call__(*a); return x", space
    )
    attend = cast(Block, engine.model.layers[1]).self_attn.attend
    for strategy, found in ((Halved(), 2), (space["Typed"](), 1)):
        attend["decode"] = strategy
        made = follow(engine, Prompt(TOKENS), layer=1, new=2).step
        assert len({m.file for m in made if m.owner is strategy}) == found
        assert [m.letters for m in made if m.name == "half"] in ([("B", "S", "H", "V")], [])


@pytest.mark.parametrize("config", [V3, V2, VARIANTS["moonlight"]])
def test_the_router_page_tells_why(config: Config) -> None:
    """Its numbers are the router's: chosen experts are the best of s + b in open groups."""
    engine = engine_of(config)
    tour = follow(engine, Prompt(TOKENS), layer=1, new=2)
    gate = next(m for m in engine.model.layers[1].modules() if isinstance(m, Router))
    choice = Choice.of(tour.read, gate)
    pieces = list(map(str, TOKENS))
    assert any("yes" in line for line in why(choice, pieces, 2)) and why(choice, pieces, 2) != why(
        choice, pieces, 3
    )
    indices, weights = named(tour.read, MoE, "indices"), named(tour.read, MoE, "weights")
    assert indices is not None and weights is not None
    ranking = choice.scores + choice.bias
    if choice.closed is not None:
        each = ranking.shape[1] // config.experts.n_group
        ranking = ranking.masked_fill(choice.closed.repeat_interleave(each, 1), float("-inf"))
    best = ranking.topk(config.experts.num_experts_per_tok).indices
    assert torch.equal(best.sort().values, indices.sort().values)
    assert torch.equal(choice.weights.sort().values, weights.sort().values)
    assert torch.equal(choice.scores.gather(1, choice.indices).argmax(1), choice.weights.argmax(1))


# ---------------------------- bytes
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("shape", ["r1", "tiny", "moonlight-16b", "v2", "v2-lite"])
def test_the_parts_of_a_step_add_up(shape: str, rows: int) -> None:
    """To the bytes of r1/roofline.py, but for the entries that are written."""
    config = SHAPES[shape]
    backend = resolve(Backend(device="cpu", dtype="bf16", attention="absorbed"), config)
    work = step_work(config, backend, rows, 1, 4096, expected_experts(config, rows))
    written = rows * weigh.cache_bytes(config, weigh.LATENT, "bf16")
    parts = weigh.step_bytes(config, "bf16", 4096, rows)
    assert sum(parts.values()) == pytest.approx(work.nbytes - written, abs=100)
    assert all(parts.values()) and parts["chosen experts"] < work.nbytes


def test_what_r1_keeps_of_a_token() -> None:
    config = SHAPES["r1"]
    assert weigh.entry_numbers(config, weigh.LATENT) == 576
    assert weigh.entry_numbers(config, weigh.FULL) == 40960
    assert weigh.cache_bytes(config, weigh.LATENT, "bf16") == 576 * 61 * 2


# ---------------------------- the command
def test_the_commands_arguments(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", str(made), "--layer", "0", "--new", "3", "--draft-tokens", "1"]
    lines = printed(capsys, "hi there", *given, "--place", "2")
    assert "layer 0 (of 0 to 1)" in " ".join(lines) and "in the chat template R1" in lines[4]
    assert any("k = 1 tokens" in line for line in lines)
    assert (
        "One new token was asked" in printed(capsys, "hi", "--model", str(made), "--new", "1")[-1]
    )


def test_a_folder_without_tokenizer_or_mtp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config names an MTP layer, which the files lack: r1.load takes it, and so does a tour."""
    save(model(V3), tmp_path / "bare")
    given = ["--model", str(tmp_path / "bare")]
    lines = printed(capsys, *given, "--tokens", "3,1,4")
    assert "3 token ids were given" in lines[4] and "token 3 3" in lines[5]
    assert "nothing is drafted" in lines[-1]
    assert main(given) == 2
    check_sentence(capsys.readouterr().err.removeprefix("r1.tour: ").removesuffix("\n"))


@pytest.mark.parametrize("config", [TINY_QWEN2, VARIANTS["youtu"]], ids=["qwen2", "youtu"])
def test_a_model_without_experts(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tour's own way to compute experts is not asked of it; one's own is refused."""
    save(model(config), tmp_path / "dense")
    given = ["--model", str(tmp_path / "dense"), "--tokens", "3,1,4"]
    assert "Layer 0 is dense" in " ".join(printed(capsys, *given))
    assert main([*given, "--moe", "gather"]) == 2
    said = capsys.readouterr().err
    assert "--moe gather chooses how experts are computed, and this model has none" in said


def test_a_wrong_layer_is_told_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("r1.tour.__main__.load")
    assert main(["--layer", "5"]) == 2


def test_a_tour_has_its_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One for a small model: with torch's own number a busy machine needed 43 s in place of 6."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert main(["--new", "1"]) == 0 and main(["--new", "1", f"--threads={os.cpu_count()}"]) == 0
    assert asked == [1, os.cpu_count()]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["12", "+", "30"], 'has 3 parts: put quotes around it, as in python -m r1.tour "12 + 30"'),
        (["--attention", "naive", "--prefill-attention", "expand"], "--attention naive and --pre"),
        (["--draft-tokens", "-1"], "--draft-tokens -1: give a whole number"),
        (["--layer", "5"], "has layers 0 to 4"),
        (["--layer", "-1"], "has layers 0 to 4"),
        (["--place", "12"], "has tokens 0 to 11"),
        (["--new", "0"], "whole number of at least 1"),
        (["--draft-tokens", "0"], "whole number of at least 1"),
        ([" "], "the text is empty"),
        (["hi", "--tokens", "1"], "give one of the two"),
        (["--tokens", "1,x"], "such as 0,5,7"),
        (["--tokens", ""], "such as 0,5,7"),
        (["--tokens", "1,320"], "--tokens 1,320: 320 is outside the vocabulary of 320"),
        (["1+" * 6000], "your question has 12,005 tokens, and it must fit the context of 10,240"),
        (["--model", "no-such-folder"], "no-such-folder"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("r1.tour: ") and said in err and err.count("\n") == 1
    check_sentence(err.removeprefix("r1.tour: ").removesuffix("\n"))
