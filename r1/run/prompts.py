"""Checks of prompts, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r1.errors import InputError
from r1.model.config import Config


def check_tokens(tokens: Tensor) -> None:
    """Raises InputError unless `tokens` is an int64 tensor (batch, sequence) with tokens in it."""
    takes = "logits takes a LongTensor (batch, sequence)"
    if not isinstance(tokens, Tensor):
        raise InputError(f"{takes}, not a {type(tokens).__name__}")
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
        raise InputError(f"{takes}, not {tokens.dtype} of shape {tuple(tokens.shape)}")


def check_rows(rows: Sequence[Sequence[int]], config: Config) -> None:
    """Raises InputError for prompts that are empty, too long, or hold unknown ids."""
    if not rows:
        raise InputError("there is no prompt: give at least one")
    for number, row in enumerate(rows):
        if not row:
            raise InputError(f"prompt {number} is empty: give at least one token")
        wrong = [i for i in row if isinstance(i, bool) or not isinstance(i, int)]
        if wrong:
            raise InputError(f"prompt {number} holds {wrong[0]!r}, which is no token id")
        low, high = min(row), max(row)
        if low < 0 or high >= config.vocab_size:
            token = low if low < 0 else high
            outside = f"outside the vocabulary of {config.vocab_size}"
            raise InputError(f"prompt {number} holds token {token}, {outside}")
        context = config.max_position_embeddings
        if len(row) > context:
            more = f"more than the context of {config.context}: shorten it"
            raise InputError(f"prompt {number} has {len(row)} tokens, {more}")


def check_conversation(tokens: int, messages: int, config: Config) -> None:
    """Raises InputError for a prompt of some `messages` that leaves no room for an answer."""
    context = config.max_position_embeddings
    if tokens >= context:
        what, advice = "your question", "shorten it"
        if messages > 1:
            what, advice = "the conversation", "start a new one, or shorten it"
        why = f" ({config.shortened})" if config.shortened else ""
        fit = f"it must fit the context of {context:,}{why} together with the answer"
        raise InputError(f"{what} has {tokens:,} tokens, and {fit}: {advice}")


def room_for_answers(rows: Sequence[Sequence[int]], config: Config) -> int:
    """New tokens that fit into the context after the longest prompt. Raises InputError for none."""
    context = config.max_position_embeddings
    room = context - max(map(len, rows))
    if room < 1:
        leaves = f"leaves no room for an answer in a context of {config.context}: shorten it"
        raise InputError(f"a prompt of {context} tokens {leaves}")
    return room
