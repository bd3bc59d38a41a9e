"""Check the messages of a conversation before a chat template writes them.

A template writes a role and a text. Anything else in a message would vanish, and the model would
answer another conversation. So anything else is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from r1.errors import InputError
from r1.text.chat import Messages

ROLES = ("system", "user", "assistant")


def check_messages(messages: Messages) -> None:
    """Raise an InputError that names the first unusable message."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InputError(
            "the conversation must be a list of at least one message, {'role': ..., 'content': ...}"
        )
    for i, message in enumerate(messages):
        _check_message(i, message)
    last = messages[-1]["role"]
    if last != "user":
        raise InputError(
            f"message {len(messages) - 1}, the last, is the {last}'s; end with the user's"
        )


def _check_message(i: int, message: Any) -> None:
    if not isinstance(message, dict):
        raise InputError(
            f"message {i} is a {type(message).__name__}, not a dict of role and content"
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(f"message {i} has role {role!r}; use system, user or assistant")
    for key, value in message.items():
        # Clients write keys that they do not use as null.
        if key not in ("role", "content") and value is not None:
            raise InputError(
                f"message {i} ({role}) has {key!r}, which r1 can't give to the model; use role "
                "and content alone"
            )
    if not isinstance(content, str):
        raise InputError(
            f"message {i} ({role}) has content of type {type(content).__name__}; use a str"
        )
