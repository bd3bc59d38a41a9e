"""`python -m r1.guide`: what it prints, draws and refuses, and bench.py --compare of its answers.

Holds to account: r1/guide/__main__.py, page.py, picture.py, calibrate.py; r1/bench/merge.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import check_sentence, refused

import bench
from r1.files.config_json import dump_config
from r1.guide import gpus, measured
from r1.guide.__main__ import main
from r1.guide.setup import find_model
from r1.model.shapes import SHAPES

RESULTS = Path(__file__).parents[1] / "tools" / "measure" / "results" / "h100"
SMALL = ["--prompt", "128", "--new", "256"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments]) == 0
    return capsys.readouterr().out


def test_one_model_on_one_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Where each gigabyte goes, floor and expected apart, the row it starts from, the sources."""
    text = printed(capsys, "--model", "moonlight-16b", "--gpu", "4090", *SMALL)
    assert text.startswith("# moonlight-16b on RTX 4090, fp8, one device\n")
    for line in (
        "| weights | cache | activations | graphs | libraries | total |", "| TPOT ms, floor |",
        "| TPOT ms, expected |", "Largest batch of such rows:", "Longest row at batch 1: 8,192",
        "| watts, at most | 450 |", "Every time here is predicted",
        "starts from the measured row moonlight-16b",
    ):  # fmt: skip
        assert line in text
    gpu = gpus.gpu("4090")
    for name, source in gpu.sources.items():
        assert f"- {name} {gpu.figures[name]:g}: {source.url} ({source.date}" in text


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "r1", "--gpu", "3060", "--count", "1"]
    text = printed(capsys, *arguments, "--experts", "device")
    assert "r1 does not fit RTX 3060 12GB" in text and "ranks the machines" in text
    text = printed(capsys, *arguments, "--ram-gb", "64")
    assert "r1 does not fit RTX 3060 12GB" in text, "its experts in 4 bit are 337 GB"


def test_a_folder_is_a_model_too(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(__file__).parents[1] / "weights" / "tiny-r1"
    for model in (folder, folder / "config.json"):
        text = printed(capsys, "--model", str(model), "--gpu", "h100")
        assert text.startswith("# tiny-r1 on H100 80GB SXM")


def test_a_ranking_and_its_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """All machines, the cheapest first; those that can't hold it are named in the picture."""
    picture = tmp_path / "all.png"
    arguments = ["--model", "r1-distill-qwen-32b", "--count", "1", *SMALL, "--plot", str(picture)]
    text = printed(capsys, *arguments)
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(gpus.all_gpus())
    assert "RTX 3060" in rows[-1] and "does not fit" in rows[-1]
    assert picture.stat().st_size > 10_000
    drawn = picture.with_suffix(".svg").read_text(encoding="utf-8")
    for words in ("can't hold it: RTX 3060", "rented", "RTX 4090, int4", "predicted"):
        assert f"<!-- {words}" in drawn or words in drawn


def test_a_picture_of_models(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each has a label of its own, and is named where it does not fit."""
    picture = tmp_path / "card.png"
    printed(capsys, "--gpu", "3060", *SMALL, "--experts", "device", "--plot", str(picture))
    drawn = picture.with_suffix(".svg").read_text(encoding="utf-8")
    for model in ("youtu-2b, bf16", "r1-distill-qwen-1.5b, bf16", "do not fit: r1, kimi-k2"):
        assert model in drawn


def test_a_quantized_model_without_its_files(tmp_path: Path) -> None:
    """config.json does not tell the format: the guide does not guess one."""
    raw = dump_config(SHAPES["moonlight-16b"])
    raw["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with refused(r"is quantized \(gptq\), and only the headers of its files tell how"):
        find_model(str(tmp_path))
    assert find_model(str(tmp_path), "int4")[1].hidden_size == 2048


def test_bounds_are_marked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Where only the floor is known: in the table, and as hollow dots of the picture."""
    picture = tmp_path / "two.png"
    arguments = ["--model", "r1-distill-qwen-7b", "--count", "2", *SMALL, "--budget", "4000"]
    text = printed(capsys, *arguments, "--plot", str(picture))
    (row,) = [line for line in text.splitlines() if "2 x RTX 4090" in line]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[7] == "" and cells[9].startswith("≤ ") and cells[10].startswith("≥ ")
    drawn = picture.with_suffix(".svg").read_text(encoding="utf-8")
    assert "hollow" in drawn
    one = printed(capsys, "--model", "r1-distill-qwen-7b", "--gpu", "RTX 4090", "--count", "2")
    assert "USD per million tokens, at least" in one and "joules" not in one


def test_rows_are_cut_to_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "youtu-2b", "--gpu", "H100", "--prompt", "999999999"]
    assert "new ones, cut to the model's context" in printed(capsys, *arguments)
    assert "cut to" not in printed(capsys, *arguments[:4], *SMALL)


def test_limits_of_a_ranking(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "youtu-2b", *SMALL, "--budget", "1600"]
    text = printed(capsys, *arguments, "--min-tokens-per-s", "150")
    assert "RTX 3090" in text and "RTX 3060" not in text and "H100" not in text


def test_predictions_beside_measured_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """--compare marks them; --show, which shows measurements, refuses them."""
    file = tmp_path / "predicted.json"
    text = printed(capsys, "--model", "moonlight-16b", "--gpu", "4090", *SMALL, "-o", "json")
    file.write_text(text)
    row = json.loads(text)["rows"][0]
    assert row["predicted"] and "parity" not in row and row["starts_from"]
    assert bench.main(["--compare", str(file), str(RESULTS / "kernels" / "batch-1.json")]) == 0
    out = capsys.readouterr().out
    assert "| RTX 4090 (PREDICTED)  | 24        | PREDICTED: fp8, one device" in out
    assert "| NVIDIA H100 80GB HBM3 | 85        | baseline" in out
    assert bench.main(["--show", str(file)]) == 2
    assert "holds predictions of r1.guide: --compare shows them" in capsys.readouterr().err


def test_calibrating(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Rows of a machine of one's own: the error of each, and predictions start from them."""
    found = json.loads((RESULTS / "kernels" / "batch-8.json").read_text(encoding="utf-8"))
    found["machine"]["name"] = "my card"
    for row in found["rows"]:
        row["tpot_ms"] *= 2
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(found))
    text = printed(capsys, "--calibrate", str(file))
    (line,) = [line for line in text.splitlines() if "my card" in line]
    assert "moonlight-16b" in line
    measured, predicted = (float(each) for each in line.split("|")[2:4])
    error = float(line.split("|")[4].strip(" %"))
    assert measured == 13.5, "twice what the file has"
    assert predicted / measured == pytest.approx(0.5, abs=0.05)
    assert 100 * (predicted / measured - 1) == pytest.approx(error, abs=1)
    arguments = ["--calibrate", str(file), "--model", "moonlight-16b", *SMALL, "--batch", "8"]
    text = printed(capsys, *arguments, "--gpu", "m3-ultra", "--quant", "none")
    assert "Nothing is expected" in text, "a GPU's rows say nothing about a CPU"
    text = printed(capsys, *arguments, "--gpu", "orin", "--quant", "none")
    assert "Calibrated: TPOT at batch 8 starts from" in text and "(my card, mine)" in text
    copy = found["machine"]["copy_gb_s"]
    assert f"- Floor: copy {copy:.0f} GB/s" in text
    (tpot,) = [line for line in text.splitlines() if line.startswith("| TPOT ms, expected")]
    assert tpot.split("|")[2].strip() == f"{2 * 6.75:.3g}"
    assert main(["--calibrate", str(RESULTS / "ladder.json"), "--gpu", "4090"]) == 2
    assert "rows of NVIDIA H100 80GB HBM3, so use --gpu h100" in capsys.readouterr().err


def test_too_little_ram_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Not the card, nor the layout: what the experts take is said, and disk is offered."""
    asked = ("--model", "v2", "--gpu", "4090", "--experts", "host", *SMALL)
    short = printed(capsys, *asked, "--ram-gb", "64")
    assert "its experts take 115 GB of RAM in int4, and --ram-gb gives 64: give more" in short
    assert "experts in 115 GB of RAM" in printed(capsys, *asked, "--ram-gb", "120")
    with pytest.raises(SystemExit):
        main([*asked, "--ram-gb", "1e9"])
    assert "'1e9': give a number above 0 and below 1,000,000,000" in capsys.readouterr().err


BAD = {
    "nothing": ([], "give --model M, --gpu G or both"),
    "a model": (["--model", "/nowhere"], "--model /nowhere is no folder: give one, or a shape: r1"),
    "a machine": (["--gpu", "voodoo"], "--gpu voodoo: give all, or one of 3060"),
    "a filter": (["--model", "r1", "--gpu", "h100", "--budget", "5"], "--budget goes with a rank"),
    "a picture": (["--model", "r1", "--plot", "x.gif"], "is written as .png"),
    "too little": (["--model", "youtu-2b", "--budget", "1"], "nothing is cheap and fast enough"),
    "calibrate": (["--calibrate", "/nowhere.json"], "can't be read"),
    "prompts": (["--calibrate", str(RESULTS / "prefill.json")], "no row of it tells a step's time"),
    "json": (
        ["--model", "r1", "--gpu", "3060", "--count", "8", "--ram-gb", "9", "-o", "json"],
        "nothing fits",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, said = BAD[case]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("r1.guide: ") and err.count("\n") == 1
    check_sentence(err.removeprefix("r1.guide: ").rstrip("\n"))
    assert said in err


@pytest.mark.parametrize("flag", ["--batch", "--budget", "--years", "--busy-share", "--count"])
def test_bad_numbers(flag: str) -> None:
    for value in ("0", "-1", "x", "nan", "1e99"):
        with pytest.raises(SystemExit) as ended:
            main(["--model", "tiny", flag, value])
        assert ended.value.code == 2


def test_committed_rows_name_no_path() -> None:
    assert all("/" not in row.file for row in measured.committed())
