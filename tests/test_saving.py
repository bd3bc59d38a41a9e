"""Tests that what is written appears whole or not at all, and that nobody's files are deleted.

Holds to account: r1/writing.py, r1/files/save.py, r1/kernels/launches.py and the tools that save.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_checkpoint
import pytest
import torch
from cases import ROOT
from folders import load, tensors
from models import V2, V3, model
from refusals import refused, snapshot
from safetensors import safe_open
from safetensors.torch import load_file

from r1.files import save as saving
from r1.files.names import places
from r1.files.save import save
from r1.files.shards import INDEX, SINGLE
from r1.writing import check_new, new_file, new_folder


@pytest.mark.parametrize("name", [".", "/", "..", "../..", "x/..", "x/.", ""])
def test_a_name_that_is_no_new_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make_checkpoint, "make", lambda *_, **__: pytest.fail("it was made"))
    assert make_checkpoint.main(["tiny", name]) == 2
    err = capsys.readouterr().err
    assert "exists already: name a new folder" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["x" * 300, "file/x", "é" * 200, "link", "/proc/x"])
def test_a_folder_that_cant_be_made(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("gone")
    before = snapshot(tmp_path)
    with refused("can't be written|exists already"):
        save(model(V2), tmp_path / name)
    assert snapshot(tmp_path) == before


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with refused(r"x can't be written \(no permission\)"):
        check_new(tmp_path / "x")


def test_folders_above_go_with_a_save_that_fails(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "b" / "c" / "d") as partial:
        (partial / "file").write_text("x")
        raise KeyboardInterrupt
    assert snapshot(tmp_path) == {} and list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert not list((tmp_path / "a").iterdir())
    with new_folder(tmp_path / "a" / "b" / "c") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "a" / "b" / "c" / "file").read_text() == "x"


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    with new_folder(tmp_path / "new"):
        pass
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_all_may_read_the_weights(tmp_path: Path) -> None:
    """The library that writes shards makes them its user's own; they are as the other files are."""
    before = os.umask(0o022)
    try:
        save(model(V2), tmp_path / "x", shard_bytes=30_000)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "x").iterdir()}
    assert len(modes) > 3 and set(modes.values()) == {0o644}, modes


@pytest.mark.parametrize("tensors_", [1, 2, 5])
def test_a_shard_is_as_full_as_it_may_be(tensors_: int, tmp_path: Path) -> None:
    """The first tensors have just the bytes that a shard may have: they are one shard. No shard has
    room for the first tensor of the next one.
    """
    made = model(V2)
    sizes = [place.nbytes for place in places(made).values()]
    most = sum(sizes[:tensors_])
    save(made, tmp_path / "x", shard_bytes=most)
    found = [
        [tensor.nbytes for tensor in load_file(path).values()]
        for path in sorted((tmp_path / "x").glob("*.safetensors"))
    ]
    order = list(json.loads((tmp_path / "x" / INDEX).read_text())["weight_map"])
    assert sorted(order) == sorted(places(made))
    assert sum(found[0]) == most and len(found[0]) == tensors_
    firsts = itertools.accumulate(map(len, found), initial=0)
    for shard, first in zip(found[:-1], list(firsts)[1:], strict=False):
        assert sum(shard) + sizes[first] > most


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_mtp_layers_have_copies_of_what_they_share(
    dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """Equal to the model's own, also in dtype; and the files say who may read them."""
    save(model(V3, mtp=True), tmp_path / "x", dtype=dtype)
    found = tensors(tmp_path / "x")
    stem = f"model.layers.{V3.num_hidden_layers}."
    for copy, own in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        pair = found[f"{stem}{copy}.weight"], found[f"{own}.weight"]
        assert pair[0].dtype == pair[1].dtype == (dtype or torch.bfloat16)
        assert torch.equal(*pair)
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    with safe_open(tmp_path / "x" / SINGLE, framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}, "transformers refuses files without it"


def test_extra_fields_come_last(tmp_path: Path) -> None:
    """They may say otherwise than the config; what is stored tells the dtype."""
    for given, wanted in (({}, "float32"), ({"torch_dtype": "float64"}, "float64")):
        save(model(V2), tmp_path / wanted, dtype=torch.float32, extra=given)
        found = json.loads((tmp_path / wanted / "config.json").read_text())
        assert found["torch_dtype"] == wanted


@pytest.mark.parametrize("other", ["a folder", "a file"])
def test_another_process_is_faster(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wins, the other one is refused, and nothing is broken."""
    write = saving._write

    def write_late(made: Any, directory: Path, *rest: Any) -> None:
        write(made, directory, *rest)
        monkeypatch.setattr(saving, "_write", write)
        if other == "a folder":
            save(model(V2, seed=7), tmp_path / "x")
        else:
            (tmp_path / "x").write_text("mine")

    monkeypatch.setattr(saving, "_write", write_late)
    with refused("x exists already"):
        save(model(V2), tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    if other == "a folder":
        load(tmp_path / "x")
    else:
        assert (tmp_path / "x").read_text() == "mine"


def test_two_processes_save_to_one_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/train/make_checkpoint.py"), "tiny"]
    started = [
        subprocess.Popen(
            [*command, str(tmp_path / "x")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]  # fmt: skip
    done = [(process.communicate(timeout=120), process.returncode) for process in started]
    assert sorted(status for _, status in done) == [0, 2], done
    ((_, err),) = [texts for texts, status in done if status == 2]
    assert "exists already" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    load(tmp_path / "x")
    assert (tmp_path / "x" / "tokenizer.json").is_file()


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk's: a write fails in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with refused(r"x can't be written \(.*(File too large|error 27)"):
            save(model(V2), tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    (tmp_path / "file.partial").write_text("mine")
    with pytest.raises(OSError, match="full"), new_file(path) as partial:
        partial.write_text("ne")
        raise OSError(28, "full")
    assert path.read_text() == "old"
    with new_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert {each.name for each in tmp_path.iterdir()} == {"file", "file.partial"}
