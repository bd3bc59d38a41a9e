"""Decode token ids to text, one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Decodes one token at a time, in constant time for each.

    A token stands for bytes, and UTF-8 can be decoded byte by byte. The texts that `push` and
    `flush` return, joined, equal `Tokenizer.decode` of the same ids. A character is returned whole,
    together with its last byte. Each invalid byte is returned as U+FFFD, at most two bytes late.
    """

    def __init__(self, piece: Callable[[int], bytes], drop_space: bool) -> None:
        """`piece` gives the bytes of an id. `drop_space` removes a space before the first text."""
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = drop_space

    def push(self, token: int) -> str:
        """The text that `token` completes. It may include bytes of earlier tokens."""
        data = self._piece(token)
        if self._drop_space and data:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """End the text: U+FFFD if a character is incomplete. The decoder can then be used again."""
        return self._utf8.decode(b"", final=True)
