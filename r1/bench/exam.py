"""Held-out problems of a checkpoint: they show whether a switch costs right answers.

A checkpoint's folder may hold exam.json, a list of `{"question": text, "answer": number, "tokens":
length}`. `tokens` is the length of the prompt, the reasoning and the right answer together. A
problem is asked only if a workload's cache has room for it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1.errors import InputError
from r1.files.folder import check_file
from r1.reading import read_json
from r1.run.engine import Engine

FILE = "exam.json"
SLACK = 24
"""Room for right answers that are longer than `tokens`, as they may begin with another sentence."""


@dataclass(frozen=True)
class Question:
    """One entry of exam.json."""

    question: str
    answer: int
    tokens: int


def write(directory: Path, questions: Sequence[Question]) -> None:
    """Put exam.json into a checkpoint's folder."""
    lines = ",\n".join(json.dumps(dataclasses.asdict(question)) for question in questions)
    (directory / FILE).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def load(directory: str | Path) -> list[Question]:
    """The problems of a checkpoint, or none if it has no exam.json.

    Raises InputError if the file can't be read.
    """
    path = Path(directory) / FILE
    if check_file(path) is None:
        return []
    try:
        questions = [Question(**entry) for entry in read_json(path)]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} can't be read ({error}): make it with tools/train/make_exam.py, or delete it"
        ) from None
    for number, question in enumerate(questions):
        if (
            not isinstance(question.question, str)
            or type(question.answer) is not int
            or type(question.tokens) is not int
        ):
            raise InputError(
                f"{path}: entry {number} is no question with whole numbers for its answer "
                "and tokens"
            )
        if question.tokens < 1:
            raise InputError(
                f"{path}: entry {number} has tokens={question.tokens}: give at least 1"
            )
    return questions


def fitting(questions: Sequence[Question], tokens: int, count: int) -> list[Question]:
    """The first `count` problems that fit a cache of `tokens` tokens a row."""
    return [question for question in questions if question.tokens + SLACK <= tokens][:count]


def correct(answer: str, number: int) -> bool:
    """Whether an answer (the text after the reasoning) ends in the right number and a full stop."""
    last = re.search(r"(?<![\d.,\-−])(-?\d{1,18})\.\s*$", answer)
    return last is not None and int(last[1]) == number


def right(engine: Engine, written: Sequence[int], number: int, think: bool = True) -> bool:
    """Whether the generated tokens end with a stop token, and answer with the right number."""
    assert engine.tokenizer is not None
    return (
        bool(written)
        and written[-1] in engine.stop_ids
        and correct(engine.tokenizer.split(list(written), think)[1], number)
    )


def accuracy(engine: Engine, questions: Sequence[Question], tokens: int, batch: int) -> float:
    """The share of right answers: greedy, `batch` at a time, `tokens` tokens a row of the cache.

    Every batch is full: a compiled arm knows only this shape. To fill the last batch, a question is
    asked again.
    """
    if engine.tokenizer is None:
        raise InputError(
            "this checkpoint has an exam.json and no tokenizer, so it can't be asked: "
            "use --problems 0"
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
