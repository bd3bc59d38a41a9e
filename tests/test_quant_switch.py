"""`quant`: checkpoints in every published format, kept, dequantized, or quantized while loading.

Holds to account: r1/switches/precision.py, r1/files/fill.py, r1/files/load.py, r1/files/quantized,
and what r1/build.py and r1/switches/resolve.py make of the switch.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import writers
from decoding import PROMPTS, read
from folders import load, rewrite
from models import V3, model
from refusals import refused
from tolerances import atol
from torch import Tensor

import r1
from r1 import Backend, build
from r1.files.config_json import load_config
from r1.files.names import places, slots
from r1.files.save import save
from r1.model.layers import Linear
from r1.model.moe import Experts, MoE
from r1.model.transformer import Transformer
from r1.run.runner import Runner
from r1.storage import int4_cpu
from r1.storage.joined import Part
from r1.storage.kinds import KINDS, USUAL
from r1.storage.quantized import Quantized
from r1.switches.machine import Machine
from r1.switches.precision import KEPT
from r1.switches.resolve import resolve

CONFIG = V3.change(
    hidden_size=32, intermediate_size=40, moe_intermediate_size=16, q_lora_rank=24,
    kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_attention_heads=4,
    vocab_size=320,
)  # fmt: skip
"""All widths are multiples of 8, which AWQ's and GPTQ's words need."""
IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder in bf16."""
    made = model(CONFIG, mtp=True, dtype="bf16")
    save(made, tmp_path / "plain")
    return tmp_path / "plain"


def quantized_of(made: Transformer) -> dict[str, Quantized]:
    """The packed matrices by the module's path; a joined one under each of its parts."""
    out = {}
    for path, module in made.named_modules():
        found: dict[str, Any] = {}
        if isinstance(module, Linear):
            found[path] = module.matrix
        elif isinstance(module, Experts):
            names = ("gate_proj", "up_proj", "down_proj")
            found = {f"{path}.{name}": getattr(module, name) for name in names}
        for name, matrix in found.items():
            whole = matrix.whole if isinstance(matrix, Part) else matrix
            if isinstance(whole, Quantized):
                out[name] = whole
    return out


def logits(made: Transformer, **switches: Any) -> Tensor:
    backend = resolve(Backend(device="cpu", dtype="fp32", **switches), made.config)
    return Runner(made, backend).logits(IDS)


# ---------------------------- published checkpoints
@pytest.mark.parametrize("name", writers.FORMATS)
def test_a_published_checkpoint(name: str, plain: Path) -> None:
    """Packed in memory, it computes what its dequantized weights do, which are the right ones."""
    before, _ = load(plain, dtype="fp32", mtp=True)
    right = {key: place.clone() for key, place in places(before).items()}
    writers.write(plain, name)
    spec, _, _ = writers.FORMATS[name]
    config = load_config(plain)
    assert config.files.kind == spec.kind
    dense, _ = load(plain, dtype="fp32", quant="none", mtp=True)
    assert not quantized_of(dense)
    for key, place in places(dense).items():
        if writers.matters(key):
            weight = right[key]
            stored = KINDS[spec.kind].of(weight, spec).dense(torch.float32)
            assert torch.equal(place, stored), key
        else:
            assert torch.equal(place, right[key]), key
    kept, report = load(plain, dtype="fp32", quant=spec.kind, mtp=True)
    packed = quantized_of(kept)
    assert {path.rpartition(".")[2] for path in packed} == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all(each.spec == spec for each in packed.values())
    torch.testing.assert_close(logits(kept), logits(dense), atol=atol("algebra fp32"), rtol=0)
    assert report.nbytes < sum(t.nbytes for t in places(dense).values())
    unused = [keys for why, keys in report.skipped.items() if "activations" in why]
    assert bool(unused) == (pack_has_input_scale(name))


def pack_has_input_scale(name: str) -> bool:
    return name.startswith(("fp8", "int8"))


def test_experts_only(plain: Path) -> None:
    """ISTA's and Kimi's layout: routed experts are packed, the others stay as they are."""
    writers.write(plain, "compressed-tensors int4", only=r"\.experts\.")
    kept, _ = load(plain)
    assert kept.config.files.kind == "int4"
    assert quantized_of(kept).keys() == {
        f"layers.1.mlp.experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize("where", ["compression_config", "text_config"])
def test_other_places_of_the_description(where: str, plain: Path) -> None:
    writers.write(plain, "compressed-tensors int4", where="compression_config")
    if where == "text_config":
        _, _, config = writers.FORMATS["compressed-tensors int4"]
        nested = {"quantization_config": config}
        writers.set_config(plain, compression_config=None, text_config=nested)
    assert load_config(plain).files.kind == "int4"
    load(plain)


def test_modelopt_and_an_index_that_omits_its_tensors(plain: Path) -> None:
    """NVIDIA's folders: nothing in config.json, and scales that the index does not list."""
    writers.write(plain, "fp8 matrix", where="unused")
    found = {}
    rewrite(plain, lambda t: found.update(t))
    listed = {k: "model.safetensors" for k in found if not k.endswith("_scale")}
    index = json.dumps({"metadata": {}, "weight_map": listed})
    (plain / "model.safetensors.index.json").write_text(index)
    with refused("has it nowhere"):
        load(plain)
    description = {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (plain / "hf_quant_config.json").write_text(json.dumps({"quantization": description}))
    assert load_config(plain).files.kind == "fp8"
    kept, _ = load(plain, quant="fp8")
    assert quantized_of(kept)


# ---------------------------- the switch
@pytest.mark.parametrize("quant", USUAL)
def test_quantizing_while_loading(quant: str, plain: Path) -> None:
    """Matrix by matrix what the storage's own rounding makes; the table's are left alone."""
    dense, _ = load(plain, dtype="fp32", quant="none", join="off", mtp=True)
    made, _ = load(plain, dtype="fp32", quant=quant, join="off", mtp=True)
    linears: dict[str, Any] = dict(dense.named_modules())
    for path, matrix in quantized_of(made).items():
        owner, _, name = path.rpartition(".")
        source = linears[path]
        source = source.matrix if isinstance(source, Linear) else getattr(linears[owner], name)
        right = KINDS[USUAL[quant].kind].of(source.dense(), USUAL[quant])
        assert matrix.spec == USUAL[quant]
        assert all(
            torch.equal(matrix.stored()[n].float(), t.float()) for n, t in right.stored().items()
        )
    stored = slots(made)
    assert all(stored[f"model.layers.1.self_attn.{n}.weight"].spec is None for n in ("kv_b_proj",))
    assert (
        stored["lm_head.weight"].spec is None and stored["model.embed_tokens.weight"].spec is None
    )


def test_a_named_group_size_keeps_groups_of_this_size_only(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files in groups of 32: int4 and int4-g32 keep them to the bit, int4-g64 packs anew. (The
    model is small, so here 8 stands for 32, and 16 for 64.)
    """
    for quant, columns in (("int4-g32", 8), ("int4-g64", 16)):
        monkeypatch.setitem(USUAL, quant, dataclasses.replace(USUAL[quant], columns=columns))
    writers.write(plain, "compressed-tensors int4", only=r"\.experts\.")
    (stored,) = (spec for spec, _ in load_config(plain).files.stored)
    assert stored.columns == 8
    files, _ = load(plain, dtype="fp32", join="off")
    of_files = quantized_of(files)
    for quant, kept in (("int4", True), ("int4-g32", True), ("int4-g64", False)):
        made, _ = load(plain, dtype="fp32", quant=quant, join="off")
        found = quantized_of(made)
        for path, matrix in of_files.items():
            same = found[path].spec == matrix.spec and all(
                torch.equal(found[path].stored()[n], t) for n, t in matrix.stored().items()
            )
            assert same == kept, (quant, path)
        # What the files leave alone is packed only if the files' kind isn't all that is asked for.
        assert (len(found) > len(of_files)) == (quant != "int4")
        if quant != "int4":
            assert {m.spec.columns for p, m in found.items() if p not in of_files} == {
                USUAL[quant].columns
            }


def test_the_unquantized_model_is_never_held(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While int4 is made of a bf16 checkpoint, one matrix at a time is given to the rounding."""
    sizes: list[tuple[int, ...]] = []
    quantize = KINDS["int4"].quantize

    def count(weight: Tensor, spec: Any) -> dict[str, Tensor]:
        sizes.append(tuple(weight.shape))
        return quantize(weight, spec)

    monkeypatch.setattr(KINDS["int4"], "quantize", count)
    made, _ = load(plain, quant="int4")
    assert len(sizes) > 3 * CONFIG.experts.n_routed_experts
    assert all(len(size) == 2 for size in sizes)
    bytes_ = sum(t.nbytes for t in places(made).values())
    assert bytes_ == sum(t.nbytes for t in (*made.parameters(), *made.buffers())) - 4 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_those_of_the_seed(kind: str) -> None:
    """`--shape` with quant: the same numbers, packed one matrix after the other."""
    dense = build.from_shape(CONFIG, resolve(Backend(device="cpu"), CONFIG), seed=3)
    backend = resolve(Backend(device="cpu", quant=kind), CONFIG)
    made = build.from_shape(CONFIG, backend, seed=3)
    right = {key: slot.weight for key, slot in slots(dense).items()}
    for key, slot in slots(made).items():
        if slot.spec is None:
            assert torch.equal(slot.weight, right[key]), key
        else:
            packed = KINDS[kind].quantize(right[key], slot.spec)
            assert all(torch.equal(slot.views[n].float(), t.float()) for n, t in packed.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "switches",
    [
        {
            "attention": "naive",
            "prefill_attention": "naive",
            "moe": "loop",
            "prefill_moe": "gather",
        },
        {"moe": "gather", "prefill_moe": "loop", "join": "off"},
        {"moe": "grouped", "prefill_moe": "grouped", "amp": "bf16"},
    ],
)
def test_every_strategy_reads_every_storage(kind: str, switches: dict[str, Any]) -> None:
    """Prompt and decode steps: what the same numbers give as plain tensors."""
    backend = resolve(Backend(device="cpu", dtype="fp32", quant=kind, **switches), CONFIG)
    packed = build.from_shape(CONFIG, backend, seed=1)
    plain = resolve(Backend(device="cpu", dtype="fp32", **switches), CONFIG)
    dense = build.from_shape(CONFIG, plain, seed=1)
    for key, slot in slots(packed).items():
        place = slots(dense)[key].weight
        if slot.spec is not None:
            matrix = KINDS[kind](slot.spec, slot.shape, torch.float32, slot.views)
            place.copy_(matrix.dense())
    text, right = read(Runner(dense, plain))
    _, ours = read(Runner(packed, backend), text)
    bound = "amp bf16" if "amp" in switches else "algebra fp32"
    torch.testing.assert_close(ours, right, atol=atol(bound), rtol=0)
    assert len(PROMPTS) == len(text[0])


WIDE = CONFIG.change(
    hidden_size=128, intermediate_size=128, moe_intermediate_size=128, q_lora_rank=128,
    kv_lora_rank=56, qk_rope_head_dim=8,
)  # fmt: skip
"""Sizes that the CPU's int4 operator takes; not those of q_b_proj."""


@pytest.mark.parametrize("switches", [{"dtype": "bf16"}, {"dtype": "fp32", "amp": "bf16"}])
@pytest.mark.parametrize("join", ["on", "off"])
def test_int4_is_repacked_for_a_cpus_bf16(
    join: str, switches: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number changes, prompts and decode steps say the same, and no int4 matrix is dequantized
    that need not be.
    """
    backend = resolve(Backend(device="cpu", quant="int4", join=join, **switches), WIDE)
    assert backend.moe == backend.prefill_moe == "grouped"
    ours = build.from_shape(WIDE, backend, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(int4_cpu, "repack", lambda _, **__: None)
        plain = build.from_shape(WIDE, backend, seed=1)
    assert not any(isinstance(module, int4_cpu.CpuInt4) for module in plain.modules())
    assert isinstance(ours.layers[1].mlp, MoE)
    stack = ours.layers[1].mlp.experts.up_proj
    assert isinstance(stack.whole if join == "on" else stack, int4_cpu.CpuInt4)
    for key, slot in slots(plain).items():
        assert slots(ours)[key].spec == slot.spec
        for name, tensor in slot.views.items():
            assert torch.equal(slots(ours)[key].views[name], tensor), key
    text, right = read(Runner(plain, backend))
    monkeypatch.setattr(int4_cpu.CpuInt4, "dense", None)  # nobody asks for it
    _, found = read(Runner(ours, backend), text)
    far = (found - right).abs().amax(dim=-1) > atol("amp bf16")
    assert far.sum() <= 1  # a near tie between two experts may go the other way


def test_only_bf16_on_a_cpu_is_repacked(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Transformer] = []
    monkeypatch.setattr(int4_cpu, "repack", lambda each, **_: made.append(each))
    for dtype, count in (("fp32", 0), ("fp16", 0), ("bf16", 1)):
        backend = resolve(Backend(device="cpu", quant="int4", dtype=dtype), WIDE)
        build.from_shape(WIDE, backend)
        assert len(made) == count
        assert backend.moe == ("grouped" if count else "gather")


def test_saving_a_repacked_model(plain: Path, tmp_path: Path) -> None:
    save(model(WIDE, dtype="bf16"), tmp_path / "wide")
    made, _ = load(tmp_path / "wide", quant="int4", dtype="bf16")
    assert any(isinstance(module, int4_cpu.CpuInt4) for module in made.modules())
    save(made, tmp_path / "saved")
    again, _ = load(tmp_path / "saved", dtype="bf16")
    for key, slot in slots(made).items():
        if slot.spec is not None:
            matrix = KINDS["int4"](slot.spec, slot.shape, torch.bfloat16, slot.views)
            assert torch.equal(slots(again)[key].weight, matrix.dense()), key


def test_the_table_of_what_is_kept() -> None:
    """Each entry names a matrix of a model, and none of them is quantized."""
    backend = resolve(Backend(device="cpu", quant="int4"), V3)
    made = build.sketch(V3, backend, mtp=True)
    names = {path.rpartition(".")[2] for path, _ in made.named_modules()}
    assert names >= KEPT.keys()
    packed = {path.rpartition(".")[2] for path in quantized_of(made)}
    assert packed and not packed & KEPT.keys()


@pytest.mark.parametrize("quant", ["none", "int4"])
@pytest.mark.parametrize("head", ["fp8", "int8"])
def test_the_output_head_has_its_own_switch(head: str, quant: str, plain: Path) -> None:
    """It is stored in its kind, the other matrices as `quant` says, and multiplies as its numbers
    do.
    """
    made, _ = load(plain, quant=quant, quant_head=head, dtype="fp32", join="off")
    without, _ = load(plain, quant=quant, dtype="fp32", join="off")
    found, usual = quantized_of(made), quantized_of(without)
    assert set(found) == {*usual, "lm_head"}
    assert found["lm_head"].spec == USUAL[head]
    right = slots(without)["lm_head.weight"].weight
    packed = KINDS[head].quantize(right, USUAL[head])
    for name, tensor in packed.items():
        stored = slots(made)["lm_head.weight"].views[name]
        assert torch.equal(stored.float(), tensor.float())
    ours = logits(made, quant=quant, quant_head=head)
    theirs = logits(without, quant=quant)
    hidden = theirs @ torch.linalg.pinv(right.T)  # of as many numbers as there are logits at least
    expected = hidden @ made.lm_head.matrix.dense(torch.float32).T
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
    assert not torch.equal(ours, theirs)


def test_a_tied_output_head_is_not_quantized() -> None:
    tied = CONFIG.change(tie_word_embeddings=True)
    with refused("quant_head=int8: this model's output head is its embedding too"):
        resolve(Backend(device="cpu", quant_head="int8"), tied)
    assert resolve(Backend(device="cpu", quant="int8"), tied).quant == "int8"


def test_the_error_of_a_model_that_is_too_large_names_its_storages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "available_bytes", lambda _: 0)
    for quant, head, words in (
        ("int4", "int8", "in fp32 and int4 and int8 and"),
        ("none", "int8", "in fp32 and int8 and"),
        ("int8", "int8", "in fp32 and int8 and"),
        ("none", "none", "in fp32 and"),
    ):
        backend = resolve(Backend(device="cpu", quant=quant, quant_head=head), CONFIG)
        with refused(f"needs .* GB {words} cpu has"):
            build.from_shape(CONFIG, backend)


def test_auto() -> None:
    """It keeps what the files have, where it can be used."""
    stored = ((USUAL["int4"], frozenset({"model.layers.0.mlp.down_proj"})),)
    int4, fp8 = CONFIG.change(stored=stored), CONFIG.change(stored=((USUAL["fp8"], stored[0][1]),))
    gpu = Machine(cuda=True, capability=(9, 0), name="H100", compiler=True)
    cpu = Machine()
    cases: tuple[tuple[Any, Machine, dict[str, Any], str], ...] = (
        (int4, cpu, {}, "int4"),
        (int4, gpu, {}, "int4"),
        (fp8, gpu, {}, "fp8"),
        (fp8, cpu, {}, "none"),
        (fp8, cpu, {"quant": "fp8"}, "fp8"),
        (CONFIG, gpu, {}, "none"),
        (int4, gpu, {"kernels": "triton"}, "int4"),
        (int4, gpu, {"prefill_moe": "triton"}, "int4"),
        (int4, gpu, {"prefill_moe": "triton", "compile": True}, "int4"),
        (int4, cpu, {"quant": "none"}, "none"),
    )
    for config, machine, asked, got in cases:
        assert resolve(Backend(**asked), config, machine).quant == got


def test_memory_is_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = resolve(Backend(device="cpu", quant="int4"), CONFIG)
    made = build.from_shape(CONFIG, backend)
    tensors = {t.data_ptr(): t for t in (*made.parameters(), *made.buffers())}
    del tensors[made.frequency.data_ptr()]
    predicted = build.weight_bytes(CONFIG, backend)
    assert predicted == sum(t.nbytes for t in tensors.values())
    assert predicted < 0.6 * build.weight_bytes(CONFIG, resolve(Backend(device="cpu"), CONFIG))
    monkeypatch.setattr(build, "available_bytes", lambda _: 0)
    with refused("needs .* GB in fp32 and int4 and .* free: use "):
        build.from_shape(CONFIG, backend)


def test_saving_a_packed_model(plain: Path, tmp_path: Path) -> None:
    """FP8 blocks are written as they lie in memory; other storages as numbers."""
    for name, kind in (("int8 channel", "int8"), ("R1's", "fp8")):
        if kind == "fp8":
            plain = tmp_path / "fp8"
            save(model(CONFIG.change(fp8_block=(16, 16))), plain)
        else:
            writers.write(plain, name)
        made, _ = load(plain, quant=kind, dtype="fp32")
        assert quantized_of(made)
        save(made, tmp_path / f"saved-{kind}")
        again, _ = load(tmp_path / f"saved-{kind}", dtype="fp32", quant="none")
        right, _ = load(plain, quant="none", dtype="fp32")
        for key, place in places(right).items():
            assert torch.equal(places(again)[key], place), key


def test_the_engine_answers(plain: Path) -> None:
    writers.write(plain, "awq")
    engine = r1.load(plain, Backend(device="cpu"), quiet=True)
    assert engine.backend.quant == "int4"
    right = r1.load(plain, Backend(device="cpu", quant="none"), quiet=True)
    ours, theirs = (e.generate([[1, 2, 3]], 6, 0.0)[0].tokens for e in (engine, right))
    assert ours == theirs


# ---------------------------- bad input
KEY = "model.layers.1.mlp.experts.2.up_proj"
BAD: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "no scales": (
        "compressed-tensors int4", lambda t: t.pop(f"{KEY}.weight_scale"),
        (f"{KEY}.weight_packed is packed by compressed-tensors, but there is no .*weight_scale",),
    ),
    "no zero points": (
        "compressed-tensors int4 zeros", lambda t: t.pop(f"{KEY}.weight_zero_point"),
        ("symmetric = false, and there is no .*weight_zero_point",),
    ),
    "no qzeros": ("awq", lambda t: t.pop(f"{KEY}.qzeros"), (r"there is no .*up_proj\.qzeros",)),
    "wrong group": (
        "awq", lambda t: t.update({f"{KEY}.scales": t[f"{KEY}.scales"][:2].clone()}),
        (r"shape \(2, 16\); a matrix of 16 x 32 and blocks of \(1, 8\) make it \(4, 16\)",),
    ),
    "odd width": (
        "compressed-tensors int4",
        lambda t: t.update({f"{KEY}.weight_packed": t[f"{KEY}.weight_packed"][:, :3].clone()}),
        (r"has shape \(16, 24\), but config.json makes it \(16, 32\)",),
    ),
    "other shape": (
        "compressed-tensors int4",
        lambda t: t.update({f"{KEY}.weight_shape": torch.tensor([16, 31])}),
        (r"weight_shape says \[16, 31\], and the packed numbers are of \[16, 32\]",),
    ),
    "NaN scale": (
        "gptq", lambda t: t[f"{KEY}.scales"].fill_(float("nan")), (f"{KEY}.scales holds NaN",),
    ),
    "g_idx outside": ("gptq", lambda t: t[f"{KEY}.g_idx"].fill_(4), ("groups outside the 4",)),
    "g_idx in disorder": (
        "gptq", lambda t: t[f"{KEY}.g_idx"].copy_(t[f"{KEY}.g_idx"].flip(0)),
        ("does not count the columns in order",),
    ),
    "bias": ("gptq", lambda t: t[f"{KEY}.bias"].fill_(1), (f"{KEY}.bias is not 0",)),
    "scales of integers": (
        "int8 channel",
        lambda t: t.update({f"{KEY}.weight_scale": t[f"{KEY}.weight_scale"].int()}),
        ("is stored as I32; r1 reads scales in F32, F16, BF16",),
    ),
    "mixed experts": (
        "int8 channel",
        lambda t: t.update({f"{KEY}.weight_scale": t[f"{KEY}.weight_scale"].bfloat16()}),
        ("r1 keeps the experts of a layer alike",),
    ),
    "one expert of floats": (
        "int8 channel",
        lambda t: t.update({
            f"{KEY}.weight": t.pop(f"{KEY}.weight").float() + 0 * t.pop(f"{KEY}.weight_scale"),
        }),
        ("is not quantized, and other experts of its layer are: use quant=none",),
    ),
    "quantized head": (
        "int8 channel",
        lambda t: t.update({
            "lm_head.weight": t["lm_head.weight"].to(torch.int8),
            "lm_head.weight_scale": torch.ones(len(t["lm_head.weight"]), 1),
        }),
        ("lm_head.weight is INT8, and r1 reads embeddings and output heads only where",),
    ),
    "mixed kinds": (
        "int8 channel",
        lambda t: t.update({
            "model.layers.0.mlp.down_proj.weight":
                t["model.layers.0.mlp.down_proj.weight"].float().to(torch.float8_e4m3fn),
        }),
        (r"\(mixed bits\): r1 reads one kind a checkpoint",),
    ),
    "bitsandbytes": (
        "int8 channel", lambda t: t.update({f"{KEY}.weight.absmax": torch.ones(3)}),
        ("is of bitsandbytes, whose formats r1 does not read: load the model in transformers",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors(case: str, plain: Path) -> None:
    name, change, said = BAD[case]
    writers.write(plain, name)
    rewrite(plain, change)
    kind = writers.FORMATS[name][0].kind
    with refused(r"model\.safetensors", *said):
        load(plain, quant=kind)


def test_mxfp4_scale_of_255(plain: Path) -> None:
    """MXFP4 is dequantized; a scale of 255 is NaN."""
    key = "model.layers.0.mlp.gate_proj"
    half = torch.full((40, 16), 0x22, dtype=torch.uint8)  # 1.0 twice
    scale = torch.full((40, 1), 128, dtype=torch.uint8)
    rewrite(plain, lambda t: t.update({f"{key}.weight": half, f"{key}.weight_scale": scale}))
    writers.set_config(plain, quantization_config={"quant_method": "quark"})
    made, _ = load(plain)
    assert bool((places(made)[f"{key}.weight"] == 2).all())
    assert made.config.files.kind is None
    rewrite(plain, lambda t: t[f"{key}.weight_scale"].fill_(255))
    with refused(f"{key}.weight_scale holds scales of 255, which is NaN"):
        load(plain)


CT = writers.FORMATS["compressed-tensors int4"][2]
GPTQ = writers.FORMATS["gptq"][2]
DESCRIPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "layers of their own": (
        {"quant_method": "quark", "layer_quant_config": {"a": 1}},
        "layer_quant_config = .*, which gives layers formats of their own",
    ),
    "dynamic": (GPTQ | {"dynamic": {"a": {"bits": 8}}}, "dynamic = .*mixed bits"),
    "extra": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 8, "extra_config": {"a": 1}},
        "extra_config = .*mixed bits",
    ),
    "3 bits": (GPTQ | {"bits": 3}, "bits = 3, but r1 reads only 4 or 8"),
    "2 bits": ({"quant_method": "auto-round", "bits": 2, "group_size": 8}, "bits = 2, but"),
    "no bits": ({"quant_method": "gptq", "group_size": 8}, "has no bits"),
    "group of 0": (GPTQ | {"group_size": 0}, "group_size = 0"),
    "no group": (GPTQ | {"group_size": None}, "group_size = None"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin', but"),
    "gemv": (
        {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemv"}, "version = 'gemv'",
    ),
    "mixed formats": (CT | {"format": "mixed-precision"}, "mixed-precision, and r1 reads one"),
    "sparse": (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    "rotations": (CT | {"transform_config": {"config_groups": {"a": 1}}}, "rotations"),
    "mixed groups": (
        CT | {"config_groups": CT["config_groups"] | {"b": {"weights": {
            "num_bits": 8, "type": "int", "strategy": "channel"}}}},
        "quantize weights in different ways",
    ),
    "no groups": (CT | {"config_groups": {}}, "has no config_groups"),
    "a preset": (CT | {"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16.weights"),
    "w4afp8": ({"quant_method": "w4afp8"}, "quant_method = 'w4afp8', but r1 reads only"),
    "unknown": ({"quant_method": "hqq"}, "quant_method = 'hqq', but r1 reads only fp8, "),
}  # fmt: skip


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_bad_descriptions(case: str, plain: Path) -> None:
    description, said = DESCRIPTIONS[case]
    writers.set_config(plain, quantization_config=description)
    with refused(r"config\.json: quantization_config", said):
        load_config(plain)


def test_a_description_that_is_missing(plain: Path) -> None:
    writers.write(plain, "awq", where="unused")
    with refused("is packed, but config.json has no quantization_config to say how"):
        load(plain)


def test_requantizing(plain: Path) -> None:
    """int4 files into int8 memory."""
    writers.write(plain, "awq")
    made, _ = load(plain, quant="int8", dtype="fp32")
    dense, _ = load(plain, quant="none", dtype="fp32")
    for key, slot in slots(made).items():
        if slot.spec is not None:
            right = KINDS["int8"].quantize(slots(dense)[key].weight, USUAL["int8"])
            assert torch.equal(slot.views["weight"], right["weight"]), key
