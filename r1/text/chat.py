"""The published chat templates: how a conversation is written for the model.

A template puts control tokens around the contents of the messages. It gives control tokens by name,
separately from text, so that contents can't forge them. r1 never runs the jinja template of a
checkpoint: it chooses one of TEMPLATES by the control tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from r1.errors import InputError
from r1.text.control_tokens import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    IM_ASSISTANT,
    IM_END,
    IM_MIDDLE,
    IM_SYSTEM,
    IM_USER,
    PAD,
    THINK,
    USER,
)


@dataclass(frozen=True)
class Control:
    """A control token in a rendered conversation. A plain `str` beside it is text."""

    name: str


Rendered = list["Control | str"]


@dataclass(frozen=True)
class Template:
    """A published chat template, and the control tokens that identify its vocabulary."""

    name: str
    markers: frozenset[str]
    render: Callable[[Sequence[dict[str, Any]], bool], Rendered]
    """(messages, think) -> the conversation, ready for the assistant to continue."""
    thinks: bool = False
    """Whether the assistant's text starts inside the reasoning."""


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """Raise an InputError that names the first unusable message."""
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
    last = messages[-1]["role"]
    if last != "user":
        raise InputError(
            f"message {len(messages) - 1}, the last, is the {last}'s; end with the user's"
        )


def _render_v3(messages: Sequence[dict[str, Any]], think: bool) -> Rendered:
    """DeepSeek-V3: first all system texts of the conversation, then the turns."""
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
    """DeepSeek-R1: V3's template, without earlier reasoning and with a start for the new reasoning.

    If `think` is true, the prompt ends with "<think>\\n". DeepSeek recommend this. Otherwise the
    model sometimes writes an empty block and skips the reasoning. If `think` is false, the prompt
    ends with such an empty block.
    """
    without_reasoning = [
        {**m, "content": m["content"].split(END_THINK)[-1]} if m["role"] == "assistant" else m
        for m in messages
    ]
    start: Rendered = (
        [Control(THINK), "\n"] if think else [Control(THINK), "\n\n", Control(END_THINK), "\n\n"]
    )
    return _render_v3(without_reasoning, think) + start


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
    """Moonlight: for each message a role marker, the role's name, and the content.

    There is no BOS. If the first message is not a system message, a default one is added.
    """
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant"}, *messages]
    marker = {"system": IM_SYSTEM, "user": IM_USER, "assistant": IM_ASSISTANT}
    parts: Rendered = []
    for message in messages:
        role = message["role"]
        parts += [Control(marker[role]), role, Control(IM_MIDDLE)]
        parts += [message["content"], Control(IM_END)]
    return [*parts, Control(IM_ASSISTANT), "assistant", Control(IM_MIDDLE)]


R1_MARKERS = frozenset({BOS, EOS, USER, ASSISTANT, THINK, END_THINK})
V3_MARKERS = frozenset({BOS, EOS, PAD, USER, ASSISTANT})
V2_MARKERS = frozenset({BOS, EOS})
MOONLIGHT_MARKERS = frozenset({IM_SYSTEM, IM_USER, IM_ASSISTANT, IM_MIDDLE, IM_END})

TEMPLATES = (
    Template("R1", R1_MARKERS, _render_r1, thinks=True),
    Template("V3", V3_MARKERS, _render_v3),
    Template("V2", V2_MARKERS, _render_v2),
    Template("Moonlight", MOONLIGHT_MARKERS, _render_moonlight),
)
"""The first template whose markers are all in the vocabulary is used."""
