"""The READMEs: tables match the committed results, examples run, commands and links work.

r1/README.md, the tour, has more tests in test_tour_page.py.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import card
import make_tables
import pytest
import torch
from command import TIMING, command

import r1
from r1 import Backend
from r1.switches.backend import choices

ROOT = Path(__file__).parents[1]

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_come_from_the_committed_files() -> None:
    texts = [page.read_text(encoding="utf-8") for page in make_tables.PAGES]
    assert make_tables.filled(texts) == texts, "run python tools/measure/make_tables.py"
    with pytest.raises(ValueError, match="have 0 places"):
        make_tables.filled([text.replace("<!-- ladder -->", "") for text in texts])


def test_the_card_comes_from_the_committed_files() -> None:
    record, evaluations, second = card.shipped()
    page = (ROOT / "weights" / "tiny-r1" / "README.md").read_text(encoding="utf-8")
    assert card.card(record, evaluations, second) == page, "run python tools/train/card.py"
    assert second["settings"] == record["settings"] and second["history"] != record["history"], (
        "another run of the same"
    )
    alike = [found for found in evaluations.values() if found["problems"] == 200]
    assert {found["backend"]["device"] for found in alike} == {"cpu", "cuda"} and sum(
        bool(f["speculation"]) for f in alike
    ) == 4
    assert len({found["text"] for found in alike}) == 1, (
        "drafts, graphs, the compiler and the machine change no token"
    )


def test_the_page_is_short() -> None:
    assert len(TEXT.splitlines()) <= 150 and len(TEXT.encode()) <= 12_000


def test_the_example_is_what_is_printed() -> None:
    """The answer on stdout, and only a line of timings on stderr, which each machine changes."""
    found = re.search(
        r'python -m r1 ("What is .*?)\n```\n\n```\n(.*?\n)(\[.*\])\n```', TEXT, re.DOTALL
    )
    assert found
    result = command(*shlex.split(found[1]), "--device", "cpu")
    assert result.returncode == 0 and result.stdout == found[2]
    shown, printed = TIMING.fullmatch(found[3]), TIMING.fullmatch(result.stderr.rstrip())
    assert shown and printed and shown[1] == printed[1]


FIRST, MINE, THEN = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_what_one_does_from_python_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_tables: None
) -> None:
    """As it stands, with one MoE held against ours; the training step changes the model."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    space: dict[str, Any] = {}
    for code in (FIRST, THEN):
        exec(code, space)  # ours
    assert space["seen"]["hidden"].shape[:2] == (1, len(space["ids"]))
    del sys.modules["mine"]
    reloaded = r1.load("weights/tiny-r1", Backend(device="cpu", dtype="fp32"), quiet=True)
    logits = [engine.logits(space["tokens"]) for engine in (space["engine"], reloaded)]
    assert not torch.equal(*logits)


def test_ones_own_strategy_is_measured_by_its_name(tmp_path: Path) -> None:
    """By the page's command, on a small workload: its numbers are right, and no path is kept."""
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    found = re.search(r"`python (bench\.py --import mine\.py .*?)`", TEXT)
    assert found
    bench, *flags = shlex.split(found[1])
    small = ["--device", "cpu", "--new", "3", "--prompt", "5", "-r", "1", "-o", "json"]
    done = subprocess.run(
        [sys.executable, str(ROOT / bench), *flags, *small],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["command"].startswith("python bench.py --import mine.py --moe mine ")
    baseline, own = result["rows"]
    assert own["arm"] == "moe=mine" and own["backend"]["moe"] == "mine" and own["parity"]
    assert baseline["backend"]["moe"] == "gather" and own["speedup"] is not None


COMMAND = re.compile(r"^(?:\S*/)?python (bench\.py|-m r1(?:\.\w+)?|tools/\S+\.py)(.*?)(?:#.*)?$")


@pytest.mark.parametrize("page", make_tables.PAGES, ids=lambda page: str(page.parent.name))
def test_commands_are_understood(page: Path) -> None:
    """Each flag of every command in a block of shell code is one of the command's."""
    shell = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [
        found for text in shell for line in text.splitlines() if (found := COMMAND.match(line))
    ]
    helps: dict[str, str] = {}
    for found in filter(None, lines):
        name, arguments = found[1], shlex.split(found[2])
        if name not in helps:
            done = subprocess.run(
                [sys.executable, *shlex.split(name), "--help"],
                cwd=ROOT, capture_output=True, text=True, check=True,
            )  # fmt: skip
            helps[name] = done.stdout
        for flag in (word.partition("=")[0] for word in arguments if word.startswith("-")):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", helps[name]), f"{name} has no {flag}"


@pytest.mark.parametrize("page", make_tables.PAGES, ids=lambda page: str(page.parent.name))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert link.startswith("https://") or target.exists(), f"{page} links to {link}"
        if anchor and not link.startswith("https://"):
            text = target.read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
            assert anchor in anchors or f'<a id="{anchor}">' in text, f"{page} links to {link}"


TOUR = ROOT / "r1" / "README.md"


def test_what_one_adds_runs(monkeypatch: pytest.MonkeyPatch, own_tables: None) -> None:
    """The tour's own attention and storage, run as they stand; they change the text's logits."""
    monkeypatch.chdir(ROOT)
    space: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", TOUR.read_text(encoding="utf-8"), re.DOTALL):
        if not code.startswith("# "):  # an excerpt of a file, see test_tour_page.py
            exec(code, space)  # ours
    assert space["engine"].model.layers[0].mlp.down_proj.matrix.numbers.dtype == torch.int8
    assert "windowed" in choices()["attention"]


def test_the_tours_letters_have_one_meaning() -> None:
    """Each line "Shapes: ..." of r1/ uses letters of the legend only, or words."""
    legend = set(re.findall(r"^\| (\w) \|", TOUR.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(legend) == 22
    for path in (ROOT / "r1").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for shapes in re.findall(r"^Shapes: (.*?)(?:\n\n|\"\"\")", text, re.DOTALL | re.MULTILINE):
            used = set(re.findall(r"(?:^|[,;] )([A-Za-z])(?= [a-z_=])", " ".join(shapes.split())))
            used -= {"n", "b"}  # numbers that one file needs once
            assert used <= legend, f"{path.relative_to(ROOT)}: {used - legend}"
