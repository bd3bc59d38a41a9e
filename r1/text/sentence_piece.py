"""Sentencepiece vocabularies, which a `tokenizer.model` describes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from r1.errors import InputError
from r1.reading import read_bytes


class SentencePiece:
    """A sentencepiece model, by the library of that name. Implements `vocabulary.Codec`.

    In the library, control pieces never match text, but user-defined pieces do. Where a
    user-defined piece matches, `encode` replaces it by the pieces of its bytes.
    """

    def __init__(self, path: Path, added: dict[str, int], named: Iterable[str]) -> None:
        """`added` maps the texts of further control tokens to ids.

        The tokens in `named` are control tokens even if the model does not mark them as such.
        """
        self._model = model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(read_bytes(path))
            texts = [model.id_to_piece(i) for i in range(model.get_piece_size())]
            probe = model.encode("a")
            self.pieces = {i: self._bytes_of(i, text) for i, text in enumerate(texts)}
        except (OSError, RuntimeError, ValueError) as error:  # ValueError: a piece is not UTF-8
            raise InputError(
                f"{path} can't be read as a sentencepiece model; download it again"
            ) from error
        self.pads = bool(probe) and texts[probe[0]].startswith("▁")

        # The library does not distinguish user-defined pieces from normal ones. So every piece that
        # looks like a tag counts as control. At worst, a normal "[x]" is encoded as bytes.
        ids = {
            text: i for i, text in enumerate(texts) if not (model.is_unknown(i) or model.is_byte(i))
        }
        self.control = {text: i for text, i in ids.items() if model.is_control(i) or _is_tag(text)}
        self.control |= added | {name: ids[name] for name in named if name in ids}
        self.pieces |= {i: text.encode() for text, i in self.control.items()}
        self._control_ids = frozenset(self.control.values())
        longest_first = sorted(self.control, key=len, reverse=True)
        self._tags = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def encode(self, text: str, control: bool) -> list[int]:
        if not control:
            return [i for token in self._model.encode(text) for i in self._without_control(token)]
        ids: list[int] = []
        # Control pieces never match in the library, so the text is cut at their names.
        for part in self._tags.split(text):
            ids += [self.control[part]] if part in self.control else self._model.encode(part)
        return ids

    def _bytes_of(self, token: int, text: str) -> bytes:
        """The bytes that an ordinary piece stands for."""
        if self._model.is_byte(token):
            return bytes([int(text[3:-1], 16)])  # "<0x0A>"
        if self._model.is_unknown(token):
            return " \N{DOUBLE QUESTION MARK} ".encode()  # as the library prints it
        return text.replace("▁", " ").encode()

    def _without_control(self, token: int) -> list[int]:
        """The token itself, or the tokens of its bytes if it is a control token.

        If the model has no byte pieces, the library returns the id of "unknown" for each byte.
        """
        if token not in self._control_ids:
            return [token]
        return [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in self.pieces[token]]


def _is_tag(text: str) -> bool:
    """Whether a piece is written like a tag: <...> or [...]."""
    return len(text) > 2 and text[0] + text[-1] in ("<>", "[]")
