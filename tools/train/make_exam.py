"""Write exam.json into a checkpoint: held-out problems for bench.py's accuracy column.

    python tools/train/make_exam.py weights/tiny-r1

The checkpoint is one that tools/train/train_tiny.py made. The problems are the first of those that
tools/train/eval.py asks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
from packing import encode
from tasks import exam, phrased

from r1.bench.exam import FILE, Question, write
from r1.text.tokenizer import Tokenizer

COUNT = 100


def make_exam(directory: Path) -> None:
    """Write the file. Raises InputError for a folder without a tokenizer."""
    tokenizer = Tokenizer.load(directory)
    problems = exam(COUNT)
    examples = phrased(problems)
    lengths = [sum(map(len, encode(tokenizer, example))) for example in examples]
    asked = zip(examples, problems, lengths, strict=True)
    write(
        directory,
        [Question(example.question, problem.answer, length) for example, problem, length in asked],
    )


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for input that can't be used."""
    parser = shared.parser(__doc__)
    parser.add_argument("directory", type=Path, help="the checkpoint's folder")
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    make_exam(arguments.directory)
    print(f"{arguments.directory / FILE}: {COUNT} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
