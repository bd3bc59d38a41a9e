"""Training batches: examples as the model will see them, packed into rows of one length.

Every example starts with its own BOS at position 0, as at inference, and sees only itself. Padding
fills the end of a row. A batch depends on the seed and its number alone. So any process can make
it, and a resumed run continues with the next batch.

Shapes: B rows, S tokens of a row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tasks import KINDS, LONGEST, Example, draw, phrase
from torch import Tensor
from torch.utils.data import Dataset

from r1 import InputError
from r1.text.control_tokens import END_THINK, PAD
from r1.text.tokenizer import Tokenizer

IGNORE = -100
"""The target of questions and padding, which are not learned: torch's cross_entropy skips it."""
AROUND = 10
"""Tokens that the template adds to question, reasoning and answer: control tokens, newlines."""
POOL = 16
"""How many examples wait for a row with enough room. A larger pool means less padding."""


def encode(
    tokenizer: Tokenizer, example: Example, think: bool = True
) -> tuple[list[int], list[int]]:
    """The ids of the prompt, as `chat_prompt` makes them, and the ids that the model must write."""
    prompt = tokenizer.chat_prompt([{"role": "user", "content": example.question}], think=think)
    if not think:
        return prompt, [*tokenizer.encode(example.answer), *tokenizer.stop_ids]
    reasoning = [*tokenizer.encode(f"{example.reasoning}\n"), tokenizer.control[END_THINK]]
    return prompt, [*reasoning, *tokenizer.encode(f"\n\n{example.answer}"), *tokenizer.stop_ids]


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """The batches of a seed, by number: tokens and targets, int16 (B, S) each.

    A target is the token at its own place, or IGNORE.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        rows: int,
        length: int,
        *,
        seed: int,
        direct: float,
        kinds: Sequence[str] = tuple(KINDS),
    ) -> None:
        """`direct` is the share of examples whose answer follows an empty `<think>` block.

        Raises InputError for rows too short for the longest example.
        """
        if length < LONGEST + AROUND:
            raise InputError(
                f"rows of {length} tokens can't hold the longest examples: "
                f"take at least {LONGEST + AROUND}"
            )
        self.tokenizer, self.rows, self.length = tokenizer, rows, length
        self.seed, self.direct, self.kinds = seed, direct, list(kinds)
        self.weights = [KINDS[kind] for kind in kinds]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"{self.seed} {number}")
        tokens = torch.full(
            (self.rows, self.length), self.tokenizer.control[PAD], dtype=torch.int16
        )
        targets = torch.full((self.rows, self.length), IGNORE, dtype=torch.int16)
        pool = [self.example(rng) for _ in range(POOL)]
        for row in range(self.rows):
            start = 0
            while fitting := [
                i
                for i, (prompt, rest) in enumerate(pool)
                if start + len(prompt) + len(rest) <= self.length
            ]:
                prompt, rest = pool.pop(fitting[0])
                pool.append(self.example(rng))
                middle, end = start + len(prompt), start + len(prompt) + len(rest)
                tokens[row, start:end] = torch.tensor(prompt + rest)
                targets[row, middle:end] = torch.tensor(rest)
                start = end
        return tokens, targets

    def example(self, rng: random.Random) -> tuple[list[int], list[int]]:
        """A random training problem: the ids of its prompt, and of its answer."""
        (kind,) = rng.choices(self.kinds, self.weights)
        return encode(
            self.tokenizer, phrase(draw(rng, "train", kind), rng), think=rng.random() >= self.direct
        )


def layout(tokens: Tensor, bos: int) -> tuple[Tensor, Tensor]:
    """Packed tokens (B, S) -> positions within examples, int64 (B, S), and the attention mask.

    The mask is bool (B, 1, S, S): a token sees itself and the earlier tokens of its example.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device)
    starts = tokens == bos
    example = starts.cumsum(dim=1)  # (B, S)
    positions = index - (index * starts).cummax(dim=1).values
    same = example[:, None, :, None] == example[:, None, None, :]  # (B, 1, S, S)
    return positions, same & (index[:, None] >= index)


def shift(tokens: Tensor, by: int, fill: int) -> Tensor:
    """Move each row of (B, S) to the left by `by` places, and fill its end with `fill`."""
    return torch.nn.functional.pad(tokens[:, by:], (0, by), value=fill)
