"""Held-out problems that come with a checkpoint: what a switch costs is seen in right answers, too.

A checkpoint's folder may hold exam.json, a list of `{"question": text, "answer": number, "tokens":
length}`: `tokens` is how long prompt, reasoning and answer are when they are right, so that only
what fits a workload's cache is asked there."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1.errors import InputError
from r1.run.generate import Engine

FILE = "exam.json"
SLACK = 24
"""Tokens that a right answer may take beyond the one that `tokens` was counted on: it may begin
with another sentence."""


@dataclass(frozen=True)
class Question:
    """One problem, as exam.json has it."""

    question: str
    answer: int
    tokens: int


def write(directory: Path, questions: Sequence[Question]) -> None:
    """Put exam.json into a checkpoint's folder."""
    lines = ",\n".join(json.dumps(dataclasses.asdict(question)) for question in questions)
    (directory / FILE).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def load(directory: str | Path) -> list[Question]:
    """The problems of a checkpoint, none where it has no exam.json. Raises InputError where that
    can't be read."""
    path = Path(directory) / FILE
    if not path.is_file():
        return []
    try:
        found = [Question(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} can't be read ({error}): make it with tools/train/make_exam.py, or delete it"
        ) from None
    for number, question in enumerate(found):
        if (
            not isinstance(question.question, str)
            or type(question.answer) is not int
            or type(question.tokens) is not int
        ):
            raise InputError(
                f"{path}: entry {number} is no question with whole numbers for its answer and tokens"
            )
        if question.tokens < 1:
            raise InputError(
                f"{path}: entry {number} has tokens={question.tokens}: give at least 1"
            )
    return found


def fitting(questions: Sequence[Question], tokens: int, count: int) -> list[Question]:
    """The first `count` that a cache of so many tokens has room for."""
    return [question for question in questions if question.tokens + SLACK <= tokens][:count]


def correct(answer: str, number: int) -> bool:
    """Whether an answer (behind its reasoning) ends in the right number, and says that it is the
    end."""
    last = re.search(r"(?<![\d.,\-−])(-?\d{1,18})\.\s*$", answer)
    return last is not None and int(last[1]) == number


def right(engine: Engine, written: Sequence[int], number: int, think: bool = True) -> bool:
    """Whether the tokens that were written behind a question came to their end, and to the right
    number."""
    assert engine.tokenizer is not None
    return (
        bool(written)
        and written[-1] in engine.stop_ids
        and correct(engine.tokenizer.split(list(written), think)[1], number)
    )


def accuracy(engine: Engine, questions: Sequence[Question], tokens: int, batch: int) -> float:
    """The share that is answered rightly: greedily, `batch` at a time in a cache of `tokens` tokens
    a row.

    Every batch is full, the last one by questions that are asked again: an arm that compiles knows
    this shape only."""
    if engine.tokenizer is None:
        raise InputError(
            "this checkpoint has an exam.json and no tokenizer, so it can't be asked: use --problems 0"
        )
    count = 0
    for start in range(0, len(questions), batch):
        asked = list(questions[start : start + batch])
        rows = asked + asked[:1] * (batch - len(asked))
        prompts = [
            engine.tokenizer.chat_prompt([{"role": "user", "content": row.question}])
            for row in rows
        ]
        written = engine.generate(prompts, tokens - max(map(len, prompts)), temperature=0.0)
        count += sum(
            right(engine, done.tokens, row.answer)
            for done, row in zip(written, asked, strict=False)
        )
    return count / len(questions)
