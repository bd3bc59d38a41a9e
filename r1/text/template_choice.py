"""Choose a chat template: by the jinja text in the checkpoint's folder, else by the vocabulary.

The text is compared, never run. If its fingerprint is in PUBLISHED, one of our templates gives the
same prompts. A text with another fingerprint is a revision that was never compared. It resembles a
template if it has all of that template's TELLS.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Set
from dataclasses import dataclass

from r1.text import chat
from r1.text.chat import Template
from r1.text.control_tokens import DSML, END_THINK, THINK

PUBLISHED = {
    "ab1e9d71a87a4bc4": chat.R1,
    "eab1378be9689dde": chat.R1,  # R1's first revision, which did not open `<think>`
    "c9328b177a8158a1": chat.DISTILL,
    "0170241e1182f490": chat.R1_0528,  # R1-0528-Qwen3-8B
    "0c9b09c9be64c995": chat.V3_1,
    "dc013b0c0f0f4f6a": chat.V3,
    "a70ad8be7b0493d5": chat.V2_5,
    "b727360483e0cf9a": chat.V2,
    "5f697a45e80df853": chat.GLM,
    "f7165c58752869e2": chat.MOONLIGHT,
}
"""The fingerprint of a published text -> the template here."""

_USER = "{{'<｜User｜>' + message['content']}}"
_USER_AND_TURN = " + '<｜Assistant｜>'}}"
_ANSWER = "{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}"
_ADDED_SYSTEM = r"set ns.system_prompt = ns.system_prompt + '\n\n' + message['content']"
_LAST_SYSTEM = "set ns.system_prompt = message['content']"
_DROPS_REASONING = "content = content.split('</think>')[-1]"
_OPENS = "{%if add_generation_prompt and not ns.is_tool%}{{'<｜Assistant｜>"
_KIMI_SYSTEM = "<|im_system|>system<|im_middle|>{}<|im_end|>"
_KIMI_TURN = "<|im_assistant|>assistant<|im_middle|>"

TELLS = {
    chat.R1: (_USER, _ADDED_SYSTEM, _DROPS_REASONING, _OPENS + r"<think>\n'}}"),
    chat.DISTILL: (_USER, _LAST_SYSTEM, _DROPS_REASONING, _OPENS + r"<think>\n'}}"),
    chat.R1_0528: (_USER_AND_TURN, _ADDED_SYSTEM, _DROPS_REASONING),
    chat.V3_1: (
        _USER,
        _ADDED_SYSTEM,
        "content = content.split('</think>', 1)[1]",
        "{{'<｜Assistant｜>'}}{%if not thinking%}{{'</think>'}}{%else%}{{'<think>'}}{%endif%}",
    ),
    chat.V3_0324: (_USER_AND_TURN, _ADDED_SYSTEM),
    chat.V3: (_USER, _ADDED_SYSTEM, _ANSWER, _OPENS + "'}}"),
    chat.V2_5: (_USER, _LAST_SYSTEM, _ANSWER, _OPENS + "'}}"),
    chat.V2: (
        r"{{'User: ' + message['content'] + '\n\n'}}",
        "{{'Assistant: ' + message['content'] + eos_token}}",
        "{{'Assistant:'}}",
    ),
    chat.GLM: (
        "[gMASK]<sop>",
        "<|user|>{{visible_text(m.content)}}",
        "set content = content.split('</think>')[-1]",
        "{{content.strip()}}",
        "<|assistant|>{{'</think>' if (enable_thinking is defined and not enable_thinking) "
        "else '<think>'}}",
    ),
    chat.MOONLIGHT: (_KIMI_SYSTEM.format(chat.MOONLIGHT_SYSTEM), _KIMI_TURN),
    chat.KIMI: (_KIMI_SYSTEM.format(chat.KIMI_SYSTEM), _KIMI_TURN),
}
"""What each template's texts have in common, in their normal form."""

BY_VOCABULARY = (chat.V3_1, chat.R1, chat.V3, chat.V2_5, chat.V2, chat.MOONLIGHT, chat.GLM)
"""Without a text, the first template whose markers are all in the vocabulary is used."""

UNSHARED = (chat.R1, chat.V3)
"""Other models with the same vocabulary write the same prompts, but for details."""


@dataclass(frozen=True)
class Choice:
    """The template that a tokenizer's chats use."""

    template: Template | None
    caution: str = ""
    """A risk that the user should know."""
    refusal: str = ""
    """Why there can't be chats, if `template` is None."""


def choose(control: Set[str], text: str | None) -> Choice:
    """The template for a vocabulary with these control tokens, and for the folder's jinja text."""
    guess = next((t for t in BY_VOCABULARY if t.markers <= control), None)
    if guess is None:
        missing = ", ".join(sorted(chat.R1.markers - control))
        others = ", ".join(t.name for t in TELLS if t is not chat.R1)
        return Choice(
            None,
            refusal=f"this tokenizer can't chat: of R1's control tokens it lacks {missing}, and it "
            f"hasn't those of {others} either; use plain completion instead",
        )
    if text is None and DSML in control:
        return Choice(None, refusal=_program())
    if text is None:
        return Choice(guess, "" if guess in UNSHARED else _guessed(guess))
    template = PUBLISHED.get(fingerprint(text))
    caution = ""
    if template is None and (template := resembled(text)) is not None:
        caution = (
            f"the folder's chat_template is a revision that r1 does not know: chats use "
            f"{template.name}'s, which it resembles; compare engine.tokenizer.chat_prompt with the "
            "prompt that the model's publisher gives"
        )
    if template is None:
        return Choice(None, refusal=_unknown())
    if missing := ", ".join(sorted(template.markers - control)):
        return Choice(
            None,
            refusal=f"this tokenizer can't chat: the folder's chat_template is {template.name}'s, "
            f"but the vocabulary lacks its control tokens {missing}; copy the tokenizer files of "
            "one checkpoint there",
        )
    return Choice(template, caution)


def fingerprint(text: str) -> str:
    """A short hash of the normal form of a jinja text."""
    return hashlib.sha256(normal_form(text).encode("utf-8", "replace")).hexdigest()[:16]


def normal_form(text: str) -> str:
    r"""The jinja text without the spaces that do not reach a prompt.

    Those are the spaces beside a tag with a dash, and the spaces at the ends inside a tag. A line
    end inside a tag is in a string, where it means the same as the escape `\n`.
    """
    text = re.sub(r"(?<!\s)\s+(\{[{%#]-)", r"\1", text)
    text = re.sub(r"(-[}%#]\})\s+", r"\1", text)
    return _TAG.sub(_normal_tag, text).strip()


_TAG = re.compile(r"(\{[{%])-?((?:(?!\{[{%]).)*?)-?([}%]\})", re.DOTALL)
"""A tag of jinja: its start, its content, which starts no other tag, and its end."""


def _normal_tag(tag: re.Match[str]) -> str:
    return tag[1] + tag[2].strip().replace("\n", "\\n") + tag[3]


def resembled(text: str) -> Template | None:
    """The template whose tells the text has, or None.

    A text that mentions reasoning is not resembled by a template that does not.
    """
    normal = normal_form(text)
    reasons = THINK in normal or END_THINK in normal
    for template, tells in TELLS.items():
        if all(tell in normal for tell in tells) and reasons == any(END_THINK in t for t in tells):
            return template
    return None


def _guessed(template: Template) -> str:
    return (
        "the folder has no chat_template (in tokenizer_config.json or chat_template.jinja), and "
        f"models with this vocabulary differ in theirs: chats use {template.name}'s; copy the "
        "tokenizer_config.json that came with the checkpoint there"
    )


def _program() -> str:
    return (
        "this tokenizer can't chat: it is DeepSeek-V3.2's, which comes with a program that writes "
        "prompts (encoding_dsv32.py) and no chat_template, and r1 runs no program of a checkpoint; "
        "render the prompt with it, and pass its ids to generate"
    )


def _unknown() -> str:
    return (
        "this tokenizer can't chat: the folder's chat_template is none that r1 knows "
        f"({', '.join(t.name for t in TELLS)}), and r1 runs no template; render the prompt with "
        "transformers' apply_chat_template, and pass its ids to generate"
    )
