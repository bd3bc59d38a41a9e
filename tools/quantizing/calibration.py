"""What the layers read while they are looked at: a user's text, or the model's own answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from tasks import KINDS, draw, phrase

import r1
from r1 import Backend, Engine, InputError, Tokenizer
from r1.files.embedded import domain_of
from r1.reading import read_text

ANSWERS = 64
"""Questions that are answered together."""
MOST_NEW = 1024
"""The most tokens of an answer."""


def from_text(tokenizer: Tokenizer, path: Path, count: int, length: int) -> list[list[int]]:
    """The first rows of a text: at most `count`, of `length` tokens each; the last may be shorter.

    Each row begins with the token that begins a text. Raises InputError for an unusable file.
    """
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    each = length - len(start)
    # No token is longer than a few dozen bytes, so the rest of a large file is not needed.
    ids = tokenizer.encode(_read(path)[: 64 * count * length])
    rows = [start + ids[at : at + each] for at in range(0, len(ids), each)][:count]
    if len(rows) > 1 and len(rows[-1]) < each // 8:
        rows.pop()
    return rows


def questions_in(path: Path) -> list[str]:
    """The lines of a file. Raises InputError for an unusable file."""
    return [line.strip() for line in _read(path).splitlines() if line.strip()]


def _read(path: Path) -> str:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read ({error}): give a text file in UTF-8") from None
    if not text.strip():
        raise InputError(f"{path} is empty: give a text file in UTF-8")
    return text


def training_questions(directory: Path, count: int, seed: int) -> list[str] | None:
    """Questions like those of the embedded checkpoint's training. None for every other folder.

    They are drawn from its training problems. The held-out problems, which judge the result, are
    none of them.
    """
    if domain_of(directory) is None:
        return None
    rng = random.Random(f"quantize {seed}")
    kinds, weights = list(KINDS), list(KINDS.values())
    drawn = (draw(rng, "train", rng.choices(kinds, weights)[0]) for _ in range(count))
    return [phrase(problem, rng).question for problem in drawn]


def own_answers(
    directory: Path,
    backend: Backend,
    questions: Sequence[str],
    length: int,
    say: Callable[[str], object],
) -> list[list[int]]:
    """Ask the model. A row is a prompt with the model's answer, at most `length` tokens of it.

    The whole model is loaded for this. Answers are greedy, so the same model writes the same rows.
    """
    engine = r1.load(directory, backend, batch=min(ANSWERS, len(questions)), quiet=True)
    prompts = [_prompt(engine, question, length) for question in questions]
    prompts.sort(key=len)
    rows: list[list[int]] = []
    for start in range(0, len(prompts), ANSWERS):
        asked = prompts[start : start + ANSWERS]
        new = max(1, min(MOST_NEW, length - len(asked[-1])))
        done = engine.generate(asked, max_new_tokens=new, temperature=0.0)
        rows += [prompt + each.tokens for prompt, each in zip(asked, done, strict=True)]
        say(f"answers: {len(rows)} of {len(prompts)}, {sum(map(len, rows)):,} tokens")
    return rows


def _prompt(engine: Engine, question: str, length: int) -> list[int]:
    assert engine.tokenizer is not None
    prompt = engine.tokenizer.chat_prompt([{"role": "user", "content": question}])
    if len(prompt) >= length:
        raise InputError(
            f"a question has {len(prompt)} tokens, and --length {length} leaves no room for its "
            "answer: give a larger --length"
        )
    return prompt
