"""tiktoken vocabularies, which a `tiktoken.model` describes (Moonlight, Kimi).

They are byte-level BPE too. So they are rewritten as a tokenizer.json, which byte_bpe.py reads.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1.errors import InputError
from r1.text.byte_alphabet import to_symbols
from r1.text.tokenizer_files import read_text

# `&&` is the intersection of two classes, in the library's regex engine as in Moonlight's.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",  # a run of Han characters
        _BEFORE + _UPPER + "*" + _LOWER + "+" + _AFTER,  # a word and its contraction
        _BEFORE + _UPPER + "+" + _LOWER + "*" + _AFTER,
        r"\p{N}{1,3}",  # up to three digits
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation
        r"\s*[\r\n]+",  # line ends
        r"\s+(?!\S)",  # spaces
        r"\s+",
    ]
)
"""How Moonlight and Kimi cut text into words, before BPE."""


def tokenizer_json(path: Path, added: dict[str, int]) -> str:
    """The text of a tokenizer.json for the tiktoken.model at `path`.

    `added` maps the texts of its control tokens to ids. Moonlight's own wrapper also cuts runs of
    more than 25,000 characters. r1 does not.
    """
    ranks = _read_ranks(path)
    vocab = {to_symbols(token): rank for token, rank in ranks.items()}
    if clash := vocab.keys() & added.keys() or set(vocab.values()) & set(added.values()):
        raise InputError(
            f"tokenizer_config.json beside {path} has an added token that is an ordinary one: "
            f"{clash}"
        )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    by_id = sorted(added.items(), key=lambda item: item[1])
    split = {
        "type": "Split", "pattern": {"Regex": KIMI_PATTERN}, "behavior": "Isolated",
        "invert": False,
    }  # fmt: skip
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    model: dict[str, Any] = {
        "type": "BPE",
        # The added tokens are in the vocabulary too. Otherwise the library would give them new ids,
        # because their ids have gaps.
        "vocab": vocab | added,
        "merges": [[to_symbols(left), to_symbols(right)] for left, right in _merges(ranks)],
        # A word that is a token is taken whole, without merges.
        "ignore_merges": True,
    }
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **flags, "special": True} for text, i in by_id],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": model,
    }
    return json.dumps(spec)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank, which is its id too. Each line of the file is "<token in base64> <rank>"."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            encoded, rank = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
        except ValueError:
            raise InputError(
                f"{path} line {number} is not a base64 token and its rank; download it again"
            ) from None
    if len(set(ranks.values())) != len(ranks) or not ranks or min(ranks.values()) < 0:
        raise InputError(f"{path} has no tokens, or two of one rank; download it again")
    return ranks


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The BPE merges that equal tiktoken's rule.

    tiktoken joins the two neighbours whose union has the lowest rank. So each way to cut a token
    into two tokens is a merge, and the merges are in the order of the union's rank.
    """
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                yield left, right
