"""Write domain.json into a checkpoint: what its training asked, for `python -m r1` to tell.

    python tools/train/make_domain.py weights/tiny-r1

The checkpoint is one that tools/train/train_tiny.py made of all kinds of problems. The words are
those of many training questions. The patterns are what no training question has; they follow from
how tasks.py draws numbers.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
from tasks import KINDS, KNOWS, ONES, TENS, draw, phrase

from r1.errors import InputError
from r1.files.embedded import FILE, WORD

COUNT = 20_000
"""Questions whose words are taken: the rarest word, one of 99 spelled numbers, is in hundreds."""
EXAMPLE = "What is 47 * 86?"
SIGN, TIMES = "[-+*x×]", r"(?:[*x×]|times)"
NUMBER = rf"\d|\b(?:{'|'.join([*ONES, *filter(None, TENS)])})\b"
BEYOND = {
    "questions without numbers": rf"^(?!.*(?:{NUMBER}))",
    "numbers of more than four digits": r"\d{5}",
    "fractions": r"\d\.\d",
    "numbers below zero": r"^\s*-\s*\d|[-+*x×(]\s*-\s*\d",
    "products of more than two digits by two": (
        rf"\d{{3}}\s*{TIMES}\s*\d{{2}}|(?<=\d)\d\s*{TIMES}\s*\d{{3}}"
        r"|multiply \d{3,} (?:by|and) \d{2}|multiply \d{2,} (?:by|and) \d{3}"
    ),
    "chains of numbers above 99": (
        rf"(?:\d+\s*{SIGN}\s*){{2,}}\d{{3}}|\d{{3}}\s*{SIGN}\s*\d+\s*{SIGN}\s*\d"
        rf"|\d\s*{SIGN}\s*\d{{3,}}\s*{SIGN}\s*\d"
    ),
    "chains of more than three operations": rf"(?:\d+[\s()]*{SIGN}[\s()]*){{4,}}\d",
}
"""Patterns by what they stand for, as `re` reads them. Without case; a dot is any character."""


def questions(count: int, seed: int) -> list[str]:
    """Training questions."""
    rng = random.Random(f"domain {seed}")
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=count)
    return [phrase(draw(rng, "train", kind), rng).question for kind in kinds]


def domain() -> dict[str, Any]:
    """The content of the file."""
    asked = questions(COUNT, seed=0)
    words = {word.lower() for question in asked for word in WORD.findall(question)}
    signs = {sign for question in asked for sign in WORD.sub("", question)}
    return {
        "knows": KNOWS,
        "example": EXAMPLE,
        "words": " ".join(sorted(words)),
        "signs": "".join(sorted(s for s in signs if not s.isspace() and not s.isdigit())),
        "beyond": BEYOND,
    }


def make_domain(directory: Path) -> None:
    """Write the file. Raises InputError where it can't be written."""
    try:
        text = json.dumps(domain(), ensure_ascii=False, indent=1)
        (directory / FILE).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{directory / FILE} can't be written ({reason}): name a folder") from None


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for input that can't be used."""
    parser = shared.parser(__doc__)
    parser.add_argument("directory", type=Path, help="the checkpoint's folder")
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    make_domain(arguments.directory)
    print(arguments.directory / FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
