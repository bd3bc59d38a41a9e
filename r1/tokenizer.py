"""Text <-> token ids, and the chat template that wraps a conversation in control tokens.

The one rule: *text never becomes a control token*. `<｜Assistant｜>` typed by a user is harmless text; the
control token of that name gets into a prompt only by its id, placed by our own template. So there are
two encoders of one vocabulary: the library's (`control=True`, for people who know what they paste) and
one that does not know the control tokens at all (`control=False`, the default).

Three file formats are read, in this order: `tokenizer.json` (DeepSeek), `tokenizer.model`
(sentencepiece) and `tiktoken.model` (Moonlight, Kimi). Only these fixed names in the folder are opened,
and nothing in them is executed: a checkpoint's jinja template is ignored in favour of the table at the
end of this file.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from r1.errors import InputError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
PAD = "<｜▁pad▁｜>"  # new in V3's vocabulary: it tells V3 and R1 from V2, which shares the names above
IM_SYSTEM, IM_USER, IM_ASSISTANT = "<|im_system|>", "<|im_user|>", "<|im_assistant|>"
IM_MIDDLE, IM_END = "<|im_middle|>", "<|im_end|>"


class Tokenizer:
    """A vocabulary, its control tokens, and the chat template that goes with them.

    `bos_id` and `eos_id` are None where neither the folder nor the caller names one. `control` maps the
    text of each control token to its id.
    """

    def __init__(self, codec: Codec, bos_id: int | None, eos_id: int | None) -> None:
        self._codec = codec
        self.control = codec.control
        self.control_ids = frozenset(codec.control.values())
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.vocab_size = codec.size  # largest id + 1; the model's may be larger, never smaller
        self.template = next((t for t in TEMPLATES if t.markers <= codec.control.keys()), None)

    @classmethod
    def load(cls, directory: Path, *, bos_id: int | None = None, eos_id: int | None = None) -> Tokenizer:
        """Read the tokenizer in `directory`.

        `bos_id` and `eos_id`, config.json's, count where the tokenizer's own files name none.

        Raises InputError if there is no tokenizer, or one that can't be read, or of a kind that we don't
        know.
        """
        directory = Path(directory)
        config = _read_json(directory / "tokenizer_config.json") or {}
        special = _read_json(directory / "special_tokens_map.json") or {}
        names = {key: _token_text(config.get(key)) or _token_text(special.get(key)) for key in ("bos_token", "eos_token")}
        named = [name for name in names.values() if name]

        codec: Codec
        if (path := directory / "tokenizer.json").is_file():
            codec = ByteBpe(_read_text(path), named, path)
        elif (path := directory / "tokenizer.model").is_file():
            codec = SentencePiece(path, _added_tokens(config, directory), named)
        elif (path := directory / "tiktoken.model").is_file():
            codec = ByteBpe(_from_tiktoken(path, _added_tokens(config, directory)), named, path)
        else:
            raise InputError(
                f"{directory} holds no tokenizer.json, tokenizer.model or tiktoken.model; "
                "copy the one that came with the checkpoint there"
            )

        def find(key: str, usual: str, given: int | None) -> int | None:
            name = names[key]
            if name is None:
                return codec.control.get(usual, given)
            if name not in codec.control:
                raise InputError(
                    f"tokenizer_config.json in {directory} names {key} {name!r}, which {path.name} lacks; download both again"
                )
            return codec.control[name]

        return cls(codec, find("bos_token", BOS, bos_id), find("eos_token", EOS, eos_id))

    def check(self, vocab_size: int) -> None:
        """InputError if this tokenizer has an id that a model of `vocab_size` embeddings has no row for.

        The reverse is normal: R1 has 128,815 tokens in a vocabulary of 129,280.
        """
        if self.vocab_size > vocab_size:
            raise InputError(
                f"the tokenizer has {self.vocab_size} tokens but config.json's vocab_size is {vocab_size}: "
                "they belong to different checkpoints; use the tokenizer that came with this one"
            )

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Token ids of `text`; no BOS is added.

        With `control` the names of control tokens in the text become those tokens, as in the library.
        Without it they are plain text, and no control id can come out, whatever the text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text holds half a surrogate pair at position {error.start}; pass valid Unicode "
                "(was it read with errors='surrogateescape'?)"
            ) from None
        return self._codec.encode(text, control)

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """The text of `ids`; what isn't UTF-8 becomes U+FFFD, ids without a token (R1 has 465) nothing."""
        stream = self.stream(skip_control)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, skip_control: bool = False) -> StreamDecoder:
        """A decoder that is given one token at a time."""
        hidden = self.control_ids if skip_control else frozenset()
        return StreamDecoder(lambda token: b"" if token in hidden else self._codec.piece(token), self._codec.pads)

    # -- chat --------------------------------------------------------------------------------------

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a turn."""
        return frozenset(i for i in (self.eos_id, self.control.get(IM_END)) if i is not None)

    def chat_prompt(self, messages: Sequence[dict[str, Any]], *, think: bool = True) -> list[int]:
        """Ids of a conversation, ready to be continued by the assistant.

        `messages` are dicts of `role` (system, user or assistant) and `content` (str); the last is the
        user's. R1's prompt ends in an opened `<think>`, or with `think=False` in an empty, closed one;
        models that don't think ignore `think`. The ids are those of the published template, except that
        contents can't forge control tokens.
        """
        if self.template is None:
            missing = ", ".join(sorted(TEMPLATES[0].markers - self.control.keys()))
            others = ", ".join(t.name for t in TEMPLATES[1:])
            raise InputError(
                f"this tokenizer can't chat: of R1's control tokens it lacks {missing}, and it hasn't "
                f"those of {others} either; use plain completion instead"
            )
        _check_messages(messages)
        ids: list[int] = []
        text = ""
        for part in self.template.render(messages, think):
            if isinstance(part, Control):
                ids += [*self.encode(text), self.control[part.name]]
                text = ""
            else:
                # Neighbouring texts are encoded as one, because the published template encodes the
                # rendered string: in V2's "User: hi\n\nAssistant:" a token may straddle the content's
                # edge.
                text += part
        return ids + self.encode(text)

    def splitter(self, think: bool = True) -> ReasoningSplitter:
        """A splitter for the completion of `chat_prompt(..., think=think)`."""
        return ReasoningSplitter(self, think and self.template is not None and self.template.thinks)

    def split(self, ids: Iterable[int], think: bool = True) -> tuple[str, str]:
        """(reasoning, answer) of a completion of `chat_prompt(..., think=think)`, newlines around trimmed."""
        splitter = self.splitter(think)
        parts = [*map(splitter.push, ids), splitter.flush()]
        return "".join(r for r, _ in parts).strip("\n"), "".join(a for _, a in parts).strip("\n")


class StreamDecoder:
    """Decodes token by token, in constant time each: a token is bytes, and UTF-8 decodes incrementally.

    What `push` and `flush` return adds up to `Tokenizer.decode` of the same ids. A character comes out
    whole, with its last byte; bytes that can't be one come out as U+FFFD each, at most two bytes late.
    """

    def __init__(self, piece: Callable[[int], bytes], pads: bool) -> None:
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = pads

    def push(self, token: int) -> str:
        """The text that `token` completes, often but not always its own."""
        data = self._piece(token)
        if self._drop_space and data:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The end: U+FFFD for a character left unfinished. The decoder may be used anew after it."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class ReasoningSplitter:
    """Sorts a completion into reasoning and answer while it streams.

    The control tokens `<think>` and `</think>` switch sides, not their text: a model that quotes
    "</think>" in ordinary pieces goes on reasoning. Only where the vocabulary has no such token does the
    text count. Control tokens are not part of either side. Stopped before the end of thinking, all is
    reasoning.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool) -> None:
        self.thinking = thinking
        self._open = tokenizer.control.get(THINK)
        self._close = tokenizer.control.get(END_THINK)
        self._stream = tokenizer.stream(skip_control=True)
        self._held = ""  # text that may turn out to be the start of "</think>"

    def push(self, token: int) -> tuple[str, str]:
        """(reasoning, answer): the text that this token adds to each."""
        if token in (self._open, self._close):
            ended = self.flush()
            self.thinking = token == self._open
            return ended
        return self._sort(self._stream.push(token))

    def flush(self) -> tuple[str, str]:
        """What is left when the completion has ended."""
        reasoning, answer = self._sort(self._stream.flush())
        held, self._held = self._held, ""
        return reasoning + held, answer

    def _sort(self, text: str) -> tuple[str, str]:
        if not self.thinking:
            return "", text
        if self._close is not None:
            return text, ""
        reasoning, marker, answer = (self._held + text).partition(END_THINK)
        if marker:
            self.thinking, self._held = False, ""
            return reasoning, answer
        keep = next((n for n in range(len(END_THINK) - 1, 0, -1) if reasoning.endswith(END_THINK[:n])), 0)
        cut = len(reasoning) - keep
        self._held = reasoning[cut:]
        return reasoning[:cut], ""


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a completion's text whose prompt opened `<think>`, newlines around trimmed.

    For text that you have from elsewhere; where you have the ids, `Tokenizer.split` can't be fooled by a
    quoted tag.
    """
    reasoning, _, answer = text.partition(END_THINK)
    return reasoning.removeprefix(THINK).strip("\n"), answer.strip("\n")


# -- codecs: what a file format must offer ---------------------------------------------------------


class Codec(Protocol):
    control: dict[str, int]
    size: int
    pads: bool  # text gets a space in front before it is encoded, to be dropped on decoding

    def encode(self, text: str, control: bool) -> list[int]: ...

    def piece(self, token: int) -> bytes: ...


def _byte_symbols() -> dict[str, int]:
    """GPT-2's alphabet of byte-level BPE: a printable stand-in for each byte.

    Bytes that are printable in Latin-1 stand for themselves, the others get the characters from U+0100
    on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in sorted(printable)} | {chr(0x100 + i): b for i, b in enumerate(others)}


SYMBOL_TO_BYTE = _byte_symbols()
BYTE_TO_SYMBOL = {byte: symbol for symbol, byte in SYMBOL_TO_BYTE.items()}


class ByteBpe:
    """Byte-level BPE by the `tokenizers` library, once with and once without the control tokens."""

    pads = False

    def __init__(self, source: str, named: Iterable[str], path: Path) -> None:
        """`source` is a tokenizer.json's text; `named` tokens are control even if it doesn't say so."""
        try:
            self._full = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library has no exception class of its own
            raise InputError(f"{path} can't be read as a tokenizer ({error}); download it again") from error
        spec = json.loads(source)
        model = spec["model"]
        if model.get("type") != "BPE" or (spec.get("decoder") or {}).get("type") != "ByteLevel":
            raise InputError(f"{path} is not a byte-level BPE tokenizer; that is the only kind read from a tokenizer.json")
        vocab: dict[str, int] = model["vocab"]
        self.control: dict[str, int] = {t["content"]: t["id"] for t in spec.get("added_tokens") or ()}
        self.control |= {name: vocab[name] for name in named if name in vocab}

        # The guarantee, by construction: an encoder whose vocabulary doesn't contain the control ids
        # can't emit them. Leaving out the added tokens isn't enough: R1 has three control tokens in the
        # BPE's own vocabulary as well.
        banned = self.control.keys()
        ids = set(self.control.values())
        model["vocab"] = {token: i for token, i in vocab.items() if token not in banned and i not in ids}
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & banned]
        model["unk_token"] = None  # not needed: every byte has a token
        if missing := SYMBOL_TO_BYTE.keys() - model["vocab"].keys():
            raise InputError(
                f"{path} has no ordinary token for {len(missing)} of the 256 bytes, so some text could not "
                "be encoded; download it again"
            )
        spec["added_tokens"] = []
        spec["post_processor"] = None  # its templates may name control tokens; we place those ourselves
        try:
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:
            raise InputError(f"{path} can't be used without its control tokens ({error})") from error
        for tokenizer in (
            self._full,
            self._plain,
        ):  # a file may ask for a prompt to be cut or filled up silently
            tokenizer.no_truncation()
            tokenizer.no_padding()

        self._pieces = {i: _from_symbols(token) for token, i in model["vocab"].items()}
        self._pieces |= {i: text.encode() for text, i in self.control.items()}
        self.size = max(self._pieces) + 1

    def encode(self, text: str, control: bool) -> list[int]:
        ids: list[int] = (self._full if control else self._plain).encode(text, add_special_tokens=False).ids
        return ids

    def piece(self, token: int) -> bytes:
        return self._pieces.get(token, b"")


def _to_symbols(token: bytes) -> str:
    return "".join(BYTE_TO_SYMBOL[byte] for byte in token)


def _from_symbols(token: str) -> bytes:
    """A token's bytes; one that isn't written in the byte alphabet stands for itself, as in the library."""
    try:
        return bytes(SYMBOL_TO_BYTE[symbol] for symbol in token)
    except KeyError:
        return token.encode()


class SentencePiece:
    """A sentencepiece model. Control pieces never match text; user-defined ones do, so they are respelled."""

    def __init__(self, path: Path, added: dict[str, int], named: Iterable[str]) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(path.read_bytes())
            self._model.get_piece_size()
        except (OSError, RuntimeError) as error:
            raise InputError(f"{path} can't be read as a sentencepiece model; download it again") from error
        model = self._model
        texts = [model.id_to_piece(i) for i in range(model.get_piece_size())]
        probe = model.encode("a")
        self.pads = bool(probe) and texts[probe[0]].startswith("▁")
        self._pieces = {i: self._bytes_of(i, text) for i, text in enumerate(texts)}

        # The library doesn't tell user-defined pieces from normal ones, so all that look like a tag count
        # as control: at worst a normal "[x]" is spelled in bytes.
        texts_to_ids = {t: i for i, t in enumerate(texts) if not (model.is_unknown(i) or model.is_byte(i))}
        self.control = {t: i for t, i in texts_to_ids.items() if model.is_control(i) or _is_tag(t)}
        self.control |= added | {name: texts_to_ids[name] for name in named if name in texts_to_ids}
        self._pieces |= {i: text.encode() for text, i in self.control.items()}
        self._ids = frozenset(self.control.values())
        self.size = max(self._pieces) + 1
        self._tags = sorted(self.control, key=len, reverse=True)

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
        while text:  # control pieces never match in the library: cut the text at their names
            at, tag = min(((text.find(t), t) for t in self._tags if t in text), default=(len(text), ""))
            if at:
                ids += self._model.encode(text[:at])
            if tag:
                ids.append(self.control[tag])
            text = text[at + len(tag) :]
        return ids

    def _spell(self, token: int) -> list[int]:
        """The token; if it is control its text in bytes ("unknown" where the model has no byte pieces)."""
        if token not in self._ids:
            return [token]
        return [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in self._pieces[token]]

    def piece(self, token: int) -> bytes:
        return self._pieces.get(token, b"")


def _is_tag(text: str) -> bool:
    return len(text) > 2 and text[0] + text[-1] in ("<>", "[]")


# Moonlight's and Kimi's way to cut text before BPE: runs of Han, words with their contractions (letters
# but not Han), digits in threes, punctuation, line ends, spaces. `&&` intersects classes, in the
# library's regex engine as in theirs.
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
    """A tokenizer.json from a tiktoken.model, which has a line "<token in base64> <rank>" for each token.

    tiktoken merges the neighbours whose union has the lowest rank. So each way to cut a token in two
    tokens is a merge, in the order of the union's rank. A word that is a token is taken whole, without
    merging (`ignore_merges`). Moonlight's own wrapper also cuts runs of more than 25,000 characters; we
    don't.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        try:
            encoded, rank = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{path} line {number} is not a base64 token and its rank; download it again") from None
    if len(set(ranks.values())) != len(ranks) or not ranks or min(ranks.values()) < 0:
        raise InputError(f"{path} has no tokens, or two of one rank; download it again")
    vocab = {_to_symbols(token): rank for token, rank in ranks.items()}
    if clash := vocab.keys() & added.keys() or set(vocab.values()) & set(added.values()):
        raise InputError(f"tokenizer_config.json beside {path} has an added token that is an ordinary one: {clash}")
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(1, len(token)):
            if token[:cut] in ranks and token[cut:] in ranks:
                merges.append([_to_symbols(token[:cut]), _to_symbols(token[cut:])])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": KIMI_PATTERN}, "behavior": "Isolated", "invert": False}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **flags} for text, i in sorted(added.items(), key=lambda x: x[1])],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        # The added tokens are in the vocabulary too: their ids have gaps, and the library would close them.
        "model": {"type": "BPE", "vocab": vocab | added, "merges": merges, "ignore_merges": True},
    }
    return json.dumps(spec)


# -- reading files ---------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({error}); download it again") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a JSON object; download it again")
    return value


def _token_text(token: Any) -> str | None:
    """A token is written as its text, or as a dict with "content"."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _added_tokens(config: dict[str, Any], directory: Path) -> dict[str, int]:
    """Text -> id of tokenizer_config.json's `added_tokens_decoder`, which is keyed by ids as strings."""
    added = config.get("added_tokens_decoder") or {}
    try:
        tokens = {_token_text(token): int(i) for i, token in added.items()}
    except (AttributeError, ValueError):
        tokens = {None: 0}
    if None in tokens or min(tokens.values(), default=0) < 0:
        raise InputError(f"added_tokens_decoder of tokenizer_config.json in {directory} is not a table of id: token")
    return {text: i for text, i in tokens.items() if text is not None}


# -- chat templates --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Control:
    """A control token in a rendered conversation; a plain `str` beside it is text."""

    name: str


Rendered = list["Control | str"]


@dataclass(frozen=True)
class Template:
    """A published chat template, and the control tokens by which its tokenizer is known."""

    name: str
    markers: frozenset[str]
    render: Callable[[Sequence[dict[str, Any]], bool], Rendered]
    thinks: bool = False


def _check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """InputError that names the message that can't be used."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InputError("the conversation must be a list of at least one message, {'role': ..., 'content': ...}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"message {i} is a {type(message).__name__}, not a dict of role and content")
        if message.get("role") not in ("system", "user", "assistant"):
            raise InputError(f"message {i} has role {message.get('role')!r}; use system, user or assistant")
        if not isinstance(message.get("content"), str):
            kind = type(message.get("content")).__name__
            raise InputError(f"message {i} ({message['role']}) has content of type {kind}; use a str")
    if messages[-1]["role"] != "user":
        raise InputError(f"message {len(messages) - 1}, the last, is the {messages[-1]['role']}'s; end with the user's")


def _render_v3(messages: Sequence[dict[str, Any]], think: bool) -> Rendered:
    """System texts first, wherever they stand, then the turns."""
    parts: Rendered = [Control(BOS), "\n\n".join(m["content"] for m in messages if m["role"] == "system")]
    for message in messages:
        if message["role"] == "user":
            parts += [Control(USER), message["content"]]
        elif message["role"] == "assistant":
            parts += [Control(ASSISTANT), message["content"], Control(EOS)]
    return [*parts, Control(ASSISTANT)]


def _render_r1(messages: Sequence[dict[str, Any]], think: bool) -> Rendered:
    """V3's, but earlier reasoning is dropped and the answer starts inside `<think>` or, if not to think,
    behind it.

    DeepSeek advise to enforce "<think>\\n", as the model otherwise skips thinking with an empty block
    now and then; writing this empty block ourselves is how it is told not to think.
    """
    spoken = [{**m, "content": m["content"].split(END_THINK)[-1]} if m["role"] == "assistant" else m for m in messages]
    opened: Rendered = [Control(THINK), "\n"] if think else [Control(THINK), "\n\n", Control(END_THINK), "\n\n"]
    return _render_v3(spoken, think) + opened


def _render_v2(messages: Sequence[dict[str, Any]], think: bool) -> Rendered:
    """DeepSeek-V2-Lite-Chat: the roles are plain words."""
    parts: Rendered = [Control(BOS)]
    for message in messages:
        if message["role"] == "user":
            parts.append(f"User: {message['content']}\n\n")
        elif message["role"] == "assistant":
            parts += [f"Assistant: {message['content']}", Control(EOS)]
        else:
            parts.append(f"{message['content']}\n\n")
    return [*parts, "Assistant:"]


def _render_moonlight(messages: Sequence[dict[str, Any]], think: bool) -> Rendered:
    """Moonlight: role marker, role name, content; no BOS; a default system text if there is none first."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant"}, *messages]
    marker = {"system": IM_SYSTEM, "user": IM_USER, "assistant": IM_ASSISTANT}
    parts: Rendered = []
    for m in messages:
        parts += [Control(marker[m["role"]]), m["role"], Control(IM_MIDDLE), m["content"], Control(IM_END)]
    return [*parts, Control(IM_ASSISTANT), "assistant", Control(IM_MIDDLE)]


TEMPLATES = (  # the first whose markers are all there
    Template("R1", frozenset({BOS, EOS, USER, ASSISTANT, THINK, END_THINK}), _render_r1, thinks=True),
    Template("V3", frozenset({BOS, EOS, PAD, USER, ASSISTANT}), _render_v3),
    Template("V2", frozenset({BOS, EOS}), _render_v2),
    Template("Moonlight", frozenset({IM_SYSTEM, IM_USER, IM_ASSISTANT, IM_MIDDLE, IM_END}), _render_moonlight),
)
