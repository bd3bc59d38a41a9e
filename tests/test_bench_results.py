"""Result files hold no path of the machine that made them, and are checked where they are read.

Holds to account: r1/bench/result.py, r1/bench/load_result.py and r1/bench/report/types.py.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from cases import ROOT
from refusals import refused

import bench
from r1.bench.arms import Arm
from r1.bench.flags import parser
from r1.bench.load_result import load
from r1.bench.report.fields import FIELDS
from r1.bench.report.render import render
from r1.bench.report.rows import row
from r1.bench.report.types import MACHINE, RESULT, ROW, TOGETHER
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
    tensors = min(model.glob("*.safetensors"))
    data = tensors.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    tensors.write_bytes(data[:header] + b"\xff" * (len(data) - header))  # NaN
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


# ---------------------------- a result that is read is checked
def ladder() -> dict[str, Any]:
    """A result with every field of a row."""
    loaded: dict[str, Any] = json.loads((FOLDER / "h100" / "ladder.json").read_text("utf-8"))
    return loaded


def written(result: dict[str, Any], folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(result))
    return folder / "a.json"


def test_every_field_has_a_type() -> None:
    assert ROW.keys() == FIELDS.keys()


@pytest.mark.parametrize("name", [n for n in RESULTS if '"schema"' in (FOLDER / n).read_text()])
def test_our_own_results_are_sound(name: str) -> None:
    load(FOLDER / name, complete=True)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "value", [-1, "fast", [1], {"a": [1]}, 1e300, True], ids=lambda v: type(v).__name__
)
def test_a_field_of_another_type_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    """Or it is of its type by chance: a row needs one of its own."""
    result = ladder()
    for each in result["rows"]:
        each[field] = value
    path = written(result, tmp_path)
    if ROW[field].holds(value):
        return
    for complete in (True, False):
        with refused(rf"a\.json, row 1: {field} is ", "measure again"):
            load(path, complete=complete)


@pytest.mark.parametrize("field", [*RESULT, *MACHINE])
@pytest.mark.parametrize("value", [-1, [[1]], {"a": "b"}], ids=lambda v: type(v).__name__)
def test_a_field_outside_the_rows_is_checked_too(field: str, value: Any, tmp_path: Path) -> None:
    result = ladder()
    (result if field in RESULT else result["machine"])[field] = value
    path = written(result, tmp_path)
    if {**RESULT, **MACHINE}[field].holds(value):
        return
    with refused(r"a\.json"):
        load(path)


@pytest.mark.parametrize("field", [name for names in TOGETHER.values() for name in names])
def test_fields_that_come_together(field: str, tmp_path: Path) -> None:
    """A speed-up without its spread can't be shown."""
    result = ladder()
    first = next(name for name, names in TOGETHER.items() if field in names)
    for each in result["rows"]:
        each.update(dict.fromkeys((first, *TOGETHER[first]), 1), **{field: None})
    with refused(f"{first} is 1, but it has no {field}"):
        load(written(result, tmp_path), complete=True)


def test_a_results_texts_cant_move_the_cursor(tmp_path: Path) -> None:
    result = ladder()
    result["notes"] = ["x\n\x1b[2J"]
    result["rows"][1]["arm"] = "y\x9b2J"
    result["machine"]["name"] = "z\u202e"
    shown = render(load(written(result, tmp_path), complete=True), "md")
    assert r"x\n\x1b[2J" in shown and r"y\x9b2J" in shown and r"z\u202e" in shown
    assert all(line.isprintable() for line in shown.split("\n"))


def test_a_result_nested_without_end(tmp_path: Path) -> None:
    result = ladder()
    for _ in range(300):
        result["config"] = {"a": result["config"]}
    with refused("a.json is no JSON", "nested too deeply"):
        load(written(result, tmp_path))


def test_logits_that_are_no_numbers_are_shown(tmp_path: Path) -> None:
    """An arm that is wrong in this way fails parity, and its row stays readable."""
    result = ladder()
    result["rows"][1] |= {
        "parity": False,
        "speedup": None,
        "mean_kl": float("nan"),
        "median_kl": float("inf"),
    }
    assert "parity fails" in render(load(written(result, tmp_path), complete=True), "md")
