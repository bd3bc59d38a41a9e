"""The file formats of vocabularies, each a `Codec`: text <-> ids, control tokens kept apart.

Three are read: `tokenizer.json` (DeepSeek), `tokenizer.model` (sentencepiece) and `tiktoken.model`
(Moonlight, Kimi). Only these fixed names in the folder are opened, and nothing in them is executed.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from r1.errors import InputError


class Codec(Protocol):
    """What a file format must offer."""

    control: dict[str, int]  # the text of each control token -> its id
    pieces: dict[int, bytes]  # id -> what it stands for, control tokens too
    pads: bool  # text gets a space in front before it is encoded, to be dropped on decoding

    def encode(self, text: str, control: bool) -> list[int]: ...


def load(directory: Path) -> tuple[Codec, dict[str, int]]:
    """The codec in `directory`, and the ids of "bos_token" and "eos_token" where its files name
    them.

    Raises InputError if there is no tokenizer, or one that can't be read, or of a kind that we
    don't know."""
    config = _read_json(directory / "tokenizer_config.json")
    special = _read_json(directory / "special_tokens_map.json")
    names = {
        key: _token_text(config.get(key)) or _token_text(special.get(key))
        for key in ("bos_token", "eos_token")
    }
    named = {key: name for key, name in names.items() if name}

    codec: Codec
    if (path := directory / "tokenizer.json").is_file():
        codec = ByteBpe(_read_text(path), named.values(), path)
    elif (path := directory / "tokenizer.model").is_file():
        codec = SentencePiece(path, _added_tokens(config, directory), named.values())
    elif (path := directory / "tiktoken.model").is_file():
        codec = ByteBpe(
            _from_tiktoken(path, _added_tokens(config, directory)), named.values(), path
        )
    else:
        raise InputError(
            f"{directory} holds no tokenizer.json, tokenizer.model or tiktoken.model; "
            "copy the one that came with the checkpoint there"
        )
    for key, name in named.items():
        if name not in codec.control:
            raise InputError(
                f"tokenizer_config.json in {directory} names {key} {name!r}, which {path.name} lacks; download both again"
            )
    return codec, {key: codec.control[name] for key, name in named.items()}


# -- byte-level BPE --------------------------------------------------------------------------------


def _byte_symbols() -> dict[str, int]:
    """GPT-2's alphabet of byte-level BPE: a printable stand-in for each byte.

    Bytes that are printable in Latin-1 stand for themselves, the others get the characters from
    U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


SYMBOL_TO_BYTE = _byte_symbols()
BYTE_TO_SYMBOL = {byte: symbol for symbol, byte in SYMBOL_TO_BYTE.items()}


class ByteBpe:
    """Byte-level BPE by the `tokenizers` library, once with and once without the control tokens."""

    pads = False

    def __init__(self, source: str, named: Iterable[str], path: Path) -> None:
        """`source` is a tokenizer.json's text; `named` tokens are control even if it doesn't say
        so."""
        self._full = _parse(source, f"{path} can't be read as a tokenizer, download it again")
        spec = json.loads(source)
        model = spec["model"]
        if model.get("type") != "BPE" or (spec.get("decoder") or {}).get("type") != "ByteLevel":
            raise InputError(
                f"{path} is not a byte-level BPE tokenizer; that is the only kind read from a tokenizer.json"
            )
        vocab: dict[str, int] = model["vocab"]
        self.control: dict[str, int] = {
            t["content"]: t["id"] for t in spec.get("added_tokens") or ()
        }
        self.control |= {name: vocab[name] for name in named if name in vocab}

        # The guarantee, by construction: an encoder whose vocabulary doesn't contain the control
        # ids can't emit them. Leaving out the added tokens isn't enough: R1 has three control
        # tokens in the BPE's own vocabulary as well.
        banned = self.control.keys()
        ids = set(self.control.values())
        model["vocab"] = {
            token: i for token, i in vocab.items() if token not in banned and i not in ids
        }
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & banned]
        model["unk_token"] = None  # not needed: every byte has a token
        if missing := SYMBOL_TO_BYTE.keys() - model["vocab"].keys():
            raise InputError(
                f"{path} has no ordinary token for {len(missing)} of the 256 bytes, so some text could not "
                "be encoded; download it again"
            )
        spec["added_tokens"] = []
        spec["post_processor"] = (
            None  # its templates may name control tokens; we place those ourselves
        )
        self._plain = _parse(json.dumps(spec), f"{path} can't be used without its control tokens")

        self.pieces = {i: _from_symbols(token) for token, i in model["vocab"].items()}
        self.pieces |= {i: text.encode() for text, i in self.control.items()}

    def encode(self, text: str, control: bool) -> list[int]:
        ids: list[int] = (
            (self._full if control else self._plain).encode(text, add_special_tokens=False).ids
        )
        return ids


def _parse(source: str, complaint: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library has no exception class of its own
        raise InputError(f"{complaint} ({error})") from error
    tokenizer.no_truncation()  # a file may ask for a prompt to be cut or filled up silently
    tokenizer.no_padding()
    return tokenizer


def _to_symbols(token: bytes) -> str:
    return "".join(BYTE_TO_SYMBOL[byte] for byte in token)


def _from_symbols(token: str) -> bytes:
    """A token's bytes; one that isn't written in the byte alphabet stands for itself, as in the
    library."""
    try:
        return bytes(SYMBOL_TO_BYTE[symbol] for symbol in token)
    except KeyError:
        return token.encode()


# -- sentencepiece ---------------------------------------------------------------------------------


class SentencePiece:
    """A sentencepiece model. Control pieces never match text; user-defined ones do, so they are
    respelled."""

    def __init__(self, path: Path, added: dict[str, int], named: Iterable[str]) -> None:
        self._model = model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(path.read_bytes())
            texts = [model.id_to_piece(i) for i in range(model.get_piece_size())]
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{path} can't be read as a sentencepiece model; download it again"
            ) from error
        probe = model.encode("a")
        self.pads = bool(probe) and texts[probe[0]].startswith("▁")

        # The library doesn't tell user-defined pieces from normal ones, so all that look like a tag
        # count as control: at worst a normal "[x]" is spelled in bytes.
        ids = {
            text: i for i, text in enumerate(texts) if not (model.is_unknown(i) or model.is_byte(i))
        }
        self.control = {text: i for text, i in ids.items() if model.is_control(i) or _is_tag(text)}
        self.control |= added | {name: ids[name] for name in named if name in ids}
        self.pieces = {i: self._bytes_of(i, text) for i, text in enumerate(texts)}
        self.pieces |= {i: text.encode() for text, i in self.control.items()}
        self._ids = frozenset(self.control.values())
        longest_first = sorted(self.control, key=len, reverse=True)
        self._tags = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def _bytes_of(self, token: int, text: str) -> bytes:
        if self._model.is_byte(token):
            return bytes([int(text[3:-1], 16)])  # "<0x0A>"
        if self._model.is_unknown(token):
            return " \N{DOUBLE QUESTION MARK} ".encode()  # as the library prints it
        return text.replace("▁", " ").encode()

    def encode(self, text: str, control: bool) -> list[int]:
        if not control:
            return [i for token in self._model.encode(text) for i in self._spell(token)]
        ids: list[int] = []
        for part in self._tags.split(
            text
        ):  # control pieces never match in the library: cut the text at their names
            ids += [self.control[part]] if part in self.control else self._model.encode(part)
        return ids

    def _spell(self, token: int) -> list[int]:
        """The token; if it is control its text in bytes ("unknown" where the model has no byte
        pieces)."""
        if token not in self._ids:
            return [token]
        return [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in self.pieces[token]]


def _is_tag(text: str) -> bool:
    return len(text) > 2 and text[0] + text[-1] in ("<>", "[]")


# -- tiktoken --------------------------------------------------------------------------------------

# Moonlight's and Kimi's way to cut text before BPE: runs of Han, words with their contractions
# (letters but not Han), digits in threes, punctuation, line ends, spaces. `&&` intersects classes,
# in the library's regex engine as in theirs.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        _BEFORE + _UPPER + "*" + _LOWER + "+" + _AFTER,
        _BEFORE + _UPPER + "+" + _LOWER + "*" + _AFTER,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def _from_tiktoken(path: Path, added: dict[str, int]) -> str:
    """A tokenizer.json from a tiktoken.model, which has a line "<token in base64> <rank>" for each
    token.

    tiktoken merges the neighbours whose union has the lowest rank. So each way to cut a token in
    two tokens is a merge, in the order of the union's rank. A word that is a token is taken whole,
    without merging (`ignore_merges`). Moonlight's own wrapper also cuts runs of more than 25,000
    characters; we don't."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        try:
            encoded, rank = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
        except ValueError:
            raise InputError(
                f"{path} line {number} is not a base64 token and its rank; download it again"
            ) from None
    if len(set(ranks.values())) != len(ranks) or not ranks or min(ranks.values()) < 0:
        raise InputError(f"{path} has no tokens, or two of one rank; download it again")
    vocab = {_to_symbols(token): rank for token, rank in ranks.items()}
    if clash := vocab.keys() & added.keys() or set(vocab.values()) & set(added.values()):
        raise InputError(
            f"tokenizer_config.json beside {path} has an added token that is an ordinary one: {clash}"
        )
    cuts = (
        (token[:cut], token[cut:])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
    )
    merges = [
        [_to_symbols(left), _to_symbols(right)]
        for left, right in cuts
        if left in ranks and right in ranks
    ]
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": KIMI_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, **flags}
            for text, i in sorted(added.items(), key=lambda x: x[1])
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        # The added tokens are in the vocabulary too: their ids have gaps, and the library would
        # close them.
        "model": {"type": "BPE", "vocab": vocab | added, "merges": merges, "ignore_merges": True},
    }
    return json.dumps(spec)


# -- reading files ---------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({error}); download it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a {type(value).__name__}, not a JSON object; download it again"
        )
    return value


def _token_text(token: Any) -> str | None:
    """A token is written as its text, or as a dict with "content"."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _added_tokens(config: dict[str, Any], directory: Path) -> dict[str, int]:
    """Text -> id of tokenizer_config.json's `added_tokens_decoder`, which is keyed by ids as
    strings."""
    try:
        tokens = {
            _token_text(token): int(i)
            for i, token in (config.get("added_tokens_decoder") or {}).items()
        }
    except (AttributeError, ValueError):
        tokens = {None: 0}
    if None in tokens or min(tokens.values(), default=0) < 0:
        raise InputError(
            f"added_tokens_decoder of tokenizer_config.json in {directory} is not a table of id: token"
        )
    return {text: i for text, i in tokens.items() if text is not None}
