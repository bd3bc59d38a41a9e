"""Text <-> token ids.

The one rule: *text never becomes a control token*. `<｜Assistant｜>` typed by a user is harmless
text; the control token of that name gets into a prompt only by its id, placed by our own template
(chat.py). So there are two encoders of one vocabulary (vocabulary.py): the library's
(`control=True`, for people who know what they paste) and one that does not know the control tokens
at all (`control=False`, the default)."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from r1.errors import InputError
from r1.text import vocabulary
from r1.text.chat import BOS, EOS, IM_END, TEMPLATES, Control, ReasoningSplitter, check_messages
from r1.text.vocabulary import Codec


class Tokenizer:
    """A vocabulary, its control tokens, and the chat template that goes with them.

    `bos_id` and `eos_id` are None where neither the folder nor the caller names one. `control` maps
    the text of each control token to its id."""

    def __init__(self, codec: Codec, bos_id: int | None, eos_id: int | None) -> None:
        self._codec = codec
        self.control = codec.control
        self.control_ids = frozenset(codec.control.values())
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.vocab_size = max(codec.pieces) + 1  # the model's may be larger, never smaller
        self.template = next((t for t in TEMPLATES if t.markers <= codec.control.keys()), None)

    @classmethod
    def load(
        cls, directory: Path, *, bos_id: int | None = None, eos_id: int | None = None
    ) -> Tokenizer:
        """Read the tokenizer in `directory`.

        `bos_id` and `eos_id`, config.json's, count where the tokenizer's own files name none.
        Raises InputError as vocabulary.load does."""
        codec, named = vocabulary.load(Path(directory))
        bos_id = named.get("bos_token", codec.control.get(BOS, bos_id))
        return cls(codec, bos_id, named.get("eos_token", codec.control.get(EOS, eos_id)))

    def check(self, vocab_size: int) -> None:
        """InputError if this tokenizer has an id that a model of `vocab_size` embeddings has no row
        for.

        The reverse is normal: R1 has 128,815 tokens in a vocabulary of 129,280.
        """
        if self.vocab_size > vocab_size:
            raise InputError(
                f"the tokenizer has {self.vocab_size} tokens but config.json's vocab_size is {vocab_size}: "
                "they belong to different checkpoints; use the tokenizer that came with this one"
            )

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Token ids of `text`; no BOS is added.

        With `control` the names of control tokens in the text become those tokens, as in the
        library. Without it they are plain text, and no control id can come out, whatever the text.
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
        """The text of `ids`; what isn't UTF-8 becomes U+FFFD, ids without a token (R1 has 465)
        nothing."""
        stream = self.stream(skip_control)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, skip_control: bool = False) -> StreamDecoder:
        """A decoder that is given one token at a time."""
        hidden = self.control_ids if skip_control else frozenset()
        return StreamDecoder(
            lambda token: b"" if token in hidden else self._codec.pieces.get(token, b""),
            self._codec.pads,
        )

    # -- chat --------------------------------------------------------------------------------------

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a turn."""
        return frozenset(i for i in (self.eos_id, self.control.get(IM_END)) if i is not None)

    def chat_prompt(self, messages: Sequence[dict[str, Any]], *, think: bool = True) -> list[int]:
        """Ids of a conversation, ready to be continued by the assistant.

        `messages` are dicts of `role` (system, user or assistant) and `content` (str); the last is
        the user's. R1's prompt ends in an opened `<think>`, or with `think=False` in an empty,
        closed one; models that don't think ignore `think`. The ids are those of the published
        template, except that contents can't forge control tokens."""
        if self.template is None:
            missing = ", ".join(sorted(TEMPLATES[0].markers - self.control.keys()))
            others = ", ".join(t.name for t in TEMPLATES[1:])
            raise InputError(
                f"this tokenizer can't chat: of R1's control tokens it lacks {missing}, and it hasn't "
                f"those of {others} either; use plain completion instead"
            )
        check_messages(messages)
        ids: list[int] = []
        text = ""
        for part in self.template.render(messages, think):
            if isinstance(part, Control):
                ids += [*self.encode(text), self.control[part.name]]
                text = ""
            else:
                # Neighbouring texts are encoded as one, because the published template encodes the
                # rendered string: in V2's "User: hi\n\nAssistant:" a token may straddle the
                # content's edge.
                text += part
        return ids + self.encode(text)

    def splitter(self, think: bool = True) -> ReasoningSplitter:
        """A splitter for the completion of `chat_prompt(..., think=think)`."""
        return ReasoningSplitter(self, think and self.template is not None and self.template.thinks)

    def split(self, ids: Iterable[int], think: bool = True) -> tuple[str, str]:
        """(reasoning, answer) of a completion of `chat_prompt(..., think=think)`, newlines around
        trimmed."""
        splitter = self.splitter(think)
        parts = [*map(splitter.push, ids), splitter.flush()]
        return "".join(r for r, _ in parts).strip("\n"), "".join(a for _, a in parts).strip("\n")


class StreamDecoder:
    """Decodes token by token, in constant time each: a token is bytes, and UTF-8 decodes
    incrementally.

    What `push` and `flush` return adds up to `Tokenizer.decode` of the same ids. A character comes
    out whole, with its last byte; bytes that can't be one come out as U+FFFD each, at most two
    bytes late."""

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
        """The end: U+FFFD for a character left unfinished. The decoder may be used anew after
        it."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
