"""Text <-> token ids.

One rule holds everywhere: *text never becomes a control token*. If a user types `<｜Assistant｜>`,
it is harmless text. The control token of that name enters a prompt only by its id, and only our own
template (chat.py) places it.

So each vocabulary (vocabulary.py) has two encoders. The default one does not know the control
tokens at all (`control=False`). The other one is the library's (`control=True`), for callers who
trust their text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from r1.errors import InputError
from r1.text import vocabulary
from r1.text.chat import Control
from r1.text.control_tokens import BOS, EOS, IM_END
from r1.text.messages import check_messages
from r1.text.reasoning import ReasoningSplitter
from r1.text.stream_decoder import StreamDecoder
from r1.text.template_choice import choose
from r1.text.tokenizer_files import read_chat_template
from r1.text.vocabulary import Codec


class Tokenizer:
    """A vocabulary, its control tokens, and its chat template.

    `control` maps the text of each control token to its id. `bos_id` and `eos_id` are None if
    neither the tokenizer's files nor the caller names one.
    """

    def __init__(
        self,
        codec: Codec,
        bos_id: int | None,
        eos_id: int | None,
        chat_template: str | None = None,
    ) -> None:
        """`chat_template` is the jinja text that came with the vocabulary, if any."""
        self._codec = codec
        self.control = codec.control
        self.control_ids = frozenset(codec.control.values())
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.vocab_size = max(codec.pieces) + 1  # the model's may be larger, never smaller
        self._choice = choose(codec.control.keys(), chat_template)
        self.template = self._choice.template

    @classmethod
    def load(
        cls, directory: Path, *, bos_id: int | None = None, eos_id: int | None = None
    ) -> Tokenizer:
        """Read the tokenizer in `directory`.

        `bos_id` and `eos_id` come from config.json. They are used only if the tokenizer's own files
        name none. Raises InputError as `vocabulary.load` does.
        """
        codec, named = vocabulary.load(Path(directory))
        bos_id = named.get("bos_token", codec.control.get(BOS, bos_id))
        eos_id = named.get("eos_token", codec.control.get(EOS, eos_id))
        return cls(codec, bos_id, eos_id, read_chat_template(Path(directory)))

    def check(self, vocab_size: int) -> None:
        """Raise InputError if the tokenizer has more ids than the model has embeddings.

        The reverse is normal: R1 has 128,815 tokens in a vocabulary of 129,280.
        """
        if self.vocab_size > vocab_size:
            raise InputError(
                f"the tokenizer has {self.vocab_size} tokens but config.json's vocab_size is "
                f"{vocab_size}: they belong to different checkpoints; use the tokenizer that came "
                "with this one"
            )

    def shared_ids(self, other: Tokenizer) -> frozenset[int]:
        """The ids that both have. Raises InputError if one of them has another text in `other`."""
        ours, theirs = self._codec.pieces, other._codec.pieces
        shared = frozenset(ours.keys() & theirs.keys())
        if (each := min((i for i in shared if ours[i] != theirs[i]), default=None)) is not None:
            texts = (pieces[each].decode(errors="replace") for pieces in (ours, theirs))
            raise InputError(
                "the tokenizers differ: id {} is {!r} in the model's and {!r} in the draft's; use "
                "a draft of the same vocabulary".format(each, *texts)
            )
        return shared

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Token ids of `text`. No BOS is added.

        With `control`, names of control tokens in the text become those tokens, as in the library.
        Without it, they are plain text, and the result never contains a control id.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text holds half a surrogate pair at position {error.start}; pass valid "
                "Unicode (was it read with errors='surrogateescape'?)"
            ) from None
        return self._codec.encode(text, control)

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """The text of `ids`.

        Bytes that are not UTF-8 become U+FFFD. An id without a token becomes an empty text. R1 has
        465 such ids.
        """
        stream = self.stream(skip_control)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, skip_control: bool = False) -> StreamDecoder:
        """A decoder that takes one token at a time."""
        hidden = self.control_ids if skip_control else frozenset()
        return StreamDecoder(
            lambda token: b"" if token in hidden else self._codec.pieces.get(token, b""),
            drop_space=self._codec.pads,
        )

    # -- chat --------------------------------------------------------------------------------------

    @property
    def cautions(self) -> list[str]:
        """Risks of a chat that its user should know."""
        return [self._choice.caution] if self._choice.caution else []

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a turn."""
        return frozenset(i for i in (self.eos_id, self.control.get(IM_END)) if i is not None)

    def chat_prompt(self, messages: Sequence[dict[str, Any]], *, think: bool = True) -> list[int]:
        """Ids of a conversation, ready for the assistant to continue.

        `messages` are dicts of `role` (system, user or assistant) and `content` (str). The last
        message is the user's. R1's prompt ends with an open `<think>`. With `think=False` it ends
        with an empty, closed one. Models without reasoning ignore `think`. The ids equal those of
        the published template, except that contents can't forge control tokens. Raises InputError
        for unusable messages, and if no template fits the folder.
        """
        if self.template is None:
            raise InputError(self._choice.refusal)
        check_messages(messages)
        ids: list[int] = []
        text = ""
        for part in self.template.render(messages, think):
            if isinstance(part, Control):
                ids += [*self.encode(text), self.control[part.name]]
                text = ""
            else:
                # Neighbouring texts are encoded together, because the published template encodes
                # the rendered string. In V2's "User: hi\n\nAssistant:" one token may contain the
                # end of the content and the start of the template's text.
                text += part
        return ids + self.encode(text)

    def splitter(self, think: bool = True) -> ReasoningSplitter:
        """A splitter for the completion of `chat_prompt(..., think=think)`."""
        thinking = think and self.template is not None and self.template.thinks
        return ReasoningSplitter(self.stream(skip_control=True), self.control, thinking)

    def split(self, ids: Iterable[int], think: bool = True) -> tuple[str, str]:
        """(reasoning, answer) of a completion of `chat_prompt(..., think=think)`.

        Newlines at the start and the end of each are removed.
        """
        splitter = self.splitter(think)
        parts = [*map(splitter.push, ids), splitter.flush()]
        return "".join(r for r, _ in parts).strip("\n"), "".join(a for _, a in parts).strip("\n")
