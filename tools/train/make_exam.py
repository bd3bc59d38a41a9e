"""Write exam.json beside a checkpoint that tools/train/train_tiny.py made: held-out problems for
bench.py's accuracy column.

    python tools/train/make_exam.py weights/tiny-r1

They are the first of those that tools/train/eval.py asks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs from a checkout, without installing r1
sys.path.insert(0, str(Path(__file__).parent))

from packing import encode
from tasks import exam, phrased

from r1 import InputError
from r1.bench.exam import FILE, Question, write
from r1.text.tokenizer import Tokenizer

COUNT = 100


def make_exam(directory: Path) -> None:
    """Write the file. Raises InputError where the folder has no tokenizer."""
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="the checkpoint's folder")
    directory = parser.parse_args(argv).directory
    try:
        make_exam(directory)
    except InputError as error:
        print(f"make_exam: {error}", file=sys.stderr)
        return 2
    print(f"{directory / FILE}: {COUNT} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
