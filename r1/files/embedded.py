"""The checkpoint that comes with r1: where it lies, and what it was trained on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from r1.reading import read_json

_INSTALLED = Path(__file__).parents[1] / "weights" / "tiny-r1"  # pyproject.toml puts it there
EMBEDDED = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "weights" / "tiny-r1"
"""Its folder: of an installed package, or of a checkout."""
FILE = "domain.json"
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
MOST_CHARACTERS, MOST_NAMED = 1000, 4
"""How much of a question is looked at, and how many words are named: a question may be a book."""


@dataclass(frozen=True)
class Domain:
    """What the questions of a training were made of."""

    name: str
    knows: str
    """What the model learned, in words."""
    example: str
    """A question that it can answer."""
    words: frozenset[str]
    signs: frozenset[str]
    """All words of its questions, in lower case, and all characters outside words and numbers."""
    beyond: dict[str, str]
    """Patterns that no question of the training has, by what they stand for."""

    def outside(self, question: str) -> list[str]:
        """What of a question the model never saw, each in words. Empty: nothing was found."""
        question = question[:MOST_CHARACTERS]
        words = [word for word in WORD.findall(question) if word.lower() not in self.words]
        signs = [
            sign
            for sign in WORD.sub("", question)
            if not (sign.isspace() or sign.isdigit() or sign in self.signs)
        ]
        found = [
            f"the {kind}{'s' * (len(named) > 1)} {', '.join(named)}"
            for kind, unknown in (("word", words), ("sign", signs))
            if (named := [f'"{each}"' for each in dict.fromkeys(unknown)][:MOST_NAMED])
        ]
        return found + [
            what
            for what, pattern in self.beyond.items()
            if re.search(pattern, question, re.IGNORECASE | re.DOTALL)
        ]


def domain_of(directory: Path) -> Domain | None:
    """The domain of the embedded checkpoint; None for every other folder.

    Only our own file is read: a pattern of somebody else's could take for ever to match.
    """
    if not EMBEDDED.is_dir() or not directory.is_dir() or not os.path.samefile(directory, EMBEDDED):
        return None
    read = read_json(EMBEDDED / FILE)
    sets = {"words": frozenset(read["words"].split()), "signs": frozenset(read["signs"])}
    return Domain(**{**read, **sets}, name=EMBEDDED.name)
