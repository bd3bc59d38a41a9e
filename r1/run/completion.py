"""What the model wrote for each prompt, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import zip_longest


@dataclass
class Completion:
    """What the model wrote for one prompt."""

    tokens: list[int]
    """The new tokens only; a stop token, if one came, is the last."""
    finish: str
    """"stop": a stop token came; "length": the limit or the context's end did."""
    prompt_tokens: int
    ttft: float
    """Seconds to the first token on the host, from the call or the end of its start-up; the whole
    batch's."""
    seconds: float
    """Seconds to this completion's last token, from the same moment."""
    text: str = ""
    """The tokens as text, where the checkpoint has a tokenizer."""
    reasoning: str = ""
    answer: str = ""
    start_up: float = 0.0
    """Seconds that this call first took to compile, to capture and to load kernels (start_up.py).
    Only the first call of a size has something to start; 0 in the others."""
    steps: int = 0
    """Decode steps it took, after the prompt's. Without speculation each gives one token."""
    drafted: int = 0
    accepted: int = 0
    """Under speculation: how many tokens were drafted in those steps, and how many of them the
    model accepted."""

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 where there is no other."""
        return (self.seconds - self.ttft) / (len(self.tokens) - 1) if len(self.tokens) > 1 else 0.0

    @property
    def acceptance(self) -> float:
        """The share of drafts that were accepted; 0 where none were made."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a decode step gave on average; 0 where there was none."""
        return (len(self.tokens) - 1) / self.steps if self.steps else 0.0


class Collector:
    """Sorts the tokens of a batch's steps into one Completion for each row."""

    def __init__(
        self, prompts: list[list[int]], limit: int, stop_ids: Collection[int], drafts: int
    ) -> None:
        """A row ends after `limit` tokens, or at one of `stop_ids`. `drafts`: made in each step."""
        self.completions = [
            Completion([], "length", len(p), ttft=0.0, seconds=0.0) for p in prompts
        ]
        self.limit, self.stop_ids, self.drafts = limit, stop_ids, drafts
        self.live = set(range(len(prompts)))
        self.start = time.perf_counter()

    def begin(self, start_up: float) -> None:
        """Count the first `start_up` seconds apart from all times."""
        self.start += start_up
        for completion in self.completions:
            completion.start_up = start_up

    def add(
        self, step: list[list[int]], on_tokens: Callable[[list[int | None]], None] | None
    ) -> None:
        """Take a step's new tokens of each row; `on_tokens` gets them one of each row at a time."""
        now = time.perf_counter() - self.start
        for row in self.live:
            self._count(self.completions[row], len(step[row]), now)
        for column in zip_longest(*step):  # first each row's first token, then its second, ...
            arrived = [token if row in self.live else None for row, token in enumerate(column)]
            for row, token in enumerate(arrived):
                if token is not None:
                    self._take(row, token, now)
            if on_tokens and any(token is not None for token in arrived):
                on_tokens(arrived)

    def _take(self, row: int, token: int, now: float) -> None:
        done = self.completions[row]
        done.tokens.append(token)
        done.seconds = now
        if token in self.stop_ids:
            done.finish = "stop"
        if done.finish == "stop" or len(done.tokens) == self.limit:
            self.live.discard(row)

    def _count(self, completion: Completion, new: int, now: float) -> None:
        """Count a step that brought `new` tokens; the first step is the prompt's."""
        if not completion.tokens:
            completion.ttft = now
            return
        completion.steps += 1
        completion.drafted += self.drafts
        completion.accepted += new - 1
