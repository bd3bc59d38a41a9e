"""Tests a small model as the drafter of a larger one: what test_speculate.py does not test of it.

Holds to account: r1/run/draft_model.py, r1/drafting.py, r1/switches/draft.py, and what bench.py
counts of a draft.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ROOT
from models import ROOMY, TINY_GROUPED, TINY_LLAMA, TINY_QWEN2, V3, drafted_engine, model
from refusals import refused
from tolerances import atol
from torch import Tensor

import r1
from r1 import Backend, Config, drafting, roofline
from r1.__main__ import main
from r1.bench import flags as bench_flags
from r1.bench import plan
from r1.bench.report.limits import byte_model
from r1.bench.sizes import work_bytes
from r1.bench.worker import steps
from r1.bench.worker.subject import Subject
from r1.bench.workload import Workload
from r1.build import weight_bytes
from r1.errors import flags_spelling
from r1.files.save import save
from r1.model.cache import Cache
from r1.run.draft_model import ModelDrafter
from r1.run.drafter import Judged
from r1.run.engine import Engine
from r1.run.sampler import Sampler
from r1.run.speculate import Turn
from r1.switches.draft import resolve_draft
from r1.switches.resolve import resolve

TINY = ROOT / "weights" / "tiny-r1"
PROMPTS = [[3, 1, 4, 1, 3], [2], [4, 4, 0, 3, 2, 1, 0, 0, 2, 3, 1], [47, 0, 46, 47]]
"""Of unlike lengths, with ids that a smaller vocabulary lacks."""
SEED = 2


def texts(engine: Engine, new: int = 24) -> list[list[int]]:
    found = engine.generate(PROMPTS, max_new_tokens=new, temperature=0.0)
    return [completion.tokens for completion in found]


def drafter_of(engine: Engine) -> ModelDrafter:
    assert isinstance(engine.drafter, ModelDrafter)
    return engine.drafter


# ---------------------------- text
PAIRS: dict[str, tuple[Config, Config | None, dict[str, Any]]] = {
    "the model itself": (ROOMY, None, {"noise": 0.1}),
    "random": (ROOMY, ROOMY.change(hidden_size=28), {}),
    "fewer words": (ROOMY, ROOMY.change(vocab_size=40), {"noise": 0.1}),
    "more words": (ROOMY, ROOMY.change(vocab_size=56), {"noise": 0.1}),
    "fewer layers": (TINY_GROUPED, TINY_GROUPED.change(num_hidden_layers=1), {}),
    "grouped for latent": (ROOMY, TINY_QWEN2, {}),
    "latent for grouped": (TINY_LLAMA, ROOMY, {}),
    "int8": (ROOMY, None, {"quant": "int8"}),
    "naive": (ROOMY, TINY_LLAMA, {"attention": "naive", "prefill_attention": "naive"}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_greedy_text_is_the_same(pair: str) -> None:
    """Whatever drafts, in ragged batches, from prompts of one chunk and of several."""
    config, draft, options = PAIRS[pair]
    wanted = texts(drafted_engine(config, SEED, **options))
    for k in (1, 3):
        drafting_engine = drafted_engine(config, SEED, k, draft=draft, **options)
        assert texts(drafting_engine) == wanted
        drafting_engine.runner.prefill_chunk = 4
        assert texts(drafting_engine) == wanted


@pytest.mark.parametrize("config", [ROOMY, TINY_GROUPED, TINY_QWEN2], ids=["mla", "gqa", "tied"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_model_itself_is_always_right(config: Config, k: int) -> None:
    """All its drafts are accepted, so each step gives k + 1 tokens: it reads all that was kept."""
    found = drafted_engine(config, SEED, k).generate(PROMPTS, max_new_tokens=24, temperature=0.0)
    assert {(c.steps, c.acceptance) for c in found} == {(-(-23 // (k + 1)), 1.0)}


def test_only_shared_ids_are_drafted() -> None:
    """Neither those that the draft's vocabulary lacks, nor those that a tokenizer lacks."""
    for draft, ids in (
        (ROOMY.change(vocab_size=40), None),
        (ROOMY.change(vocab_size=56), frozenset({*range(3, 30), 33, 50})),
    ):
        drafter = drafter_of(drafted_engine(ROOMY, SEED, 2, draft=draft, ids=ids))
        cache, turn = drafter.cache(4, 64), Turn(drafter, Sampler(3.0, 1.0, seed=0))
        allowed = set(range(40)) if ids is None else {*ids} - {50}
        with drafter.runner.context():
            hidden = drafter.runner.read(PROMPTS, cache, along=drafter.along)
        drafted, q = turn.begin(PROMPTS, hidden, torch.tensor([1, 2, 3, 47]), cache)
        assert q.shape == (4, 2, 48) and set(drafted[:, 1:].flatten().tolist()) <= allowed
        assert set(q.sum(dim=(0, 1)).nonzero().flatten().tolist()) == allowed


# ---------------------------- the cache
def cache_error(k: int, turns: int = 8) -> tuple[float, set[int]]:
    """Run some turns. Returns the largest difference between the draft's layers of the cache and
    those of a clean run over each row's text, and how many drafts were accepted in a turn.
    """
    engine = drafted_engine(ROOMY, SEED, k, draft=ROOMY.change(vocab_size=56), noise=0.08)
    runner, drafter = engine.runner, drafter_of(engine)
    small, layers = drafter.draft.model, runner.config.num_hidden_layers
    cache, turn = drafter.cache(len(PROMPTS), 96), Turn(drafter, Sampler(0.0))
    with runner.context():
        hidden = runner.read(PROMPTS, cache, along=drafter.along)
        token = runner.model.lm_head(hidden).argmax(-1)
    rows = [[*prompt, int(t)] for prompt, t in zip(PROMPTS, token, strict=True)]
    tokens, q = turn.begin(PROMPTS, hidden, token, cache)
    error, counts = 0.0, set[int]()
    for _ in range(turns):
        inputs = (tokens, q, *turn.random(cache))
        following, accepted, _, tokens, q = runner.call((), turn, inputs, cache)
        counts |= set(accepted.tolist())
        for row, new, count in zip(rows, following.tolist(), accepted.tolist(), strict=True):
            row += new[: count + 1]
        for number, row in enumerate(rows):
            assert int(cache.lengths[number]) == len(row) - 1
            text = torch.tensor([row + tokens[number, 1:-1].tolist()])  # its last draft is not read
            clean = drafter.draft.cache(1, text.shape[1])
            with runner.context():
                step = small.step("prefill", torch.arange(text.shape[1])[None], 0)
                small(text, step, clean.layers)
            for ours, theirs in zip(cache.layers[layers:], clean.layers, strict=True):
                difference = (ours[0][number] - theirs[0][0, : ours[0].shape[1]])[: text.shape[1]]
                error = max(error, float(difference.abs().max()))
    return error, counts


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_drafts_cache_is_a_clean_runs(k: int) -> None:
    error, counts = cache_error(k)
    assert error < atol("algebra fp32")
    assert counts == set(range(k + 1)), "every number of accepted drafts came up"


def only_the_new_token(self: ModelDrafter, judged: Judged, cache: Cache) -> Tensor:
    """The token before it is missing, where the draft has not read it."""
    token = judged.following.gather(1, judged.last[:, None])
    return self._decode(token, cache.lengths[:, None], cache)


def one_too_far(self: ModelDrafter, judged: Judged, cache: Cache) -> Tensor:
    cache.lengths += 1
    state = RIGHT(self, judged, cache)
    cache.lengths -= 1
    return state


RIGHT = ModelDrafter.first


@pytest.mark.parametrize("wrong", [only_the_new_token, one_too_far])
def test_a_draft_that_reads_wrongly_is_found(
    wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelDrafter, "first", wrong)
    assert cache_error(2)[0] > 1000 * atol("algebra fp32")


def test_memory_counts_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's, the benchmark's estimate of it, and both models' weights before loading."""
    engine = drafted_engine(ROOMY, SEED, 2, draft=TINY_LLAMA)
    drafter, w = drafter_of(engine), Workload(None, "tiny", None, 3, 100, 26, 0, 0)
    cache = drafter.cache(3, 126)
    found = work_bytes(w, ROOMY, engine.backend, drafter.token_bytes)
    assert found == cache.nbytes + 3 * 126 * 64
    monkeypatch.setattr("r1.run.runner.available_bytes", lambda _: cache.nbytes - 1)
    with refused(r"cache of 3 x 128 tokens \(the draft's included\)"):
        drafter.cache(3, 126)
    config, own = r1.load_config(TINY), Backend(device="cpu", dtype="fp32")
    free = int(1.5 * weight_bytes(config, resolve(own, config))) + 2**28
    monkeypatch.setattr(drafting, "available_bytes", lambda _: free)
    with refused("the model needs .* GB and its draft .* GB", "use a smaller draft"):
        load(TINY)


# ---------------------------- folders
def load(draft: Path | None, directory: Path = TINY, **switches: Any) -> Engine:
    asked = {"device": "cpu", "dtype": "fp32", "speculate": "draft", **switches}
    return r1.load(directory, Backend(**asked), draft_model=draft, quiet=True)


def test_on_the_embedded_checkpoint() -> None:
    engine = load(TINY, draft_tokens=3)
    plain = r1.load(TINY, Backend(device="cpu", dtype="fp32"), quiet=True)
    question = [{"role": "user", "content": "17+5=?"}]
    found, wanted = (e.chat(question, 24, temperature=0.0) for e in (engine, plain))
    assert found.tokens == wanted.tokens and found.tokens_per_step > 3
    assert any(note.startswith("the draft: ") for note in engine.notes)


def test_what_cannot_draft_is_refused(tmp_path: Path) -> None:
    with refused("speculate=draft needs a small model: add draft_model=DIR"):
        load(None)
    with refused("draft_model is of no use without drafts: add speculate=draft"):
        load(TINY, speculate="mtp")
    with refused("speculate=draft runs on one device, and tp=2 asks for more"):
        load(TINY, tp=2)
    with refused("^draft_model=.*nowhere: there is no folder"):
        load(tmp_path / "nowhere")
    with refused("speculate=draft needs a small model"):
        Engine(model(V3), resolve(Backend(device="cpu", speculate="draft"), V3))
    save(model(V3, dtype="fp32"), tmp_path / "bare")
    with refused("the draft has no tokenizer"):
        load(tmp_path / "bare")
    with refused("the model has no tokenizer"):
        load(TINY, tmp_path / "bare")
    assert drafter_of(load(tmp_path / "bare", tmp_path / "bare")).count == 1


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    """The same id must have the same text; ids that one of them lacks are not drafted."""
    ours = r1.Tokenizer.load(TINY)
    other = shutil.copytree(TINY, tmp_path / "other")
    path = other / "tokenizer.json"
    text = path.read_text("utf-8")
    first = min(ours.control.items(), key=lambda each: each[1])
    names = {"tokenizer_config.json": None, "special_tokens_map.json": None}
    for name in ("tokenizer.json", *names):
        if (other / name).is_file():
            changed = (other / name).read_text("utf-8").replace(first[0], "<|other|>")
            (other / name).write_text(changed, "utf-8")
    assert path.read_text("utf-8") != text
    with refused(f"the tokenizers differ: id {first[1]} is", "<|other|>"):
        load(other)
    shared = drafting.shared_ids(ours, r1.Tokenizer.load(TINY))
    assert shared is not None and len(shared) == ours.vocab_size


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--speculate", "draft"], "--speculate draft needs a small model: add --draft-model DIR"),
        (["--draft-model", "x"], "--draft-model is of no use without drafts"),
    ],
)
def test_the_command_speaks_of_flags(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model's folder is looked at."""
    assert main(["--model", "/nowhere", *flags, "hi"]) == 2
    assert said in capsys.readouterr().err


# ---------------------------- switches and limits
def test_a_draft_takes_the_models_switches_but_for_its_own_kind() -> None:
    asked = Backend(
        device="cpu", dtype="fp32", speculate="draft", draft_tokens=4, compile=True,
        quant="int8", attention="absorbed", quant_head="int8",
    )  # fmt: skip
    found = resolve_draft(asked, TINY_GROUPED)
    assert (found.compile, found.quant, found.quant_head) == (True, "int8", "none")
    assert (found.attention, found.speculate, found.step_tokens) == ("grouped", "off", 1)
    assert resolve(asked, ROOMY).step_tokens == 5


def test_the_work_of_a_turn() -> None:
    """A draft that is the model: k passes of its bytes, beside the verification's."""
    config = TINY_LLAMA
    backend = resolve(
        Backend(device="cpu", dtype="fp32", speculate="draft", draft_tokens=3), config
    )
    own = resolve_draft(backend, config)
    for rows, context in itertools.product((1, 4), (0.0, 100.0)):
        work = roofline.speculation(config, backend, rows, context, (config, own))
        assert work.draft.weight_bytes == pytest.approx(3 * work.plain.weight_bytes, rel=0.01)
        assert work.speedup(4) < 1 and work.pays_from() is None
    small = TINY_LLAMA.change(num_hidden_layers=1, vocab_size=32)
    cheap = roofline.speculation(config, backend, 1, 0.0, (small, resolve_draft(backend, small)))
    assert cheap.speedup(4) > 1 and cheap.pays_from() is not None


# ---------------------------- the benchmark
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--speculate", "draft"], "add --draft-model DIR"),
        (["--draft-model", "x"], "--draft-model is of no use without drafts"),
        (["--shape", "r1", "--speculate", "draft", "--draft-model", "x"], "give --model DIR"),
        (["--speculate", "draft", "--draft-model", "/nowhere"], "there is no folder /nowhere"),
    ],
)
def test_the_benchmark_refuses_first(flags: list[str], said: str) -> None:
    with flags_spelling(), refused(said):
        plan.check(bench_flags.parser(TINY).parse_args(["--device", "cpu", *flags]))


def test_a_benchmarks_arm(tmp_path: Path) -> None:
    """It loads the draft, which reads the depth along, and its limits count the draft's bytes."""
    work = Workload(str(TINY), None, None, 2, 6, 8, 5, 0, draft=str(TINY))
    assert "drafts by tiny-r1" in work.describe() and str(TINY) not in work.describe()
    subject = Subject(Backend(device="cpu", speculate="draft"), work, tmp_path)
    built = subject.build()
    turn = steps.next_turn(subject)
    for _ in range(3):
        turn()
    layers = subject.engine.config.num_hidden_layers
    assert len(subject.cache.layers) == 2 * layers
    (entries,) = subject.cache.layers[layers]  # the draft's first, (B, T, C + R)
    assert bool(entries[:, : work.depth + work.prompt].any(dim=-1).all())
    model = byte_model(work, subject.engine.backend, subject.engine.config, built)
    assert model.draft.weight_bytes > 0.9 * model.plain.weight_bytes
    plain = Subject(Backend(device="cpu"), work, tmp_path)
    assert plain.build()["draft"] is None
