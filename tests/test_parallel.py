"""Several processes share a model (gloo on a CPU): what they compute is what one process computes.

Holds r1/placement to account: the cuts, the sums, what each rank reads and holds, and the same
tokens on every rank. tests/test_stages.py has pipelines, tests/test_torchrun.py the commands.
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import writers
from decoding import PROMPTS, STEPS, read
from models import TINY, TINY_GROUPED, TINY_QWEN2, V3, drafting_engine, model
from ranks import Ranks, Refused
from safetensors.torch import load_file
from tolerances import atol
from torch import Tensor

import r1
from r1 import Backend, InputError, build
from r1.files.config_json import load_config
from r1.files.names import places
from r1.files.save import save
from r1.kernels.block import DecodeBlock, output_head
from r1.kernels.chip import Chip
from r1.model.config import Config
from r1.model.shapes import shape
from r1.placement.cuts import ALIGNMENT, COLUMNS, CUTS, block_of, span
from r1.placement.mesh import Mesh
from r1.run.engine import Engine
from r1.run.runner import Runner
from r1.storage.spec import Spec
from r1.switches.backend import SHARING
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

SPREAD = V3.change(
    vocab_size=256, hidden_size=32, num_attention_heads=4, q_lora_rank=16, kv_lora_rank=24,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, intermediate_size=80,
    moe_intermediate_size=32, n_shared_experts=2, max_position_embeddings=400,
)  # fmt: skip
"""Four ranks can share it, and blocks of 16 too; 80 inner values are 5 blocks, an uneven share."""

H100 = Machine(cuda=True, name="H100", capability=(9, 0))
GRIDS = [{"tp": 2}, {"ep": 2}, {"tp": 2, "ep": 2}]
"""On two processes, and on four."""
LOOP = {"moe": "loop", "prefill_moe": "loop"}
GATHER = {"moe": "gather", "prefill_moe": "gather"}
GROUPED = {"moe": "grouped", "prefill_moe": "grouped"}
WAYS: list[dict[str, Any]] = [
    {"attention": "naive", **LOOP, "join": "off"},
    {"attention": "expand", **GATHER},
    {"attention": "absorbed", "prefill_attention": "absorbed", **GROUPED},
]
"""Every strategy of both slots."""


def named(switches: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in switches.items())


# ---------------------------- what runs on each rank
def decoded(folder: Path, text: Tensor | None, switches: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Ragged prompts, then `text` step by step, or what is likeliest: the text and all logits."""
    return read(engine_of(folder, switches).runner, text)


def engine_of(folder: Path, switches: dict[str, Any]) -> Engine:
    backend = Backend(**{"device": "cpu", "dtype": "fp32", **switches})
    return r1.load(folder, backend, quiet=True)


def written(folder: Path, switches: dict[str, Any], *sampler: Any) -> list[list[int]]:
    """What the engine generates for the ragged prompts; `sampler`: temperature, top_p, seed."""
    engine = engine_of(folder, switches)
    return [done.tokens for done in engine.generate(PROMPTS, STEPS * 2, *sampler)]


def held(folder: Path, switches: dict[str, Any]) -> tuple[int, int]:
    """The bytes that were read, and those that the model has."""
    config = load_config(folder)
    backend = resolve(Backend(device="cpu", **switches), config)
    made, report = build.from_checkpoint(folder, config, backend, quiet=True)
    return report.nbytes, sum(t.nbytes for t in (*made.parameters(), *made.buffers()))


def drawn(config: Config, switches: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights, by the checkpoint's names."""
    backend = resolve(Backend(device="cpu", **{"dtype": "bf16", **switches}), config)
    return places(build.from_shape(config, backend, mtp=True))


# ---------------------------- fixtures
@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in fp32 whose experts are no near ties: rounding flips none."""
    return saved(SPREAD, tmp_path_factory.mktemp("plain") / "model")


def saved(config: Config, folder: Path) -> Path:
    made = model(config, dtype="fp32", mtp=True)
    generator = torch.Generator().manual_seed(0)
    for key, weight in places(made).items():
        if key.endswith("e_score_correction_bias"):
            weight.copy_(torch.randperm(len(weight), generator=generator) * 2.0)
    save(made, folder)
    return folder


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose MTP layer is often right, though not always."""
    folder = tmp_path_factory.mktemp("drafting") / "model"
    save(drafting_engine(SPREAD, 3, k=2).model, folder)
    return folder


def run(ranks: Ranks, switches: dict[str, Any], call: Any, *arguments: Any) -> list[Any]:
    """On as many processes as the switches ask for."""
    count = math.prod(switches.get(name, 1) for name in SHARING)
    return ranks.run(count, call, *arguments)


def check_logits(ranks: Ranks, folder: Path, switches: dict[str, Any], row: str) -> None:
    """The same logits as in one process, on each rank the very same."""
    alone = {name: value for name, value in switches.items() if name not in SHARING}
    text, right = decoded(folder, None, alone)
    found = run(ranks, switches, decoded, folder, text, switches)
    assert not any(isinstance(each, Refused) for each in found), found
    for _, logits in found:
        assert torch.equal(logits, found[0][1]), "all ranks have the same bits"
        torch.testing.assert_close(logits, right, atol=atol(row), rtol=0)


def check_quantized(
    ranks: Ranks, source: Path, folder: Path, grid: dict[str, int], name: str
) -> None:
    """The same logits of a checkpoint in a quantized format: packed, and dequantized in loading."""
    shutil.copytree(source, folder)
    writers.write(folder, name)
    for quant in (writers.FORMATS[name][0].kind, "none"):
        check_logits(ranks, folder, {**grid, "quant": quant}, "algebra fp32")


# ---------------------------- the same logits
@pytest.mark.parametrize("way", WAYS, ids=named)
@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_ranks_compute_what_one_process_does(
    ranks: Ranks, plain: Path, grid: dict[str, int], way: dict[str, Any]
) -> None:
    """Ragged prompts, every row another; prefill and decode; every strategy."""
    check_logits(ranks, plain, {**grid, **way}, "algebra fp32")


@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_experts_elsewhere(ranks: Ranks, plain: Path, grid: dict[str, int]) -> None:
    """Each rank streams its own part of the experts, from host memory or from the files."""
    for where, slots in (("host", 1), ("host", 3), ("disk", 3)):
        switches = {**grid, "experts": where, "expert_slots": slots, "guess_experts": True}
        check_logits(ranks, plain, switches, "algebra fp32")


@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_in_bf16(ranks: Ranks, plain: Path, grid: dict[str, int]) -> None:
    check_logits(ranks, plain, {**grid, "dtype": "bf16"}, "ranks bf16")


VARIANTS = {
    "direct queries": SPREAD.change(q_lora_rank=None, n_group=1, topk_group=1),
    "no shared experts": SPREAD.change(n_shared_experts=0),
    "tied": SPREAD.change(tie_word_embeddings=True),
    "no experts": SPREAD.change(n_routed_experts=0, n_shared_experts=0),
    "grouped queries, biases": TINY_QWEN2.change(vocab_size=256, num_attention_heads=4),
    "grouped queries, norms": TINY_GROUPED.change(vocab_size=256),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(ranks: Ranks, tmp_path: Path, variant: str) -> None:
    """What differs between the published models; and models of dense layers."""
    folder = saved(VARIANTS[variant], tmp_path / "model")
    sparse = VARIANTS[variant].experts.n_routed_experts > 0
    grid = {"tp": 2, "ep": 2, "prefill_moe": "gather"} if sparse else {"tp": 2}
    check_logits(ranks, folder, grid, "algebra fp32")
    text, right = decoded(folder, None, {})
    for _, logits in run(ranks, grid, fused, folder, text, grid, False):
        torch.testing.assert_close(logits, right, atol=atol("algebra fp32"), rtol=0)


@pytest.mark.parametrize("name", writers.FORMATS)
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[2]], ids=named)
def test_quantized_checkpoints(
    ranks: Ranks, plain: Path, tmp_path: Path, grid: dict[str, int], name: str
) -> None:
    """Packed as they are, and dequantized while loading: the numbers of one process."""
    check_quantized(ranks, plain, tmp_path / "model", grid, name)


def test_quantized_while_loading(ranks: Ranks, plain: Path) -> None:
    """A row's scale is made of all its columns, also where a rank keeps only some of them."""
    check_logits(ranks, plain, {"tp": 2, "quant": "int8"}, "algebra fp32")


@pytest.mark.parametrize("head", ["int8", "fp8"])
def test_a_quantized_output_head(ranks: Ranks, plain: Path, head: str) -> None:
    """256 words are two blocks of FP8, one for each rank."""
    check_logits(ranks, plain, {"tp": 2, "quant_head": head}, "algebra fp32")


# ---------------------------- the same text
@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_greedy_text_is_the_same(ranks: Ranks, plain: Path, grid: dict[str, int]) -> None:
    right = written(plain, {}, 0.0)
    found = run(ranks, grid, written, plain, grid, 0.0)
    assert found == [right] * len(found)


@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_speculation_is_the_same(ranks: Ranks, drafting: Path, grid: dict[str, int]) -> None:
    """The MTP layer is shared too. All ranks accept the same drafts, and some are rejected."""
    drafts = {"speculate": "mtp", "draft_tokens": 2}
    right = answered(drafting, drafts)
    for found in run(ranks, grid, answered, drafting, {**grid, **drafts}):
        assert found == right
    assert 0 < sum(accepted for _, accepted in right) < 2 * STEPS * len(right)


def answered(folder: Path, switches: dict[str, Any]) -> list[tuple[list[int], int]]:
    """Greedy tokens, and how many drafts were accepted, of each row."""
    done = engine_of(folder, switches).generate(PROMPTS, STEPS * 2, 0.0)
    return [(each.tokens, each.accepted) for each in done]


@pytest.mark.parametrize("drafts", [{}, {"speculate": "mtp"}], ids=["plain", "drafts"])
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[2]], ids=named)
def test_all_ranks_draw_the_same(
    ranks: Ranks, drafting: Path, grid: dict[str, int], drafts: dict[str, Any]
) -> None:
    """With a seed what one process draws; without one rank 0's seed is everybody's."""
    right = written(drafting, drafts, 1.0, 0.9, 7)
    found = run(ranks, grid, written, drafting, {**grid, **drafts}, 1.0, 0.9, 7)
    assert found == [right] * len(found) and right != written(drafting, drafts, 1.0, 0.9, 8)
    first, *others = run(ranks, grid, written, drafting, {**grid, **drafts}, 1.0)
    assert others == [first] * len(others) and first != right


# ---------------------------- what a rank reads and holds
def test_each_rank_reads_its_share(ranks: Ranks, plain: Path) -> None:
    """Two ranks read everything once, and what the table does not cut twice; no byte more."""
    whole, _ = held(plain, {})
    found = run(ranks, {"tp": 2}, held, plain, {"tp": 2})
    assert all(read == has - frequency(SPREAD) for read, has in found), "nothing is read in vain"
    stored = {key: t.nbytes for key, t in load_file(plain / "model.safetensors").items()}
    mtp = f"model.layers.{SPREAD.num_hidden_layers}."
    both = sum(
        nbytes
        for key, nbytes in stored.items()
        if not key.startswith(mtp) and name_of(key) not in CUTS
    )
    assert sum(read for read, _ in found) == whole + both


def frequency(config: Config) -> int:
    """Bytes of the rotation's table, which is computed."""
    return 4 * config.attention.qk_rope_head_dim // 2


@pytest.mark.parametrize("name", ["compressed-tensors int4", "awq", "gptq", "fp8 block"])
def test_each_rank_reads_its_share_of_packed_numbers(
    ranks: Ranks, plain: Path, tmp_path: Path, name: str
) -> None:
    """In fp32 what is not packed is most of this small model, so packed numbers alone count."""
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    writers.write(folder, name)
    kind = writers.FORMATS[name][0].kind
    whole = held(folder, {"quant": kind})
    found = run(ranks, {"tp": 2}, held, folder, {"tp": 2, "quant": kind})
    assert sum(read for read, _ in found) < 1.2 * whole[0]


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_random_weights_are_those_of_one_process(ranks: Ranks, quant: str) -> None:
    """Each rank's are parts of the same matrices; the MTP layer's too."""
    whole = drawn(SPREAD, {"quant": quant})
    parts = run(ranks, {"tp": 2}, drawn, SPREAD, {"tp": 2, "quant": quant})
    cuts = set()
    for key, right in whole.items():
        cut = CUTS.get(name_of(key))
        both = [each[key] for each in parts]
        if cut is None or (key.endswith("_scale") and cut.dim == COLUMNS):
            assert all(torch.equal(each, right) for each in both), key
        else:
            cuts.add(name_of(key))
            assert torch.equal(torch.cat(both, dim=cut.dim), right), key
    assert cuts == CUTS.keys() - {"q_proj", "k_proj", "v_proj"}  # of other kinds of attention


def name_of(key: str) -> str:
    return key.rpartition(".")[0].rpartition(".")[2]


# ---------------------------- cuts
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize(("size", "block"), [(1408, 128), (80, 16), (72, 8), (7, 1), (2816, 128)])
def test_shares_are_whole_blocks(size: int, block: int, ranks: int) -> None:
    """Together they are everything, once. None is larger than another by more than a block."""
    shares = [span(size, rank, ranks, block) for rank in range(ranks)]
    assert [n for each in shares for n in range(each.start, each.stop)] == list(range(size))
    assert all(each.start % block == 0 for each in shares)
    sizes = [-(-(each.stop - each.start) // block) for each in shares]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_inner_values_are_shared_in_the_blocks_of_all_storages() -> None:
    assert block_of([]) == ALIGNMENT
    assert block_of([Spec("fp8", 128, 128)]) == 128
    assert block_of([Spec("int4", 1, 48), Spec("int4", 1, 32)]) == 96
    assert block_of([Spec("int8", 1, 0), Spec("fp8", 0, 0)]) == ALIGNMENT


@pytest.mark.parametrize("quant", ["none", "fp8", "int4"])
@pytest.mark.parametrize("tp", [2, 4])
def test_a_rank_has_whole_shared_experts_of_its_own(tp: int, quant: str) -> None:
    """Moonlight's 1,408 inner values are 11 blocks of 128: 6 and 5 for two ranks. Its two shared
    experts' 22 were 11 and 11, which kernels could not read as experts of 6 or 5.
    """
    config, inner = shape("moonlight-16b", 2), 0
    backend = resolve(Backend(quant=quant, tp=tp), config, H100)
    for rank in range(tp):
        placement = build.placement_of(config, backend, Mesh(tp, 1, rank))
        moe: Any = build.sketch(config, backend, placement=placement).layers[1].mlp
        one = moe.experts.down_proj.shape[2]
        inner += one
        for layer in (moe.shared_experts.gate_proj, moe.shared_experts.up_proj):
            assert layer.matrix.shape == (2 * one, config.hidden_size)
        assert moe.shared_experts.down_proj.matrix.shape == (config.hidden_size, 2 * one)
    assert inner == config.experts.moe_intermediate_size


SHARED: list[tuple[str, str, dict[str, int]]] = [
    ("r1", "fp8", {"tp": 8}),
    ("r1", "int4", {"tp": 16}),
    ("moonlight-16b", "fp8", {"tp": 2}),
    ("moonlight-16b", "none", {"tp": 2, "ep": 2}),
    ("kimi-k2", "fp8", {"ep": 8}),
]


@pytest.mark.parametrize(("name", "quant", "grid"), SHARED)
def test_published_shapes_can_be_shared(name: str, quant: str, grid: dict[str, int]) -> None:
    """In their usual blocks. The largest share is no more than a tenth above an even one."""
    config = shape(name, 5)
    alone = resolve(Backend(quant=quant), config, H100)
    spread = resolve(replace(Backend(quant=quant), **grid), config, H100)  # type: ignore[arg-type]
    most = build.weight_bytes(config, spread) * spread.ranks
    assert 1 <= most / build.weight_bytes(config, alone) < 1.1


# ---------------------------- refusals
REFUSED: dict[str, tuple[Config, dict[str, Any], str]] = {
    "heads": (TINY, {"tp": 3}, "4 heads, which 3 devices can't share evenly: use tp=2 or tp=4"),
    "experts": (TINY, {"ep": 3}, "16 experts, which 3 devices can't share evenly: use ep=2"),
    "no experts": (TINY.change(n_routed_experts=0), {"ep": 2}, "this model has none: use tp"),
    "words": (TINY.change(vocab_size=322), {"tp": 4}, "322 words, which 4 devices can't"),
    "states": (TINY, {"tp": 4, "ep": 16}, "160 values in a hidden state, which 64 devices"),
    "blocks": (TINY, {"tp": 2, "quant": "fp8"}, "o_proj is stored in blocks of 128 columns"),
    "a head's blocks": (TINY, {"tp": 2, "quant_head": "fp8"}, "lm_head is stored in blocks of 128"),
    "groups": (TINY, {"ep": 2, "quant": "int4"}, "1 blocks of 128, which can't be shared by 2"),
    "a search": (TINY, {"tp": 2, "kernels": "triton", "tune": True}, "tune times one process's"),
    "nobody else": (TINY, {"tp": 2}, "needs 2 processes, and 1 was started: use torchrun"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_devices_can_not_share_is_refused(case: str) -> None:
    config, switches, sentence = REFUSED[case]
    machine = H100 if case == "a search" else None
    with pytest.raises(InputError, match=sentence):
        backend = resolve(Backend(**{"dtype": "fp32", **switches}), config, machine)
        build.sketch(config, backend)
        build.from_shape(config, backend)


@pytest.mark.parametrize("value", [0, -1, 2.0, True])
@pytest.mark.parametrize("name", SHARING)
def test_a_number_of_devices(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}={value!r}: give a whole number of at least 1"):
        Backend(**{name: value})


def test_a_part_is_not_saved_as_a_model(tmp_path: Path) -> None:
    backend = resolve(Backend(device="cpu", tp=2), SPREAD)
    with pytest.raises(InputError, match="holds a part of the model"):
        save(build.sketch(SPREAD, backend), tmp_path / "model")


def test_a_table_of_groups_keeps_columns_together() -> None:
    """GPTQ's act order: a device's columns would need scales of all groups."""
    spec = Spec("int4", 1, 8, indexed=True)
    names = frozenset({"model.layers.0.self_attn.o_proj"})
    config = SPREAD.change(stored=((spec, names),))
    backend = resolve(Backend(device="cpu", tp=2), config)
    with pytest.raises(InputError, match="g_idx.*use quant=none"):
        build.sketch(config, backend)


def unlike(folders: list[Path], switches: list[dict[str, Any]]) -> None:
    """Each rank loads a folder of its own, with its own switches."""
    rank = dist.get_rank()
    engine_of(folders[rank], switches[rank])


def unlike_prompts(folder: Path) -> None:
    engine = engine_of(folder, {"tp": 2})
    engine.generate([[5 + dist.get_rank()]], 4)


def test_ranks_that_differ_are_told(
    ranks: Ranks, plain: Path, drafting: Path, tmp_path: Path
) -> None:
    """One sentence, the same on every rank, and none waits for another."""
    tp = {"tp": 2}
    broken = Path(shutil.copytree(plain, tmp_path / "broken"))
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    cases: dict[str, list[Any]] = {
        "rank 1 differs from rank 0 in the switches": [[plain] * 2, [tp, {**tp, "join": "off"}]],
        "rank 1 differs from rank 0 in its weights": [[plain, drafting], [tp, tp]],
        "rank 1: .*is cut off or corrupt": [[plain, broken], [tp, tp]],
    }
    for sentence, arguments in cases.items():
        found = ranks.run(2, unlike, *arguments)
        assert re.search(sentence, found[0].sentence) and found[1] == found[0]
    found = ranks.run(2, unlike_prompts, plain)
    assert "differs from rank 0 in the prompts" in found[0].sentence and found[1] == found[0]


# ---------------------------- kernels, and compiled
def by_kernels(folder: Path, text: Tensor, switches: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`decoded` with the kernels in the slots, which `resolve` refuses to a CPU."""
    engine = engine_of(folder, switches)
    backend = replace(engine.backend, attention="triton", moe="triton", prefill_moe="triton")
    return read(Runner(build.finish(engine.model, backend), backend), text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs kernels on a CPU")
@pytest.mark.parametrize("grid", GRIDS[:2], ids=named)
def test_kernels_compute_a_part(ranks: Ranks, plain: Path, grid: dict[str, int]) -> None:
    """Attention and experts as kernels see only this rank's heads and experts."""
    pytest.importorskip("triton")
    text, right = decoded(plain, None, {})
    for _, logits in run(ranks, grid, by_kernels, plain, text[:1], grid):
        torch.testing.assert_close(logits, right[:2], atol=atol("algebra fp32"), rtol=0)


def fused(
    folder: Path, text: Tensor, switches: dict[str, Any], interpreted: bool
) -> tuple[Tensor, Tensor]:
    """`decoded` with fused blocks, of kernels or of their twins, and with the output head's."""
    runner, chip = engine_of(folder, switches).runner, None
    if interpreted:
        chip = Chip.of(torch.device("cpu"))
        way: Any = runner.ways["decode"]
        way.head = partial(output_head, runner.model.lm_head, chip)
    runner.blocks["decode"] = [DecodeBlock(block, chip) for block in runner.model.layers]
    return read(runner, text)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 inner values are 16 and 8 for two devices, and their shared experts' 48 are 32 and 16.
    With `ep` as well, four devices share these, as 16, 16, 8 and 8: half an expert for one of them.
    """
    config = SPREAD.change(moe_intermediate_size=24)
    return saved(config, tmp_path_factory.mktemp("uneven") / "model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs kernels on a CPU")
@pytest.mark.parametrize("interpreted", [False, True], ids=["twins", "kernels"])
def test_fused_blocks_compute_a_part(
    ranks: Ranks, plain: Path, uneven: Path, interpreted: bool
) -> None:
    """Each adds its heads and its inner values, and one of them the rest."""
    pytest.importorskip("triton")
    # The interpreter is slow.
    folders = (uneven,) if interpreted else (plain, uneven)
    quants: tuple[dict[str, str], ...] = ({},) if interpreted else ({}, {"quant": "int8"})
    grids = GRIDS[1:] if interpreted else GRIDS
    for folder, grid, quant in itertools.product(folders, grids, quants):
        text, right = decoded(folder, None, quant)
        steps, switches = 1 if interpreted else len(text), {**grid, **quant}
        for _, logits in run(ranks, switches, fused, folder, text[:steps], switches, interpreted):
            within = atol("algebra fp32")
            torch.testing.assert_close(logits, right[: steps + 1], atol=within, rtol=0)


def traced(folder: Path, tokens: Tensor, switches: dict[str, Any]) -> Tensor:
    """Logits of blocks as compile_block compiles them, but for Inductor, which takes long."""
    engine = engine_of(folder, switches)
    engine.runner.blocks["prefill"] = [
        torch.compile(block.__call__, fullgraph=True, dynamic=True, backend="eager")
        for block in engine.model.layers
    ]
    return engine.logits(tokens)


def test_compiled_blocks_hold_the_sums(ranks: Ranks, plain: Path) -> None:
    """Without a graph break, which is an error."""
    tokens = torch.arange(12).view(2, 6)
    right = engine_of(plain, {}).logits(tokens)
    for logits in run(ranks, {"tp": 2}, traced, plain, tokens, {"tp": 2}):
        torch.testing.assert_close(logits, right, atol=atol("algebra fp32"), rtol=0)
