"""Result files hold no path of the machine that made them (r1/bench/result.py)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from cases import ROOT

import bench
from r1.bench.arms import Arm
from r1.bench.flags import parser
from r1.bench.report.rows import row
from r1.bench.result import command_line, without_paths
from r1.bench.workload import Workload
from r1.model.shapes import shape
from r1.switches.backend import Backend

TINY = ROOT / "weights" / "tiny-r1"
FOLDER = ROOT / "tools" / "measure" / "results"
RESULTS = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.glob("**/*.json"))
ABSOLUTE = re.compile(r"""(^|[\s'"=(:])(~?/|[A-Za-z]:\\)[\w.]""")
"""An absolute path, of Unix or of Windows, at the start of a word."""


def texts(value: Any) -> list[str]:
    """All texts of a JSON value, at any depth; keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [text for part in value for text in texts(part)] if isinstance(value, list) else []


def paths(result: Any) -> list[str]:
    """The texts that hold an absolute path."""
    return [text for text in texts(result) if ABSOLUTE.search(text)]


@pytest.mark.parametrize("name", RESULTS)
def test_no_committed_result_holds_a_path(name: str) -> None:
    assert not paths(json.loads((FOLDER / name).read_text(encoding="utf-8")))


def test_paths_are_noticed() -> None:
    """The check above can fail."""
    for text in ("/root/out/a.json", "run -o /tmp/a.json", "--model=/a/b", "~/a", "in C:\\a: no"):
        assert paths({"a": [{"b": text}]}) == [text] and paths({text: 1}) == [text]
    assert not paths(["tok/s", "a / b", "1/2", "tools/measure/bench_kernels.py", "KL 1e-9 / 2"])


def test_a_measurement_records_names_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is named by the rows, the workload and the command, and by a refusal."""
    (tmp_path / "above").mkdir()
    model = shutil.copytree(TINY, tmp_path / "above" / "my model")
    (model / "exam.json").unlink()
    monkeypatch.chdir(tmp_path)
    arguments = ["--device", "cpu", "--new", "2", "--prompt", "4", "-r", "1", "-o", "json"]
    assert bench.main([*arguments, "--model", str(model), "--profile", "above/traces"]) == 0
    out = capfd.readouterr().out
    result = json.loads(out)
    assert str(tmp_path) not in out and "above" not in out and not paths(result)
    assert result["rows"][0]["model"] == "my model"
    assert result["workload"] == "my model: batch 1, prompt 4, new 2"
    assert result["command"].startswith("python bench.py --device cpu --new 2")
    assert result["command"].endswith("-o json --model my model --profile traces")
    tensors = next(model.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:1000])
    assert bench.main([*arguments, "--model", "above/my model", "--new", "2,3"]) == 0
    out = capfd.readouterr().out
    notes = json.loads(out)["notes"]
    assert len(notes) == 2 and "above" not in out
    assert all(note.count("my model") == 2 and tensors.name in note for note in notes)


@pytest.mark.parametrize("model", ["/a/b/tiny-r1", "b/tiny-r1/", "./tiny-r1", "../b/../tiny-r1"])
def test_a_checkpoint_is_known_by_its_folders_name(model: str) -> None:
    work = Workload(model, None, None, 1, 8, 4, 0, 0, routing="uniform")
    assert work.name == "tiny-r1, routing uniform"
    refused = row(Arm("a", "alone", Backend()), work, {"refused": "why"}, {}, shape("tiny"))
    assert refused["model"] == "tiny-r1, routing uniform"


def test_the_folder_where_one_stands_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY)
    assert Workload(".", None, None, 1, 8, 4, 0, 0).name == "tiny-r1"


@pytest.mark.parametrize(
    ("argv", "recorded"),
    [
        (["--model", "/a/b", "--new", "16"], "--model b --new 16"),
        (["--model=/a/b/", "--plot", "x/y.png"], "--model=b --plot y.png"),
        (["--mod", "../b", "--profile=/tmp/t", "-o", "json"], "--mod b --profile=t -o json"),
        (["--compile", "--amp", "bf16"], "--compile --amp bf16"),
        ([], ""),
    ],
)
def test_a_command_is_recorded_without_folders(argv: list[str], recorded: str) -> None:
    arguments = parser(TINY).parse_args(argv)
    assert command_line(arguments, argv) == f"python bench.py {recorded}"


@pytest.mark.parametrize(
    ("sentence", "recorded"),
    [
        ("/a/b/tiny/model.safetensors: it ends early", "tiny/model.safetensors: it ends early"),
        ("a compiler failed: '/usr/bin/g++' in /tmp/x/y.cpp", "a compiler failed: 'g++' in y.cpp"),
        ("~/k/tiles.json (see ../doc/a.md)", "tiles.json (see a.md)"),
        ("3 tok/s, a / b, https://a.org/b", "3 tok/s, a / b, https://a.org/b"),
        ("take bf16/fp16 or --tp 1", "take bf16/fp16 or --tp 1"),
    ],
)
def test_a_refusal_names_files_without_folders(sentence: str, recorded: str) -> None:
    made = {"rows": [{"refused": sentence}, {"refused": None}], "pairs": [], "notes": [sentence]}
    result = without_paths(made, "/a/b/tiny")
    assert result["rows"] == [{"refused": recorded}, {"refused": None}]
    assert result["notes"] == [recorded]
