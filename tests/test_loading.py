"""What `r1.load` makes of a sound folder: stop tokens, BOS, cautions, pieces, what it shows.

Holds r1/__init__.py, r1/build.py and r1/files to account. test_bad_files.py has folders that are
refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from folders import load, rewrite, tensors
from models import V3
from refusals import CPU, refused

import r1
from r1 import Backend, build
from r1.files import shards
from r1.files.names import elsewhere, places
from r1.files.progress import Progress
from r1.files.shards import PICKLES, SINGLE, entries_of, some, stream
from r1.model.moe import Experts
from r1.placement.placement import Placement
from r1.storage import fp8
from r1.switches.resolve import resolve
from r1.text.control_tokens import BOS, EOS

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
SCALE = O_PROJ + "_scale_inv"


def edit(path: Path, **fields: Any) -> None:
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(found | fields))


# ---------------------------- cautions and switches
@pytest.mark.parametrize(("dtype", "amp"), [("fp16", "off"), ("fp32", "fp16"), ("bf16", "off")])
def test_fp16_has_a_caution_however_it_is_asked_for(dtype: str, amp: str, made: Path) -> None:
    cautions = r1.load(made, Backend(device="cpu", dtype=dtype, amp=amp), quiet=True).cautions
    assert any("fp16 ends at 65504" in each for each in cautions) == ("fp16" in (dtype, amp))


def test_a_tokenizers_caution_is_the_engines(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r1.Tokenizer, "cautions", ["mind the template"])
    assert r1.load(made, CPU, quiet=True).cautions == ["mind the template"]


def test_auto_switches_are_for_the_batch(made: Path) -> None:
    chosen = [r1.load(made, CPU, batch=batch, quiet=True).backend.moe for batch in (1, 8)]
    assert chosen == ["gather", "grouped"]


# ---------------------------- the tokens that a folder names
def test_every_file_may_name_stop_tokens(sound: Path) -> None:
    """config.json, generation_config.json and the tokenizer: all of theirs end an answer."""
    plain = r1.load(sound, CPU, quiet=True)
    assert plain.tokenizer is not None
    (own,) = plain.tokenizer.stop_ids
    edit(sound / "config.json", eos_token_id=[5, 6])
    wanted: list[tuple[Any, set[int]]] = [(7, {7}), ([8, 0], {8, 0}), ([], set()), (None, set())]
    for given, more in wanted:
        edit(sound / "generation_config.json", eos_token_id=given)
        assert r1.load(sound, CPU, quiet=True).stop_ids == {own, 5, 6} | more


@pytest.mark.parametrize("wrong", [True, False, -1, 2.0, "2", [2, True], [[2]], {"a": 2}])
def test_a_stop_token_is_a_whole_number(wrong: Any, sound: Path) -> None:
    edit(sound / "generation_config.json", eos_token_id=wrong)
    with refused(r"generation_config\.json: eos_token_id is ", "not token ids"):
        r1.load(sound, CPU, quiet=True)


def test_config_names_bos_and_eos_where_the_tokenizer_does_not(sound: Path) -> None:
    path = sound / "tokenizer.json"
    path.write_text(path.read_text().replace(BOS, "<s>").replace(EOS, "</s>"))
    (sound / "tokenizer_config.json").unlink()
    edit(sound / "config.json", bos_token_id=4, eos_token_id=9)
    engine = r1.load(sound, CPU, quiet=True)
    assert engine.tokenizer is not None
    assert (engine.encode("a")[0], engine.tokenizer.eos_id) == (4, 9)
    assert engine.encode("a")[1:] == engine.tokenizer.encode("a")


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
def test_a_tokenizer_of_each_kind_is_read(name: str, sound: Path) -> None:
    """Here it is no sound one, which shows that it is read."""
    (sound / "tokenizer.json").rename(sound / name)
    with refused(name):
        r1.load(sound, CPU, quiet=True)


# ---------------------------- files
@pytest.mark.parametrize("ending", PICKLES)
def test_a_folder_of_pickles_is_told_so(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"weights{ending}").write_bytes(b"x")
    with refused(rf"only pickles \(weights\{ending}\)", "can run code"):
        entries_of(tmp_path)
    assert set(PICKLES) >= {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def test_the_one_file_may_have_any_name_and_the_usual_one_comes_first(sound: Path) -> None:
    """Some folders hold a second copy of the weights, in another layout."""
    rewrite(sound, lambda _: None)
    (sound / SINGLE).rename(sound / "weights.safetensors")
    load(sound)
    (sound / "weights.safetensors").rename(sound / SINGLE)
    (sound / "consolidated.safetensors").write_bytes(b"another layout")
    load(sound)


def test_the_first_names_of_a_list() -> None:
    assert some(list("abc")) == "a, b, c" and some(list("abcde")) == "a, b, c and 2 more"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_the_dtypes_of_scales(dtype: str, sound: Path) -> None:
    """Of values that each of them holds, they give the same weights; float64 is refused."""
    before = tensors(sound)
    scale = torch.exp2(before[SCALE].log2().round())
    kept = getattr(torch, dtype)
    rewrite(sound, lambda found: found.update({SCALE: scale.to(kept)}))
    if dtype == "float64":
        with refused(f"{SCALE} is stored as F64; r1 reads scales in F32, F16, BF16"):
            load(sound)
        return
    wanted = torch.empty(before[O_PROJ].shape)
    fp8.dequantize(before[O_PROJ], scale, (16, 16), wanted)
    assert torch.equal(places(load(sound)[0])[O_PROJ], wanted)


@contextmanager
def mappings() -> Iterator[list[list[int]]]:
    """The bytes of each piece, by mapping of a file. The caller appends to the last list."""
    found: list[list[int]] = []
    opened = shards.safe_open

    def opening(*given: Any, **named: Any) -> Any:
        found.append([])
        return opened(*given, **named)

    with mock.patch("r1.files.shards.safe_open", opening):
        yield found


@pytest.mark.parametrize("most", [64, 1000, 10_000])
def test_pieces_are_small_and_in_the_files_order(most: int, sound: Path) -> None:
    """No piece but a single row or an FP8 matrix has more than `most` bytes as fp32, and no mapping
    is read on from there. The pieces of a tensor, one after the other, are the tensor.
    """
    rewrite(sound, lambda _: None)
    entries = entries_of(sound)
    parts = {key: Placement().part(key, entry.shape) for key, entry in entries.items()}
    read: dict[str, list[torch.Tensor]] = {}
    with mock.patch.object(shards, "REMAP_BYTES", most), mappings() as found:
        whole = [key for key, entry in entries.items() if entry.dtype == "F8_E4M3"]
        for read_piece in stream(entries, parts, whole):
            key, first, piece = read_piece.key, read_piece.first, read_piece.rows
            assert first == sum(map(len, read.get(key, []))), key
            read.setdefault(key, []).append(piece.clone())
            found[-1].append(piece.nbytes)
            if piece.dtype != fp8.E4M3:
                assert len(piece) == 1 or piece.numel() * 4 <= most, key
    assert list(read) == list(entries)
    assert all(sum(sizes[:-1]) < most for sizes in found) and len(found) > 2
    assert all(sum(sizes) >= most for sizes in found[:-1])
    for key, tensor in tensors(sound).items():
        joined = torch.cat([piece.view(torch.uint8) for piece in read[key]])
        assert torch.equal(joined, tensor.view(torch.uint8)), key


def test_the_names_of_experts_that_lie_elsewhere() -> None:
    made = build.sketch(V3, resolve(CPU, V3))
    assert elsewhere(made) == set()
    for module in made.modules():
        if isinstance(module, Experts):
            module.ids = range(2, 4)
    assert elsewhere(made) == {
        f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight"
        for expert in (0, 1, 4, 5, 6, 7)
        for name in ("gate", "up", "down")
    }


# ---------------------------- what a load shows
def test_progress_ends_where_it_said(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte that is to be read is counted; nothing is shown to whoever asked for quiet."""
    shown: list[Progress] = []

    class Kept(Progress):
        def __enter__(self) -> Progress:
            shown.append(self)
            return super().__enter__()

    monkeypatch.setattr("r1.files.load.Progress", Kept)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for quiet in (True, False):
        r1.load(made, CPU, quiet=quiet)
        assert shown[-1].quiet is quiet
    config = r1.load_config(made)
    _, report = build.from_checkpoint(made, config, r1.load(made, CPU, quiet=True).backend)
    left_out = {key for keys in report.skipped.values() for key in keys}
    left_out |= {f"{key}_scale_inv" for key in left_out}
    nbytes = sum(t.nbytes for k, t in tensors(made).items() if k not in left_out)
    assert all(each.done == each.total == nbytes == report.nbytes for each in shown)


def test_the_line_of_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a second, at most ten times a second; its end clears the line."""
    now = 100.0
    monkeypatch.setattr("r1.files.progress.time.monotonic", lambda: now)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    lines = []
    with Progress("loading x", 8 * 10**9) as progress:
        for now in (100.9, 101.0, 101.05, 102.0):  # noqa: B007
            progress.add(10**9)
            lines.append(capsys.readouterr().err)
    bar = "\r\x1b[Kloading x " + "█" * 6 + "░" * 18 + " 2.0 of 8.0 GB, 2.00 GB/s, 3 s left"
    assert lines[:3] == ["", bar, ""] and "4.0 of 8.0 GB, 2.00 GB/s, 2 s left" in lines[3]
    assert capsys.readouterr().err == "\r\x1b[K"
    with Progress("loading x", 8, quiet=True) as progress:
        now = 200.0
        progress.add(8)
    assert capsys.readouterr().err == ""


# ---------------------------- random weights
def test_random_weights_are_what_they_say() -> None:
    """N(0, 0.02), norms of 1, no bias of the gate; an MTP layer where drafts are asked for."""
    backend = resolve(Backend(device="cpu", dtype="fp32"), V3)
    made, again, other = (build.from_shape(V3, backend, seed=seed) for seed in (0, 0, 1))
    found = places(made)
    for name, weight in found.items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.full_like(weight, not name.endswith("bias"))), name
        else:
            assert torch.equal(weight.bfloat16().float(), weight), f"{name} is no bf16"
            assert not torch.equal(weight, places(other)[name]), name
    assert all(torch.equal(weight, places(again)[name]) for name, weight in found.items())
    drawn = torch.cat([weight.flatten() for weight in found.values() if weight.dim() > 1])
    assert abs(float(drawn.mean())) < 1e-3 and abs(float(drawn.std()) - 0.02) < 5e-4
    drafting = resolve(Backend(device="cpu", speculate="mtp"), V3)
    assert len(build.from_shape(V3, drafting).mtp) == 1 and not made.mtp


class WithBuffer(Placement):
    """Adds a tensor of 4000 bytes that is no parameter, as a storage of one's own may have."""

    def arrange(self, model: Any) -> None:
        model.register_buffer("more", torch.empty(1000), persistent=False)


def test_buffers_need_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = resolve(Backend(device="cpu", dtype="fp32"), V3)
    needed = sum(p.nbytes for p in build.from_shape(V3, backend).parameters()) + build.HEADROOM
    monkeypatch.setattr(build, "available_bytes", lambda _: needed + 4000)
    build.from_shape(V3, backend, placement=WithBuffer())
    monkeypatch.setattr(build, "available_bytes", lambda _: needed + 3999)
    with refused("the model needs"):
        build.from_shape(V3, backend, placement=WithBuffer())
