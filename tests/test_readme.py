"""What the README says that can be checked: its tables are those of the committed results, and its
paths exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import card
import make_tables
import pytest
from test_generate import TIMING, command

ROOT = Path(__file__).parents[1]

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_come_from_the_committed_files() -> None:
    assert make_tables.filled(TEXT) == TEXT, "run python tools/measure/make_tables.py"
    assert TEXT.count("\n| + ") >= 5 and "transformers static cache + compile" in TEXT
    with pytest.raises(ValueError, match="has 0 places"):
        make_tables.filled(TEXT.replace("<!-- ladder -->", ""))


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


def test_the_example_is_what_is_printed() -> None:
    """All of it: the answer on stdout, and on stderr nothing but the line of timings, which is
    another on each machine."""
    found = re.search(
        r'python -m r1 ("What is 47.*?)\n```\n\n```\n(.*?\n)(\[.*\])\n```', TEXT, re.DOTALL
    )
    assert found
    result = command(*shlex.split(found[1]), "--device", "cpu")
    assert result.returncode == 0 and result.stdout == found[2]
    shown, printed = TIMING.fullmatch(found[3]), TIMING.fullmatch(result.stderr.rstrip())
    assert shown and printed and shown[1] == printed[1]


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 20
    for link in links:
        found = (
            link.startswith("https://") or (ROOT / link).exists() or (ROOT / "r1" / link).exists()
        )
        assert found, f"README.md links to {link}"
