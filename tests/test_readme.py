"""What the README says that can be checked: its tables are those of the committed results, and its paths exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import make_tables

ROOT = Path(__file__).parents[1]

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_come_from_the_committed_files() -> None:
    assert make_tables.filled(TEXT) == TEXT, "run python tools/make_tables.py"
    assert TEXT.count("\n| + ") >= 5 and "transformers static cache + compile" in TEXT
    with pytest.raises(ValueError, match="has 0 places"):
        make_tables.filled(TEXT.replace("<!-- ladder -->", ""))


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 20
    for link in links:
        found = link.startswith("https://") or (ROOT / link).exists() or (ROOT / "r1" / link).exists()
        assert found, f"README.md links to {link}"
