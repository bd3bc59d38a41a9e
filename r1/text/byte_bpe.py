"""Byte-level BPE vocabularies, which a `tokenizer.json` describes (DeepSeek)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from r1.errors import InputError
from r1.text.byte_alphabet import NEVER_IN_UTF8, SYMBOL_TO_BYTE, from_symbols


class ByteBpe:
    """Byte-level BPE by the `tokenizers` library: one encoder with the control tokens, one without.

    Implements `vocabulary.Codec`.
    """

    pads = False

    def __init__(self, source: str, named: Iterable[str], path: Path) -> None:
        """`source` is the text of a tokenizer.json. `path` is its file, for error messages.

        The tokens in `named` are control tokens even if `source` does not mark them as such.
        """
        self._full = _parse(source, f"{path} can't be read as a tokenizer, download it again")
        spec = json.loads(source)
        model = spec["model"]
        if model.get("type") != "BPE" or (spec.get("decoder") or {}).get("type") != "ByteLevel":
            raise InputError(
                f"{path} is not a byte-level BPE tokenizer; that is the only kind read from a "
                "tokenizer.json"
            )
        vocab: dict[str, int] = model["vocab"]
        self.control: dict[str, int] = {
            t["content"]: t["id"] for t in spec.get("added_tokens") or ()
        }
        self.control |= {name: vocab[name] for name in named if name in vocab}

        _remove_control(spec, self.control)
        needed = {symbol for symbol, byte in SYMBOL_TO_BYTE.items() if byte not in NEVER_IN_UTF8}
        if missing := needed - model["vocab"].keys():
            raise InputError(
                f"{path} has no ordinary token for {len(missing)} of the {len(needed)} bytes of "
                "UTF-8, so some text could not be encoded; download it again"
            )
        self._plain = _parse(json.dumps(spec), f"{path} can't be used without its control tokens")

        self.pieces = {i: from_symbols(token) for token, i in model["vocab"].items()}
        self.pieces |= {i: text.encode() for text, i in self.control.items()}

    def encode(self, text: str, control: bool) -> list[int]:
        encoder = self._full if control else self._plain
        ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        return ids


def _remove_control(spec: dict[str, Any], control: dict[str, int]) -> None:
    """Change the content of a tokenizer.json so that it has no control tokens.

    An encoder whose vocabulary lacks the control ids can't emit them. It is not enough to remove
    the added tokens: R1 has three control tokens in the vocabulary of the BPE as well.
    """
    model, names, ids = spec["model"], control.keys(), set(control.values())
    model["vocab"] = {
        token: i for token, i in model["vocab"].items() if token not in names and i not in ids
    }
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names]
    model["unk_token"] = None  # not needed: every byte of UTF-8 has a token
    spec["added_tokens"] = []
    # A post-processor may name control tokens. Our own templates place those.
    spec["post_processor"] = None


def _parse(source: str, complaint: str) -> tokenizers.Tokenizer:
    """The library's tokenizer. Raises InputError with `complaint` and the library's reason."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library has no exception class of its own
        raise InputError(f"{complaint} ({error})") from error
    # A file may ask the library to cut or to pad every text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
