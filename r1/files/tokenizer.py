"""The tokenizer of a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path

from r1.model.config import Config
from r1.text.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model")


def tokenizer_of(directory: Path, config: Config) -> Tokenizer | None:
    """The tokenizer in the folder; None if there is none.

    Raises InputError for one that can't be read, or has more ids than the model.
    """
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    eos_id = next(iter(config.eos_token_ids), None)
    tokenizer = Tokenizer.load(directory, bos_id=config.bos_token_id, eos_id=eos_id)
    tokenizer.check(config.vocab_size)
    return tokenizer
