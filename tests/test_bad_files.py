"""Tests bad checkpoints: one clear sentence as `r1.InputError`, and exit status 2 from the command.

Holds to account: r1/files, r1/storage and r1/build.py.

Nothing is allocated, changed or half-written. Each way in which a checkpoint's folder can be wrong
is a row of `FOLDERS` or `CONFIGS`. Each is tried through `r1.load` and the command's `main`, and a
few (`test_command`) through a real `python -m r1`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_checkpoint
import pytest
import torch
from folders import load, rewrite, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import V2, V3, WITH_TEXT, model
from refusals import CPU, check_refused, check_sentence, refused, snapshot
from safetensors.torch import save_file
from torch import Tensor

import r1
from r1 import Backend, InputError, build
from r1.__main__ import main
from r1.files.config_json import dump_config, parse_config
from r1.files.load import load as load_files
from r1.files.save import save
from r1.files.shards import INDEX, SINGLE
from r1.model import shapes
from r1.model.rope import frequencies
from r1.storage import fp8

ROOT = Path(__file__).parent.parent
O_PROJ = "model.layers.0.self_attn.o_proj.weight"  # (32, 24): 2 x 2 blocks, ragged
SCALE = O_PROJ + "_scale_inv"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
ROUTER = "model.layers.1.mlp.gate.weight"

Folder = Callable[[Path], Any]


def test_the_sound_folder_is_sound(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else all that follows would prove nothing."""
    engine = r1.load(sound, CPU, quiet=True)
    assert len(list(sound.glob("*.safetensors"))) > 2
    assert engine.generate([[1, 2, 3]], max_new_tokens=2, temperature=0.0)
    before = snapshot(sound)
    assert main(["--model", str(sound), "--device", "cpu", "--new", "2", "hi"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert snapshot(sound) == before


# ---------------------------- folders
def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def cut(keep: float) -> Folder:
    def change(folder: Path) -> None:
        data = first_shard(folder).read_bytes()
        first_shard(folder).write_bytes(data[: int(len(data) * keep)])

    return change


def replace_file(name: str, make: Callable[[Path], Any]) -> Folder:
    """The first file of that pattern gives way to what `make` puts there."""

    def change(folder: Path) -> None:
        path = min(folder.glob(name))
        path.unlink()
        make(path)

    return change


def overwrite(at: int, data: bytes) -> Folder:
    def change(folder: Path) -> None:
        whole = bytearray(first_shard(folder).read_bytes())
        whole[at : at + len(data)] = data
        first_shard(folder).write_bytes(whole)

    return change


def index(change: Callable[[dict[str, Any]], Any]) -> Folder:
    def apply(folder: Path) -> None:
        path = folder / INDEX
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return apply


def point_to(name: str) -> Folder:
    """An index that has one tensor elsewhere: where a sound shard lies waiting, so that only the
    name can be the reason.
    """

    def apply(folder: Path) -> None:
        target = Path(os.path.normpath(folder / name))
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            save_file({"model.norm.weight": torch.ones(32)}, target)
        index(lambda found: found["weight_map"].update({"model.norm.weight": name}))(folder)

    return apply


def edit(change: Callable[[dict[str, Tensor]], Any]) -> Folder:
    return lambda folder: rewrite(folder, change)


def put(key: str, tensor: Callable[[Tensor], Tensor]) -> Folder:
    return edit(lambda found: found.update({key: tensor(found[key])}))


def fill(value: float) -> Folder:
    def change(scale: Tensor) -> Tensor:
        scale[-1, -1] = value
        return scale

    return put(SCALE, change)


def byte(bits: int) -> Callable[[Tensor], Tensor]:
    """Set the last element of FP8 weights."""

    def change(weight: Tensor) -> Tensor:
        weight.view(torch.uint8)[-1, -1] = bits
        return weight

    return change


def last(value: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight.flatten()[-1] = value
        return weight

    return change


def write(name: str, data: bytes) -> Folder:
    return lambda folder: (folder / name).write_bytes(data)


def set_config(**fields: Any) -> Folder:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


class Mark:
    """Unpickling one of these writes a file: what a pickle in a checkpoint's folder could do."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def no_safetensors(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()


def only_pickles(folder: Path) -> None:
    no_safetensors(folder)
    put_pickles(folder)


def put_pickles(folder: Path) -> None:
    danger = pickle.dumps(Mark(folder / "opened"))
    (folder / "pytorch_model.bin").write_bytes(danger)
    (folder / "consolidated.00.pth").write_bytes(danger)


def pickle_in_disguise(folder: Path) -> None:
    first_shard(folder).write_bytes(pickle.dumps(Mark(folder / "opened")))


def header(entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


NESTED = b'{"a":' * 100_000
FOLDERS: dict[str, tuple[Folder, tuple[str, ...]]] = {
    # config.json
    "no config": (lambda f: (f / "config.json").unlink(), ("sound has no config.json",)),
    "config is a folder": (replace_file("config.json", Path.mkdir), ("has no config.json",)),
    "empty config": (
        write("config.json", b""),
        (r"config\.json can't be read as JSON", "download it again"),
    ),
    "config of half a file": (
        write("config.json", b'{"model_type": "deepse'),
        ("can't be read as JSON",),
    ),
    "config not UTF-8": (
        write("config.json", b'{"model_type": "\xff\xfe"}'),
        ("can't be read as JSON",),
    ),
    "config a list": (write("config.json", b"[1, 2]"), ("holds no JSON object",)),
    "config without end": (write("config.json", NESTED), ("can't be read as JSON",)),
    "another architecture": (
        set_config(model_type="gemma3"),
        (r"config\.json: model_type is 'gemma3'", "deepseek_v3", "deepseek_v2", "kimi_k2", "llama"),
    ),
    # the files
    "no safetensors": (
        no_safetensors,
        (r"has no \*\.safetensors",),
    ),
    "empty shard": (
        cut(0),
        (r"model-00001-of-\d+\.safetensors is cut off or corrupt", "download it again"),
    ),
    "shard of 5 bytes": (
        lambda f: first_shard(f).write_bytes(b"12345"),
        ("model-00001", "cut off or corrupt"),
    ),
    "shard cut in its header": (cut(0.01), ("model-00001", "cut off or corrupt")),
    "shard cut in its data": (cut(0.9), ("model-00001", "cut off or corrupt")),
    "shard with a tail": (
        lambda f: first_shard(f).open("ab").write(b"more"),
        ("model-00001", "cut off or corrupt"),
    ),
    "header longer than the file": (
        overwrite(0, struct.pack("<Q", 2**40)),
        ("model-00001", "cut off or corrupt"),
    ),
    "header not JSON": (overwrite(8, b"\xff\xff\xff\xff"), ("model-00001", "cut off or corrupt")),
    "header of a nested bomb": (
        lambda f: first_shard(f).write_bytes(struct.pack("<Q", len(NESTED)) + NESTED),
        ("cut off or corrupt",),
    ),
    "offsets beyond the data": (
        lambda f: first_shard(f).write_bytes(
            header({"model.norm.weight": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}})
            + bytes(64)
        ),
        ("cut off or corrupt",),
    ),
    "offsets not of the shape": (
        lambda f: first_shard(f).write_bytes(
            header(
                {"model.norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 64]}}
            )
            + bytes(64)
        ),
        ("cut off or corrupt",),
    ),
    "shard is a folder": (replace_file("*.safetensors", Path.mkdir), ("which the folder lacks",)),
    # the index
    "shard lacking": (
        lambda f: first_shard(f).unlink(),
        (r"index\.json names model-00001", "the folder lacks"),
    ),
    "link to nowhere": (
        replace_file("*.safetensors", lambda path: path.symlink_to("gone")),
        ("which the folder lacks",),
    ),
    "index not JSON": (
        write(INDEX, b"{"),
        (r"index\.json can't be read", "download it again"),
    ),
    "index without end": (write(INDEX, NESTED), (r"index\.json can't be read",)),
    "index without a map": (
        write(INDEX, b"{}"),
        (r"index\.json can't be read", "weight_map"),
    ),
    "index a list": (write(INDEX, b"[]"), (r"index\.json can't be read",)),
    "map of numbers": (
        index(lambda i: i["weight_map"].update(a=3)),
        ("does not name a file for each tensor",),
    ),
    "map a list": (
        index(lambda i: i.update(weight_map=["a"])),
        ("does not name a file for each tensor",),
    ),
    "index empty": (
        index(lambda i: i.update(weight_map={})),
        (r"lacks model\.embed_tokens\.weight.*and \d+ more",),
    ),
    "index points up": (
        point_to("../outside.safetensors"),
        (r"'\.\./outside\.safetensors'", "no safetensors file in this"),
    ),
    "index points down": (
        point_to("sub/below.safetensors"),
        ("'sub/below.safetensors'", "not opened"),
    ),
    "index points here the long way": (point_to("./here.safetensors"), ("not opened",)),
    "index points to the folder": (point_to(".."), (r"'\.\.'", "not opened")),
    "index names a pickle": (
        index(lambda i: i["weight_map"].update({O_PROJ: "x.bin"})),
        ("'x.bin'", "not opened"),
    ),
    "index names nothing": (
        index(lambda i: i["weight_map"].update({O_PROJ: ""})),
        ("''", "not opened"),
    ),
    "tensor not in its file": (
        index(lambda i: i["weight_map"].update({"model.layers.9.x": i["weight_map"][O_PROJ]})),
        (r"has model\.layers\.9\.x in files that lack",),
    ),
    "tensor in another file": (
        index(lambda i: i["weight_map"].update({O_PROJ: i["weight_map"]["lm_head.weight"]})),
        (f"holds {O_PROJ!r}", "has it in model-"),
    ),
    "tensor in no file": (
        index(lambda i: i["weight_map"].pop(O_PROJ)),
        (f"holds {O_PROJ!r}", "has it nowhere"),
    ),
    "shards without an index": (
        lambda f: (f / INDEX).unlink(),
        (r"has \d safetensors files but no model\.safet",),
    ),
    # the tensors
    "missing tensor": (
        edit(lambda t: t.pop("model.norm.weight")),
        (r"sound lacks model\.norm\.weight",),
    ),
    "missing tensors": (
        edit(lambda t: [t.pop(k) for k in list(t) if ".mlp.experts.3." in k]),
        (r"lacks model\.layers\.1\.mlp\.experts\.3\.", r", model\.layers\.1\.mlp"),
    ),
    "surplus tensor": (
        edit(lambda t: t.update(stray=torch.zeros(1))),
        ("has stray, for which", "no place"),
    ),
    "surplus expert": (
        edit(
            lambda t: t.update({"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(16, 32)})
        ),
        (r"experts\.8\.up_proj",),
    ),
    "surplus bias of an expert": (
        edit(lambda t: t.update({"model.layers.1.mlp.experts.3.up_proj.bias": torch.zeros(16)})),
        (r"has model\.layers\.1\.mlp\.experts\.3\.up_proj\.bias, for which", "no place"),
    ),
    "no number of an expert": (
        edit(lambda t: t.update({"model.layers.1.mlp.experts.².up_proj.weight": torch.zeros(1)})),
        (r"has model\.layers\.1\.mlp\.experts\.²\.up_proj\.weight, for which", "no place"),
    ),
    "surplus layer": (
        edit(lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.ones(32)})),
        (r"layers\.3\.inp",),
    ),
    "mis-shaped": (
        put("lm_head.weight", lambda t: t[:, :31].contiguous()),
        (r"lm_head\.weight has shape \(300, 31\)", r"makes it \(300, 32\)"),
    ),
    "transposed": (
        put(O_PROJ, lambda t: t.T.contiguous()),
        (re.escape(O_PROJ), r"\(24, 32\)", r"\(32, 24\)"),
    ),
    "a scalar": (
        put("model.norm.weight", lambda t: t[0]),
        (r"model\.norm\.weight has shape \(\)", r"\(32,\)"),
    ),
    "no rows": (put("lm_head.weight", lambda t: t[:0]), (r"\(0, 32\)", r"\(300, 32\)")),
    "int8 weight": (
        put("lm_head.weight", lambda t: t.to(torch.int8)),
        (r"lm_head\.weight is stored as I8", "F8_E4M3"),
    ),
    "e5m2 weight": (
        put(O_PROJ, lambda t: t.to(torch.float8_e5m2)),
        ("is stored as F8_E5M2|has .*scale_inv",),
    ),
    "float64 weight": (put("model.norm.weight", lambda t: t.double()), ("stored as F64",)),
    "complex weight": (
        put("model.norm.weight", lambda t: t.to(torch.complex64)),
        ("stored as C64",),
    ),
    # FP8
    "FP8 without scale": (
        edit(lambda t: t.pop(SCALE)),
        (f"{O_PROJ} is FP8, but there is no {SCALE}",),
    ),
    "scale without FP8": (put(O_PROJ, lambda t: t.bfloat16()), (f"has {SCALE}, for which",)),
    "scale of nothing": (
        edit(lambda t: t.update({"stray_scale_inv": torch.ones(1, 1)})),
        ("has stray_scale_inv",),
    ),
    "NaN scale": (
        fill(float("nan")),
        (f"{SCALE} holds NaN or infinite scales", "sound/model.safetensors"),
    ),
    "infinite scale": (fill(float("inf")), (f"{SCALE} holds NaN or infinite",)),
    "minus infinity": (fill(float("-inf")), (f"{SCALE} holds NaN or infinite",)),
    "NaN byte": (
        put(O_PROJ, byte(0x7F)),
        (f"{O_PROJ} holds NaN or infinite values", "sound/model.safetensors", "checksum"),
    ),
    "negative NaN byte": (put(O_PROJ, byte(0xFF)), (f"{O_PROJ} holds NaN or infinite values",)),
    "NaN norm": (put(NORM, last(float("nan"))), (rf"{NORM} holds NaN or infinite values",)),
    "infinite embedding": (
        put(EMBEDDING, last(float("inf"))),
        (rf"{EMBEDDING} holds NaN or infinite values when it is read as float32",),
    ),
    "minus infinity in a router": (
        put(ROUTER, last(float("-inf"))),
        (rf"{ROUTER} holds NaN or infinite values",),
    ),
    "scales too few": (
        put(SCALE, lambda t: t[:1]),
        (rf"{SCALE} has shape \(1, 2\)", r"\(16, 16\) make it \(2, 2\)"),
    ),
    "scales too many": (
        put(SCALE, lambda t: torch.ones(3, 2)),
        (r"shape \(3, 2\)", r"make it \(2, 2\)"),
    ),
    "one scale": (put(SCALE, lambda t: t[0, 0]), (r"shape \(\)", r"make it \(2, 2\)")),
    "FP8 norm": (
        put("model.norm.weight", lambda t: t.to(fp8.E4M3)),
        (r"model\.norm\.weight is FP8, but only matrices come",),
    ),
    "FP8 norm with a scale": (
        edit(
            lambda t: t.update(
                {
                    "model.norm.weight": t["model.norm.weight"].to(fp8.E4M3),
                    "model.norm.weight_scale_inv": torch.ones(2),
                }
            )
        ),
        ("only matrices come in blocks", r"\(32,\)"),
    ),
    "scales of integers": (
        put(SCALE, lambda t: torch.ones(2, 2, dtype=torch.int64)),
        (re.escape(SCALE), "I64"),
    ),
    "FP8 that config.json does not tell of": (
        set_config(quantization_config=None),
        ("is FP8, but config.json has no quantization_config",),
    ),
    # tokenizer
    "tokenizer too large": (
        set_config(vocab_size=200),
        ("tokenizer has 2.. tokens but config.json's vocab_size is 200",),
    ),
    "tokenizer not JSON": (write("tokenizer.json", b"{"), (r"tokenizer\.json",)),
    "generation config not JSON": (
        write("generation_config.json", b"{"),
        (r"generation_config\.json can't be read",),
    ),
    "generation config a list": (
        write("generation_config.json", b"[]"),
        (r"generation_config\.json can't be read",),
    ),
    "stop that is no id": (
        write("generation_config.json", b'{"eos_token_id": "x"}'),
        ("not token ids",),
    ),
    # pickles
    "pickles only": (
        only_pickles,
        (r"only pickles \(consolidated\.00\.pth, pytorch_model\.bin\)", "run code", "safetensors"),
    ),
    "pickle in disguise": (pickle_in_disguise, ("cut off or corrupt",)),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folder(case: str, sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = FOLDERS[case]
    change(sound)
    check_refused(sound, capsys, *said)
    assert not (sound / "opened").exists(), "a pickle was opened"


def test_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(tmp_path / "nowhere", capsys, r"there is no folder .*nowhere")
    (tmp_path / "file").write_text("x")
    check_refused(tmp_path / "file", capsys, r"file is a file: give a checkpoint's folder")


def test_absolute_path_in_the_index(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point_to(str(tmp_path / "outside.safetensors"))(sound)
    check_refused(sound, capsys, "outside.safetensors'", "not opened")


def test_a_pickle_beside_safetensors_is_ignored(sound: Path) -> None:
    """And the pickle is a live one: opened, it would have left its mark."""
    put_pickles(sound)
    r1.load(sound, CPU, quiet=True)
    assert not (sound / "opened").exists()
    pickle.load(io.BytesIO((sound / "pytorch_model.bin").read_bytes()))
    assert (sound / "opened").exists()


def test_linked_shards_load(sound: Path, made: Path) -> None:
    """Hugging Face's cache: every file is a link into a folder of blobs. That is the owner's doing,
    not the index's.
    """
    blobs = sound.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(sound.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..", "blobs", str(number)))
    assert first_shard(sound).is_symlink()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(
        r1.load(sound, CPU, quiet=True).logits(ids), r1.load(made, CPU, quiet=True).logits(ids)
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), length=st.integers(0, 400), keep=st.integers(0, 16))
def test_random_bytes(seed: int, length: int, keep: int, tmp_path: Path) -> None:
    """Noise as a shard, alone or behind the first bytes of a sound one: refused, never read."""
    good = tmp_path / "good.safetensors"
    if not good.exists():
        save_file({"model.norm.weight": torch.ones(32)}, good)
    noise = good.read_bytes()[:keep] + random.Random(seed).randbytes(length)
    (tmp_path / "x").mkdir(exist_ok=True)
    (tmp_path / "x" / SINGLE).write_bytes(noise)
    with refused(r"model\.safetensors is cut off or corrupt"):
        load_files(model(V2), tmp_path / "x", quiet=True)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 3000), bits=st.integers(1, 255))
def test_a_flipped_byte_in_a_header(at: int, bits: int, made: Path, tmp_path: Path) -> None:
    """Whatever a flipped byte in the lengths, names, shapes and offsets makes of a file: it is
    refused, or the values are.
    """
    folder = tmp_path / "flipped"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    data = bytearray(first_shard(folder).read_bytes())
    at %= 8 + struct.unpack("<Q", data[:8])[0]
    data[at] ^= bits
    first_shard(folder).write_bytes(data)
    try:
        load(folder)
    except InputError as error:
        check_sentence(str(error))
    else:
        assert tensors(folder).keys() == tensors(made).keys(), "a name changed, and nobody noticed"


# ---------------------------- config.json
YARN = dump_config(V3)["rope_scaling"]
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    # arithmetic that the family doesn't have, or r1 doesn't
    "attention_bias": ({"attention_bias": True}, "attention_bias is True"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias is True"),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but r1 implements only 'silu'"),
    "moe_layer_freq": ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    "rope_interleave": ({"rope_interleave": False}, "rope_interleave is False"),
    "partial_rotary_factor": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "sliding_window": ({"sliding_window": 4096}, "sliding_window asks for windowed attention"),
    "index_topk": ({"index_topk": 2048}, "index_topk = 2048 is unknown to r1"),
    "index_head_dim": ({"index_head_dim": 64}, "index_head_dim"),
    "final_logit_softcapping": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "attn_logit_cap": ({"attn_logit_cap": 5}, "attn_logit_cap"),
    "embedding_multiplier": ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
    "layer_types": ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    "use_qk_norm": ({"use_qk_norm": True}, "use_qk_norm"),
    "num_hash_layers": ({"num_hash_layers": 3}, "num_hash_layers"),
    "scoring_func": (
        {"scoring_func": "softmax"},
        "scoring_func is 'softmax', but deepseek_v3 takes sigmoid",
    ),
    "topk_method": ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
    # rotation
    "rope linear": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "has type 'linear', but r1 implements only yarn",
    ),
    "rope dynamic": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        "has type 'dynamic'",
    ),
    "rope of two types": (
        {"rope_scaling": {**YARN, "rope_type": "linear"}},
        "has type 'yarn' and rope_type 'linear'",
    ),
    "rope a word": ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', which is no JSON object"),
    "rope disagreeing": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "rope_scaling says factor = 40.0 and rope",
    ),
    "rope theta disagreeing": (
        {"rope_parameters": {"rope_theta": 5e4}},
        "rope_theta is 10000.0, but rope_parameters says 50000",
    ),
    "rope theta 0": ({"rope_theta": 0}, "rope_theta is 0.0, but the rotation"),
    "rope theta NaN": ({"rope_theta": float("nan")}, "rope_theta is nan"),
    "rope with a stranger": (
        {"rope_scaling": {**YARN, "long_factor": [1, 2]}},
        "rope_scaling has long_factor",
    ),
    "rope factor below 1": ({"rope_scaling": {**YARN, "factor": 0.5}}, "has factor = 0.5"),
    "rope without factor": (
        {"rope_scaling": {k: v for k, v in YARN.items() if k != "factor"}},
        "factor is missing",
    ),
    "rope without original": (
        {
            "rope_scaling": {
                k: v for k, v in YARN.items() if k != "original_max_position_embeddings"
            }
        },
        "original_max_position_emb",
    ),
    "rope not truncated": ({"rope_scaling": {**YARN, "truncate": False}}, "truncate = false"),
    "rope attention factor": (
        {"rope_scaling": {**YARN, "attention_factor": 2.0}},
        "attention_factor = 2.0, but its mscales",
    ),
    "odd rope dim": (
        {"qk_rope_head_dim": 7, "head_dim": None},
        "qk_rope_head_dim is 7, but rotation takes pairs",
    ),
    # contradictions
    "n_group": ({"n_group": 3}, "n_group is 3, which does not divide the 8 routed experts"),
    "n_group of one": ({"n_group": 8}, "n_group is 8: noaux_tc scores a group by its two best"),
    "topk_group": ({"topk_group": 5}, "topk_group is 5, more than the 4 groups"),
    "too many per token": (
        {"num_experts_per_tok": 5},
        "num_experts_per_tok is 5, but only 4 experts can be chosen",
    ),
    "num_key_value_heads": ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
    "qk_head_dim": ({"qk_head_dim": 192}, "qk_head_dim is 192"),
    "head_dim": ({"head_dim": 128}, "head_dim is 128"),
    "num_local_experts": ({"num_local_experts": 4}, "num_local_experts is 4"),
    "bos outside": ({"bos_token_id": 300}, "bos_token_id is 300, outside the vocabulary of 300"),
    "eos outside": ({"eos_token_id": [1, 999]}, r"eos_token_id is \[1, 999\], outside"),
    "eos a word": ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    # values
    "no hidden_size": ({"hidden_size": None}, "hidden_size is missing"),
    "hidden_size 0": (
        {"hidden_size": 0},
        "hidden_size is 0, which is no whole number of at least 1",
    ),
    "hidden_size negative": ({"hidden_size": -32}, "hidden_size is -32"),
    "hidden_size a fraction": ({"hidden_size": 32.5}, "hidden_size is 32.5"),
    "hidden_size a word": ({"hidden_size": "32"}, "hidden_size is '32'"),
    "layers true": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "eps a word": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
    "eps infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    "norm_topk_prob a word": (
        {"norm_topk_prob": "yes"},
        "norm_topk_prob is 'yes', which is neither true nor false",
    ),
    "model_type a list": ({"model_type": ["deepseek_v3"]}, "model_type is "),
    "hidden_act a list": ({"hidden_act": ["silu"]}, "hidden_act is "),
    # quantization
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "quant_method = 'bitsandbytes', but r1 reads only fp8, .*: load it in transformers",
    ),
    "no method": ({"quantization_config": {"bits": 8}}, "quant_method = None"),
    "quantization a word": ({"quantization_config": "fp8"}, "quantization_config is 'fp8'"),
    "e5m2": (
        {
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e5m2",
                "weight_block_size": [16, 16],
            }
        },
        "fmt = 'e5m2'",
    ),
    "no blocks": (
        {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}},
        "weight_block_size = None",
    ),
    "block of 0": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}},
        r"block_size = \[0, 1\]",
    ),
    # absurd sizes
    "layers without end": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "wider than 64 bits": ({"hidden_size": 10**15}, "hidden_size"),
    "wider than a pointer": (
        {"hidden_size": 10**30},
        "hidden_size is 10{30}, which is larger than in any model",
    ),
    "wider than a double": (
        {"rope_theta": 10**310},
        "rope_theta is 10{310}, which is no finite number",
    ),
    "attention factor a word": (
        {"rope_scaling": {**YARN, "attention_factor": "1"}},
        "attention_factor",
    ),
    "beta of 0": (
        {"rope_scaling": {**YARN, "beta_slow": 0}},
        "beta_slow = 0.0 and beta_fast = 32.0, but YaRN wants",
    ),
    "betas swapped": ({"rope_scaling": {**YARN, "beta_slow": 33}}, "beta_slow = 33"),
    "original without end": (
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 10**12}},
        "original_max_pos",
    ),
    "theta of 1": ({"rope_theta": 1}, "rope_theta is 1"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config(case: str, sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A field that would change the mathematics, and that we don't know or can't reconcile, is
    named.
    """
    fields, said = CONFIGS[case]
    set_config(**fields)(sound)
    check_refused(sound, capsys, r"config\.json: ", said)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 3)
    | st.floats()
    | st.sampled_from(["", "yarn", "fp8", "1"])
)
KEYS = st.sampled_from([*YARN, "rope_type", "quant_method"])
ANY = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(
    field=st.sampled_from(sorted(dump_config(WITH_TEXT))),
    inner=st.sampled_from([None, *YARN, "quant_method", "weight_block_size"]),
    value=ANY,
)
def test_any_value_of_any_field(field: str, inner: str | None, value: Any) -> None:
    """Whatever JSON stands where: a config whose tables can be computed, or one sentence."""
    raw = dump_config(WITH_TEXT)
    if inner and isinstance(raw[field], dict):
        raw[field] = raw[field] | {inner: value}
    else:
        raw[field] = value
    try:
        frequencies(parse_config(raw).attention)
    except InputError as error:
        assert str(error).startswith("config: ") and "\n" not in str(error)


@pytest.mark.parametrize(
    "field",
    ["n_routed_experts", "q_lora_rank", "vocab_size", "kv_lora_rank", "topk_group", "model_type"],
)
def test_config_lacks_a_field(field: str, sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sound / "config.json"
    path.write_text(
        json.dumps(
            {key: value for key, value in json.loads(path.read_text()).items() if key != field}
        )
    )
    check_refused(sound, capsys, rf"config\.json: {field} is ")


HARMLESS: dict[str, Any] = {
    "transformers_version": "4.33.1",
    "_name_or_path": "/somewhere",
    "auto_map": {"AutoConfig": "x.py"},
    "aux_loss_alpha": 0.001,
    "attention_dropout": 0.0,
    "ep_size": 1,
    "seq_aux": True,
    "pretraining_tp": 1,
    "use_cache": True,
    "initializer_range": 0.02,
    "router_aux_loss_coef": 0.001,
    "pad_token_id": 2,
    "license": "mit",
    "notes": {"made": "by hand"},
    "trained_on": 14.8,
    "index_topk": None,
    "sliding_window": None,
    "use_sliding_window_attention": False,
    "layer_types": [],
    "mlp_bias": False,
    "qk_head_dim": 20,
    "head_dim": 8,
    "num_local_experts": 8,
    "partial_rotary_factor": 1.0,
    "rope_interleave": True,
}


def test_harmless_fields_are_ignored(made: Path) -> None:
    raw = json.loads((made / "config.json").read_text())
    assert parse_config(raw) == WITH_TEXT
    for field, value in HARMLESS.items():
        assert parse_config(raw | {field: value}) == WITH_TEXT, field


def test_mtp_where_there_is_none(tmp_path: Path) -> None:
    save(model(V2), tmp_path / "x")
    with refused("num_nextn_predict_layers = 0", "no MTP layer"):
        r1.load(tmp_path / "x", CPU, mtp=True, quiet=True)


# ---------------------------- memory
def test_a_model_that_does_not_fit(
    sound: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R1 itself, 671e9 weights: what it needs and what there is, before anything is allocated or a
    weight read.
    """
    (sound / "config.json").write_text(json.dumps(dump_config(shapes.R1)))
    monkeypatch.setattr(
        torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory was allocated")
    )
    monkeypatch.setattr(build, "load", lambda *_, **__: pytest.fail("weights were read"))
    check_refused(
        sound, capsys, r"the model needs 2685\.\d GB in fp32 and cpu has \d+\.\d GB free: use"
    )
    with refused(r"needs 1342\.\d GB in bf16"):
        r1.load(sound, Backend(device="cpu", dtype="bf16"), quiet=True)


def test_memory_to_the_byte(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for is the weights' bytes and some headroom: one byte less is too little."""
    loaded, _ = load(made, dtype="bf16")
    needed = sum(p.nbytes for p in loaded.parameters()) + build.HEADROOM
    monkeypatch.setattr(build, "available_bytes", lambda _: needed)
    load(made, dtype="bf16")
    monkeypatch.setattr(build, "available_bytes", lambda _: needed - 1)
    with refused("in bf16 and cpu has"):
        load(made, dtype="bf16")


# ---------------------------- writing
def test_saving_onto_a_folder_that_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even onto an empty one, nor onto a file; and the tool says so with status 2."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    before = snapshot(tmp_path)
    for name in ("full", "empty", "file"):
        with refused(f"{name} exists already", "name a new folder"):
            save(model(V2), tmp_path / name)
        assert make_checkpoint.main(["tiny", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert f"{name} exists already" in err and err.count("\n") == 1
    assert snapshot(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"full", "empty", "file"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["second shard", "config.json"])
def test_a_save_that_fails_leaves_nothing(
    where: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def failing_save(found: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(found, path, metadata=metadata)
        written.append(path)
        assert path.exists()
        if where == "second shard" and len(written) == 2:
            raise error

    def failing_write(self: Path, *_: Any, **__: Any) -> int:
        raise error

    monkeypatch.setattr("r1.files.save.save_file", failing_save)
    if where == "config.json":
        monkeypatch.setattr(Path, "write_text", failing_write)
    told = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(told, match="No space left|^$"):
        save(model(V2), tmp_path / "x", shard_bytes=30_000)
    assert len(written) == 2 or where == "config.json"
    assert list(tmp_path.iterdir()) == []

    monkeypatch.undo()
    save(model(V2), tmp_path / "x", shard_bytes=30_000)  # and the way is free
    load(tmp_path / "x")


def test_a_folder_of_the_users_own_is_not_touched(tmp_path: Path) -> None:
    """Whatever it is called: no name beside the new folder is r1's to delete."""
    for name in ("x.partial", ".x.partial", "x.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
    before = snapshot(tmp_path)
    save(model(V2), tmp_path / "x")
    after = snapshot(tmp_path)
    assert before.items() <= after.items()
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"config.json", SINGLE}
    load(tmp_path / "x")


# ---------------------------- the real command
COMMANDS: dict[str, tuple[Folder, str]] = {
    "missing folder": (shutil.rmtree, "there is no folder"),
    "truncated": (cut(0.5), "cut off or corrupt"),
    "pickles": (only_pickles, "only pickles"),
    "too large": (
        lambda f: (f / "config.json").write_text(json.dumps(dump_config(shapes.R1))),
        "the model needs 2685",
    ),
}


def test_command(made: Path, tmp_path: Path) -> None:
    """`python -m r1 --model DIR hi`, side by side: status 2, one line on stderr, no file left
    behind.
    """
    started = {}
    for case, (change, _) in COMMANDS.items():
        home = tmp_path / case
        folder = Path(shutil.copytree(made, home / "sound"))
        change(folder)
        work = tmp_path / f"{case} cwd"
        work.mkdir()
        started[case] = (
            subprocess.Popen(
                [sys.executable, "-m", "r1", "--model", str(folder), "--device", "cpu", "hi"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=work,
                env=os.environ
                | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
            ),
            snapshot(home),
            work,
        )
    for case, (process, before, work) in started.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        assert out == "" and err.startswith("r1: ") and err.count("\n") == 1, err
        check_sentence(err.rstrip("\n"))
        assert COMMANDS[case][1] in err
        assert snapshot(tmp_path / case) == before and not list(work.iterdir())
