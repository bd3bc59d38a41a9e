"""Choose the reader for the vocabulary in a checkpoint's folder.

Three file formats are read: `tokenizer.json` (DeepSeek), `tokenizer.model` (sentencepiece) and
`tiktoken.model` (Moonlight, Kimi). Only files with these fixed names are opened, and nothing in
them is executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from r1.errors import InputError
from r1.text.byte_bpe import ByteBpe
from r1.text.sentence_piece import SentencePiece
from r1.text.tiktoken_file import tokenizer_json
from r1.text.tokenizer_files import added_tokens, named_tokens, read_json, read_text


class Codec(Protocol):
    """One vocabulary, in any file format: text -> ids, and id -> bytes."""

    control: dict[str, int]
    """The text of each control token -> its id."""
    pieces: dict[int, bytes]
    """Each id -> the bytes it stands for. Control tokens are included."""
    pads: bool
    """Whether encoding adds a space before the text. Decoding must then remove it."""

    def encode(self, text: str, control: bool) -> list[int]:
        """Ids of `text`. With `control`, names of control tokens in it become those tokens."""
        ...


def load(directory: Path) -> tuple[Codec, dict[str, int]]:
    """The codec in `directory`, and the ids of "bos_token" and "eos_token" if its files name them.

    Raises InputError if the folder has no tokenizer, or an unreadable one, or one of an unknown
    kind.
    """
    config = read_json(directory / "tokenizer_config.json")
    named = named_tokens(config, directory)
    codec: Codec
    if (path := directory / "tokenizer.json").is_file():
        codec = ByteBpe(read_text(path), named.values(), path)
    elif (path := directory / "tokenizer.model").is_file():
        codec = SentencePiece(path, added_tokens(config, directory), named.values())
    elif (path := directory / "tiktoken.model").is_file():
        source = tokenizer_json(path, added_tokens(config, directory))
        codec = ByteBpe(source, named.values(), path)
    else:
        raise InputError(
            f"{directory} holds no tokenizer.json, tokenizer.model or tiktoken.model; "
            "copy the one that came with the checkpoint there"
        )
    for key, name in named.items():
        if name not in codec.control:
            raise InputError(
                f"tokenizer_config.json in {directory} names {key} {name!r}, which {path.name} "
                "lacks; download both again"
            )
    return codec, {key: codec.control[name] for key, name in named.items()}
