"""Layers on several stages (gloo on a CPU): what they compute is what one process computes.

Holds r1/placement/stages.py to account: who holds which layers, what travels between the stages,
and the same tokens on every rank. The processes and the helpers are those of test_parallel.py.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import writers
from decoding import PROMPTS
from hypothesis import given
from hypothesis import strategies as st
from models import TINY, TINY_GROUPED, TINY_QWEN2, drafting_engine
from ranks import Ranks
from test_parallel import (
    H100,
    SPREAD,
    answered,
    check_logits,
    check_quantized,
    decoded,
    drawn,
    engine_of,
    held,
    named,
    run,
    saved,
    traced,
    unlike,
    written,
)  # fmt: skip
from tolerances import atol
from torch import Tensor

from r1 import Backend, InputError, build, roofline
from r1.bench.upcast import upcast
from r1.files.names import places
from r1.files.save import save
from r1.model.shapes import shape
from r1.placement.stages import ranges
from r1.run import runner
from r1.switches.resolve import resolve

DEEP = SPREAD.change(num_hidden_layers=5)
"""A dense layer and four of experts: a middle stage has some of them, too."""
GRIDS = [{"pp": 2}, {"pp": 4}, {"tp": 2, "pp": 2}, {"ep": 2, "pp": 2}]


# ---------------------------- fixtures
@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(DEEP, tmp_path_factory.mktemp("deep") / "model")


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two layers: the tolerance of bf16 is for so many."""
    return saved(SPREAD, tmp_path_factory.mktemp("shallow") / "model")


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose MTP layer is often right, though not always."""
    folder = tmp_path_factory.mktemp("drafting") / "model"
    save(drafting_engine(DEEP, 3, k=2).model, folder)
    return folder


# ---------------------------- the same logits
@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_stages_compute_what_one_process_does(
    ranks: Ranks, deep: Path, grid: dict[str, int]
) -> None:
    """Ragged prompts, every row another; prefill and decode."""
    check_logits(ranks, deep, grid, "algebra fp32")


@pytest.mark.parametrize("grid", GRIDS[2:], ids=named)
def test_in_bf16(ranks: Ranks, shallow: Path, grid: dict[str, int]) -> None:
    check_logits(ranks, shallow, {**grid, "dtype": "bf16"}, "ranks bf16")


def test_stages_alone_change_no_bit(ranks: Ranks, deep: Path) -> None:
    """Each product is whole on one rank. Under amp hidden states travel in fp32."""
    for way in ({"dtype": "bf16"}, {"amp": "bf16"}, {"attention": "naive", "join": "off"}):
        ((text, right),) = ranks.run(1, decoded, deep, None, way)
        for _, logits in run(ranks, {"pp": 2}, decoded, deep, text, {"pp": 2, **way}):
            assert torch.equal(logits, right), way


@pytest.mark.parametrize("name", ["compressed-tensors int4", "gptq", "fp8 block"])
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[2]], ids=named)
def test_quantized_checkpoints(
    ranks: Ranks, deep: Path, tmp_path: Path, grid: dict[str, int], name: str
) -> None:
    """Packed as they are, and dequantized while loading."""
    check_quantized(ranks, deep, tmp_path / "model", grid, name)


def test_quantized_while_loading(ranks: Ranks, deep: Path) -> None:
    """The output head too: only the last stage has it."""
    check_logits(ranks, deep, {"pp": 2, "quant": "int8", "quant_head": "int8"}, "algebra fp32")


VARIANTS = {
    "tied": SPREAD.change(tie_word_embeddings=True),
    "grouped queries, biases": TINY_QWEN2.change(vocab_size=256, num_attention_heads=4),
    "grouped queries, norms": TINY_GROUPED.change(vocab_size=256),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(ranks: Ranks, tmp_path: Path, variant: str) -> None:
    """A tied output head is a copy of the embedding on the last stage."""
    folder = saved(VARIANTS[variant], tmp_path / "model")
    check_logits(ranks, folder, {"tp": 2, "pp": 2}, "algebra fp32")


def test_biases_of_other_stages(ranks: Ranks, tmp_path: Path) -> None:
    """Old GPTQ writers give biases of zeros to all matrices: others than these must be known."""
    folder = saved(VARIANTS["grouped queries, biases"], tmp_path / "model")
    writers.write(folder, "gptq")
    check_logits(ranks, folder, {"pp": 2}, "algebra fp32")


def in_pieces(folder: Path, switches: dict[str, Any]) -> tuple[Tensor, int]:
    """Logits of prompts that are read in chunks of two tokens, and how often a stage sent."""
    engine, sent = engine_of(folder, switches), list[torch.Size]()
    send = engine.model.send

    def counted(x: Tensor) -> Tensor:
        sent.append(x.shape)
        return send(x)

    engine.model.send = counted
    engine.runner.prefill_chunk = 2
    return engine.runner.prefill(PROMPTS, engine.runner.cache(len(PROMPTS), 64)), len(sent)


def test_prompts_in_chunks(ranks: Ranks, deep: Path) -> None:
    """A stage hands on each chunk, and does not wait for the logits of the last one before that."""
    right, _ = in_pieces(deep, {})
    for logits, sent in run(ranks, {"pp": 2}, in_pieces, deep, {"pp": 2}):
        torch.testing.assert_close(logits, right, atol=atol("algebra fp32"), rtol=0)
        assert sent == -(-max(map(len, PROMPTS)) // 2)


def test_chunks_are_shorter_where_stages_wait() -> None:
    """Four for each stage, as long as they are not small; attention's limit holds as before."""
    backend = resolve(Backend(device="cpu", dtype="fp32"), TINY)
    made = build.from_shape(TINY, backend)
    alone, spread = (runner.Runner(made, replace(backend, pp=pp)) for pp in (1, 2))
    assert alone._chunk(1, 4096) == alone.prefill_chunk
    assert spread._chunk(1, 4096) == 512
    assert spread._chunk(1, 1024) == runner.SMALL_CHUNK
    assert spread._chunk(1, 2**20) == alone.prefill_chunk
    assert spread._chunk(2**15, 4096) == 2


def widened(folder: Path, text: Tensor, switches: dict[str, Any]) -> Tensor:
    """Logits of bf16 weights with every product in fp32, as a large model's reference has them."""
    engine = engine_of(folder, {**switches, "dtype": "bf16"})
    upcast(engine.model)
    return engine.logits(text)


def test_the_reference_of_large_models(ranks: Ranks, deep: Path) -> None:
    """Hidden states travel in fp32 then, though the weights are bf16."""
    text = torch.arange(12).view(2, 6)
    (right,) = ranks.run(1, widened, deep, text, {})
    for logits in run(ranks, {"pp": 2}, widened, deep, text, {"pp": 2}):
        assert torch.equal(logits, right)


def test_compiled_blocks(ranks: Ranks, deep: Path) -> None:
    """A stage's blocks hold no send: they compile as always."""
    tokens = torch.arange(12).view(2, 6)
    right = engine_of(deep, {}).logits(tokens)
    for logits in run(ranks, {"pp": 2}, traced, deep, tokens, {"pp": 2}):
        torch.testing.assert_close(logits, right, atol=atol("algebra fp32"), rtol=0)


# ---------------------------- the same text
@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_text_is_the_same(ranks: Ranks, drafting: Path, grid: dict[str, int]) -> None:
    """Greedy, and drawn: with a seed as one process does, without one alike on all ranks."""
    right = written(drafting, {}, 0.0)
    found = run(ranks, grid, written, drafting, grid, 0.0)
    assert found == [right] * len(found)
    right = written(drafting, {}, 1.0, 0.9, 7)
    found = run(ranks, grid, written, drafting, grid, 1.0, 0.9, 7)
    assert found == [right] * len(found)
    first, *others = run(ranks, grid, written, drafting, grid, 1.0)
    assert others == [first] * len(others) and first != right


@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_speculation_is_the_same(ranks: Ranks, drafting: Path, grid: dict[str, int]) -> None:
    """Only the last stage has the MTP layer. All accept the same drafts; some are rejected."""
    drafts = {"speculate": "mtp", "draft_tokens": 2}
    right = answered(drafting, drafts)
    for found in run(ranks, grid, answered, drafting, {**grid, **drafts}):
        assert found == right
    accepted, most = (sum(n) for n in zip(*((a, 2 * len(t)) for t, a in right), strict=True))
    assert 0 < accepted < most


# ---------------------------- what a stage reads and holds
def parts(folder: Path, switches: dict[str, Any]) -> tuple[set[str], int, int]:
    """The names of a rank's weights, its cache's layers, and its layers of the model."""
    engine = engine_of(folder, switches)
    cache = engine.cache(1, 8)
    return set(places(engine.model)), len(cache.layers), len(engine.model.layers)


def test_each_stage_holds_its_own(ranks: Ranks, deep: Path) -> None:
    """Its layers and their cache; every weight is on one stage, but for what they share."""
    whole, _, _ = parts(deep, {})
    found = run(ranks, {"pp": 4}, parts, deep, {"pp": 4})
    norm, embedding = "model.norm.weight", "model.embed_tokens.weight"
    assert set.union(*(names for names, _, _ in found)) == whole
    for one, other in itertools.combinations([names for names, _, _ in found], 2):
        assert one & other == {norm}
    assert all(cached == layers for _, cached, layers in found)
    assert sum(layers for _, _, layers in found) == DEEP.num_hidden_layers
    assert embedding in found[0][0] and "lm_head.weight" in found[-1][0]
    first, last = run(ranks, {"pp": 2}, parts, deep, {"pp": 2, "speculate": "mtp"})
    assert first[0] & last[0] == {norm, embedding}, "the MTP layer reads a copy"
    mtp = f"model.layers.{DEEP.num_hidden_layers}."
    assert not any(name.startswith(mtp) for name in first[0])
    assert (first[1], last[1]) == (first[2], last[2] + 1), "drafts are cached where they are made"


def test_each_stage_reads_its_own(ranks: Ranks, deep: Path) -> None:
    """No byte is read by two stages but the final norm's."""
    whole, _ = held(deep, {})
    found = run(ranks, {"pp": 2}, held, deep, {"pp": 2})
    table = 4 * DEEP.attention.qk_rope_head_dim // 2  # of the rotation, which is computed
    assert all(read == has - table for read, has in found), "nothing is read in vain"
    assert sum(read for read, _ in found) == whole + 4 * DEEP.hidden_size
    assert max(read for read, _ in found) < 0.65 * whole


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_random_weights_are_those_of_one_process(ranks: Ranks, quant: str) -> None:
    whole = drawn(DEEP, {"quant": quant})
    for part in run(ranks, {"pp": 2}, drawn, DEEP, {"pp": 2, "quant": quant}):
        assert all(torch.equal(weight, whole[key]) for key, weight in part.items())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 7))
def test_layers_are_shared_as_evenly_as_can_be(sizes: list[int], stages: int) -> None:
    stages = min(stages, len(sizes))
    found = ranges(sizes, stages)
    assert [n for each in found for n in each] == list(range(len(sizes)))
    assert len(found) == stages and all(len(each) > 0 for each in found)
    cuts = itertools.combinations(range(1, len(sizes)), stages - 1)
    best = min(
        max(sum(sizes[a:b]) for a, b in itertools.pairwise((0, *cut, len(sizes)))) for cut in cuts
    )
    assert max(sum(sizes[n] for n in each) for each in found) == best


@pytest.mark.parametrize(
    ("name", "grid"), [("r1", {"pp": 2}), ("r1", {"tp": 8, "pp": 2}), ("kimi-k2", {"pp": 4})]
)
def test_published_shapes(name: str, grid: dict[str, int]) -> None:
    """The largest share is near an even one, also where the first layers are dense."""
    config = shape(name)
    alone = resolve(Backend(quant="fp8"), config, H100)
    spread = resolve(Backend(quant="fp8", **grid), config, H100)  # type: ignore[arg-type]
    most = build.weight_bytes(config, spread) * spread.ranks
    assert 1 <= most / build.weight_bytes(config, alone) < 1.1


def test_a_step_waits_for_all_stages() -> None:
    """One token's work is that of all stages; a prompt's chunks keep all of them busy."""
    one = resolve(Backend(device="cpu", dtype="bf16"), TINY)
    two = replace(one, pp=2)
    assert roofline.step_work(TINY, two, 2, 1, 9, 3) == roofline.step_work(TINY, one, 2, 1, 9, 3)
    long, halved = (roofline.step_work(TINY, each, 1, 64, 0, 8) for each in (one, two))
    assert halved.nbytes == long.nbytes / 2 and halved.flops == long.flops / 2


# ---------------------------- refusals
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"pp": 6}, "pp=6: this model has 5 layers, .*use at most pp=5"),
    "graphs": ({"pp": 2, "cuda_graphs": True}, "cuda_graphs takes a step as a whole, and pp=2"),
    "prompts": (
        {"pp": 2, "prefill_graphs": True},
        "prefill_graphs takes a step .*pp=2",
    ),
    "fused": ({"pp": 2, "kernels": "triton"}, "kernels=triton takes a step as a whole, and pp=2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_stages_can_not_do_is_refused(case: str) -> None:
    switches, sentence = REFUSED[case]
    with pytest.raises(InputError, match=sentence):
        resolve(Backend(**switches), DEEP, H100)


def test_stages_need_processes(deep: Path) -> None:
    with pytest.raises(InputError, match="tp=2 and pp=2 needs 4 processes, and 1 was started"):
        engine_of(deep, {"tp": 2, "pp": 2})


def test_a_stage_is_not_saved_as_a_model(tmp_path: Path) -> None:
    backend = resolve(Backend(device="cpu", pp=2), DEEP)
    with pytest.raises(InputError, match="holds a part of the model"):
        save(build.sketch(DEEP, backend), tmp_path / "model")


def spoiled(folder: Path) -> None:
    engine = engine_of(folder, {"pp": 2})
    if dist.get_rank() == 1:
        for weight in engine.model.layers[0].parameters():
            weight.fill_(float("nan"))
    engine.generate([[5]], 4)


def test_faults_are_told_on_every_stage(ranks: Ranks, deep: Path, tmp_path: Path) -> None:
    """Another checkpoint on one stage, other switches, or what only one of them can see."""
    pp = {"pp": 2}
    other = Path(shutil.copytree(deep, tmp_path / "other"))
    made = engine_of(other, {}).model
    made.norm.weight.data += 1
    shutil.rmtree(other)
    save(made, other)
    broken = Path(shutil.copytree(deep, tmp_path / "broken"))
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    cases: list[tuple[str, Any, list[Any]]] = [
        ("rank 1 differs from rank 0 in its weights", unlike, [[deep, other], [pp, pp]]),
        ("rank 1 differs from rank 0 in the switches", unlike,
         [[deep] * 2, [pp, {**pp, "join": "off"}]]),
        ("rank 1: ", unlike, [[deep, broken], [pp, pp]]),
        ("the model's logits for prompt 0 are no numbers", spoiled, [deep]),
    ]  # fmt: skip
    for sentence, call, arguments in cases:
        found = ranks.run(2, call, *arguments)
        assert found[0].sentence.startswith(sentence) and found[1] == found[0]
