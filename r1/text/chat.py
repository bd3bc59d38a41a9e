"""A conversation as the model sees it: the published chat templates, and what is reasoning in the
answer.

A template puts control tokens around the contents, by name, so that contents can't forge them. A
checkpoint's jinja template is never run: its vocabulary tells which of the TEMPLATES below is its
own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r1.errors import InputError

if TYPE_CHECKING:
    from r1.text.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
# new in V3's vocabulary: it tells V3 and R1 from V2, which shares the names above
PAD = "<｜▁pad▁｜>"
IM_SYSTEM, IM_USER, IM_ASSISTANT = "<|im_system|>", "<|im_user|>", "<|im_assistant|>"
IM_MIDDLE, IM_END = "<|im_middle|>", "<|im_end|>"


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


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """InputError that names the message that can't be used."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InputError(
            "the conversation must be a list of at least one message, {'role': ..., 'content': ...}"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(
                f"message {i} is a {type(message).__name__}, not a dict of role and content"
            )
        if message.get("role") not in ("system", "user", "assistant"):
            raise InputError(
                f"message {i} has role {message.get('role')!r}; use system, user or assistant"
            )
        if not isinstance(message.get("content"), str):
            kind = type(message.get("content")).__name__
            raise InputError(
                f"message {i} ({message['role']}) has content of type {kind}; use a str"
            )
    if messages[-1]["role"] != "user":
        raise InputError(
            f"message {len(messages) - 1}, the last, is the {messages[-1]['role']}'s; end with the user's"
        )


def _render_v3(messages: Sequence[dict[str, Any]], think: bool) -> Rendered:
    """System texts first, wherever they stand, then the turns."""
    parts: Rendered = [
        Control(BOS),
        "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
    ]
    for message in messages:
        if message["role"] == "user":
            parts += [Control(USER), message["content"]]
        elif message["role"] == "assistant":
            parts += [Control(ASSISTANT), message["content"], Control(EOS)]
    return [*parts, Control(ASSISTANT)]


def _render_r1(messages: Sequence[dict[str, Any]], think: bool) -> Rendered:
    """V3's, but earlier reasoning is dropped and the answer starts inside `<think>` or, if not to
    think, behind it.

    DeepSeek advise to enforce "<think>\\n", as the model otherwise skips thinking with an empty
    block now and then; writing this empty block ourselves is how it is told not to think."""
    spoken = [
        {**m, "content": m["content"].split(END_THINK)[-1]} if m["role"] == "assistant" else m
        for m in messages
    ]
    opened: Rendered = (
        [Control(THINK), "\n"] if think else [Control(THINK), "\n\n", Control(END_THINK), "\n\n"]
    )
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
    """Moonlight: role marker, role name, content; no BOS; a default system text if there is none
    first."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant"}, *messages]
    marker = {"system": IM_SYSTEM, "user": IM_USER, "assistant": IM_ASSISTANT}
    parts: Rendered = []
    for m in messages:
        parts += [
            Control(marker[m["role"]]),
            m["role"],
            Control(IM_MIDDLE),
            m["content"],
            Control(IM_END),
        ]
    return [*parts, Control(IM_ASSISTANT), "assistant", Control(IM_MIDDLE)]


TEMPLATES = (  # the first whose markers are all there
    Template(
        "R1", frozenset({BOS, EOS, USER, ASSISTANT, THINK, END_THINK}), _render_r1, thinks=True
    ),
    Template("V3", frozenset({BOS, EOS, PAD, USER, ASSISTANT}), _render_v3),
    Template("V2", frozenset({BOS, EOS}), _render_v2),
    Template(
        "Moonlight",
        frozenset({IM_SYSTEM, IM_USER, IM_ASSISTANT, IM_MIDDLE, IM_END}),
        _render_moonlight,
    ),
)


class ReasoningSplitter:
    """Sorts a completion into reasoning and answer while it streams.

    The control tokens `<think>` and `</think>` switch sides, not their text: a model that quotes
    "</think>" in ordinary pieces goes on reasoning. Only where the vocabulary has no such token
    does the text count. Control tokens are not part of either side. Stopped before the end of
    thinking, all is reasoning."""

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
        keep = next(
            (n for n in range(len(END_THINK) - 1, 0, -1) if reasoning.endswith(END_THINK[:n])), 0
        )
        cut = len(reasoning) - keep
        self._held = reasoning[cut:]
        return reasoning[:cut], ""
