"""The published chat templates: how a conversation is written for the model.

A template puts control tokens around the contents of the messages. It gives control tokens by name,
separately from text, so that contents can't forge them. r1 never runs the jinja template of a
checkpoint. template_choice.py reads it as text, and chooses the template here that equals it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from r1.text.control_tokens import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    GLM_ASSISTANT,
    GLM_SYSTEM,
    GLM_USER,
    GMASK,
    IM_ASSISTANT,
    IM_END,
    IM_MIDDLE,
    IM_SYSTEM,
    IM_USER,
    PAD,
    SEARCH_BEGIN,
    SOP,
    THINK,
    TOOL_SEP,
    USER,
)

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Control:
    """A control token in a rendered conversation. A plain `str` beside it is text."""

    name: str


Rendered = list["Control | str"]


@dataclass(frozen=True)
class Template:
    """A published chat template, and the control tokens of the vocabularies that it fits."""

    name: str
    markers: frozenset[str]
    render: Callable[[Messages, bool], Rendered]
    """(messages, think) -> the conversation, ready for the assistant to continue."""
    thinks: bool = False
    """Whether the assistant's text starts inside the reasoning."""


def _system(messages: Messages) -> str:
    """All system texts of the conversation, which V3 and its successors write first."""
    return "\n\n".join(m["content"] for m in messages if m["role"] == "system")


def _with_last_system(messages: Messages) -> Messages:
    """The conversation with the last of its system texts alone."""
    last = [m for m in messages if m["role"] == "system"][-1:]
    return [*last, *(m for m in messages if m["role"] != "system")]


def _without_reasoning(messages: Messages) -> Messages:
    """The conversation with the answers alone of the assistant's messages."""
    return [
        {**m, "content": m["content"].split(END_THINK)[-1]} if m["role"] == "assistant" else m
        for m in messages
    ]


_EMPTY_REASONING: Rendered = [Control(THINK), "\n\n", Control(END_THINK), "\n\n"]


def _render_v3(messages: Messages, think: bool) -> Rendered:
    """DeepSeek-V3: first all system texts of the conversation, then the turns."""
    parts: Rendered = [Control(BOS), _system(messages)]
    for message in messages:
        if message["role"] == "user":
            parts += [Control(USER), message["content"]]
        elif message["role"] == "assistant":
            parts += [Control(ASSISTANT), message["content"], Control(EOS)]
    return [*parts, Control(ASSISTANT)]


def _render_r1(messages: Messages, think: bool) -> Rendered:
    """DeepSeek-R1: V3's template, without earlier reasoning and with a start for the new reasoning.

    If `think` is true, the prompt ends with "<think>\\n". DeepSeek recommend this. Otherwise the
    model sometimes writes an empty block and skips the reasoning. If `think` is false, the prompt
    ends with such an empty block.
    """
    start: Rendered = [Control(THINK), "\n"] if think else _EMPTY_REASONING
    return _render_v3(_without_reasoning(messages), think) + start


def _render_distill(messages: Messages, think: bool) -> Rendered:
    """The distilled models: R1's template, but only the last of several system texts counts."""
    return _render_r1(_with_last_system(messages), think)


def _render_v3_0324(messages: Messages, think: bool) -> Rendered:
    """DeepSeek-V3-0324: V3's template, but `<｜Assistant｜>` follows each message of the user."""
    parts: Rendered = [Control(BOS), _system(messages)]
    for message in messages:
        if message["role"] == "user":
            parts += [Control(USER), message["content"], Control(ASSISTANT)]
        elif message["role"] == "assistant":
            parts += [message["content"], Control(EOS)]
    return parts


def _render_r1_0528(messages: Messages, think: bool) -> Rendered:
    """DeepSeek-R1-0528: V3-0324's template, without earlier reasoning.

    The model writes `<think>` by itself. If `think` is false, the prompt ends with an empty block,
    as R1's does.
    """
    prompt = _render_v3_0324(_without_reasoning(messages), think)
    return prompt if think else prompt + _EMPTY_REASONING


def _render_v3_1(messages: Messages, think: bool) -> Rendered:
    """DeepSeek-V3.1: a turn of the assistant starts with `<think>` or, without any, `</think>`.

    Earlier answers have no reasoning, so `</think>` precedes them. Only an answer to the user
    starts a turn. An answer after another answer continues it.
    """
    parts: Rendered = [Control(BOS), _system(messages)]
    turn: Rendered = [Control(ASSISTANT), Control(END_THINK)]
    after_user = False
    for message in messages:
        if message["role"] == "user":
            parts += [Control(USER), message["content"]]
            after_user = True
        elif message["role"] == "assistant":
            before, marker, after = message["content"].partition(END_THINK)
            parts += turn if after_user else []
            parts += [after if marker else before, Control(EOS)]
            after_user = False
    return [*parts, Control(ASSISTANT), Control(THINK if think else END_THINK)]


def _render_v2_5(messages: Messages, think: bool) -> Rendered:
    """DeepSeek-V2.5: V3's template, but only the last of several system texts counts."""
    return _render_v3(_with_last_system(messages), think)


def _render_v2(messages: Messages, think: bool) -> Rendered:
    """DeepSeek-V2: the roles are plain words."""
    parts: Rendered = [Control(BOS)]
    for message in messages:
        if message["role"] == "user":
            parts.append(f"User: {message['content']}\n\n")
        elif message["role"] == "assistant":
            parts += [f"Assistant: {message['content']}", Control(EOS)]
        else:
            parts.append(f"{message['content']}\n\n")
    return [*parts, "Assistant:"]


def _render_kimi(system: str, messages: Messages, think: bool) -> Rendered:
    """Moonlight and Kimi: for each message a role marker, the role's name, and the content.

    There is no BOS. If the first message is not a system message, one with the text `system` is
    added.
    """
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    marker = {"system": IM_SYSTEM, "user": IM_USER, "assistant": IM_ASSISTANT}
    parts: Rendered = []
    for message in messages:
        role = message["role"]
        parts += [Control(marker[role]), role, Control(IM_MIDDLE)]
        parts += [message["content"], Control(IM_END)]
    return [*parts, Control(IM_ASSISTANT), "assistant", Control(IM_MIDDLE)]


def _render_glm(messages: Messages, think: bool) -> Rendered:
    """GLM-4.7: nothing but a role's marker stands between the texts.

    Earlier answers have no reasoning, so `</think>` precedes them, and no spaces at their ends. A
    turn has no end of its own: the next marker ends it.
    """
    marker = {"system": GLM_SYSTEM, "user": GLM_USER}
    parts: Rendered = [Control(GMASK), Control(SOP)]
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            answer = content.split(END_THINK)[-1].strip()
            parts += [Control(GLM_ASSISTANT), Control(END_THINK), answer]
        else:
            parts += [Control(marker[role]), content]
    return [*parts, Control(GLM_ASSISTANT), Control(THINK if think else END_THINK)]


MOONLIGHT_SYSTEM = "You are a helpful assistant"
KIMI_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."

R1_MARKERS = frozenset({BOS, EOS, USER, ASSISTANT, THINK, END_THINK})
V3_MARKERS = frozenset({BOS, EOS, PAD, USER, ASSISTANT})
V2_MARKERS = frozenset({BOS, EOS})
GLM_MARKERS = frozenset({GMASK, SOP, GLM_SYSTEM, GLM_USER, GLM_ASSISTANT, THINK, END_THINK})
KIMI_MARKERS = frozenset({IM_SYSTEM, IM_USER, IM_ASSISTANT, IM_MIDDLE, IM_END})

R1 = Template("R1", R1_MARKERS, _render_r1, thinks=True)
DISTILL = Template("R1-Distill", R1_MARKERS, _render_distill, thinks=True)
R1_0528 = Template("R1-0528", R1_MARKERS, _render_r1_0528)
V3_1 = Template("V3.1", R1_MARKERS | {SEARCH_BEGIN}, _render_v3_1, thinks=True)
V3 = Template("V3", V3_MARKERS, _render_v3)
V3_0324 = Template("V3-0324", V3_MARKERS, _render_v3_0324)
V2_5 = Template("V2.5", V2_MARKERS | {USER, ASSISTANT, TOOL_SEP}, _render_v2_5)
V2 = Template("V2", V2_MARKERS, _render_v2)
GLM = Template("GLM-4.7", GLM_MARKERS, _render_glm, thinks=True)
MOONLIGHT = Template("Moonlight", KIMI_MARKERS, partial(_render_kimi, MOONLIGHT_SYSTEM))
KIMI = Template("Kimi-K2", KIMI_MARKERS, partial(_render_kimi, KIMI_SYSTEM))
