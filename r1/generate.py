"""Prefill, then one token after the other: sampling, stopping, streaming. `Engine` is what `r1.load` gives.

Shapes: B batch (prompts), S sequence, W vocab_size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from r1.backend import Backend
from r1.cache import Cache
from r1.errors import InputError
from r1.model import Transformer
from r1.runner import Runner
from r1.tokenizer import Tokenizer

TEMPERATURE, TOP_P = 0.6, 0.95
"""What R1's authors recommend (DeepSeek-R1's README, usage recommendations)."""


@dataclass
class Completion:
    """What the model wrote for one prompt."""

    tokens: list[int]
    """The new tokens only; a stop token, if one came, is the last."""
    finish: str
    """"stop": a stop token came; "length": the limit or the context's end did."""
    prompt_tokens: int
    ttft: float
    """Seconds from the call to the first token on the host; the whole batch's."""
    seconds: float
    """Seconds from the call to this completion's last token."""
    text: str = ""
    """The tokens as text, where the checkpoint has a tokenizer."""
    reasoning: str = ""
    answer: str = ""

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 where there is no other."""
        return (self.seconds - self.ttft) / (len(self.tokens) - 1) if len(self.tokens) > 1 else 0.0


@dataclass
class Sampler:
    """Picks a token from each row's logits. Temperature 0 is greedy; a seed makes the same choices again."""

    temperature: float = TEMPERATURE
    top_p: float = TOP_P
    seed: int | None = None
    _generator: torch.Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, (int, float)) or not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature!r}: give 0 (greedy) or more")
        if not isinstance(self.top_p, (int, float)) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p!r}: give more than 0 and at most 1")
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed < 2**63):
            raise InputError(f"seed={self.seed!r}: give a whole number from 0 to 2^63 - 1")

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Tensor:
        """fp32 (B, W) -> int64 (B,), on the same device and without a sync."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        if self._generator is None:
            self._generator = torch.Generator(logits.device)
            self._generator.manual_seed(self.seed) if self.seed is not None else self._generator.seed()
        below = logits - logits.amax(dim=-1, keepdim=True)  # no temperature, however small, makes them overflow
        p, order = (below / self.temperature).softmax(dim=-1).sort(dim=-1, descending=True)  # (B, W)
        # The nucleus: the likeliest tokens up to the one with which top_p is reached (arXiv 1904.09751).
        p = p.masked_fill(p.cumsum(dim=-1) - p >= self.top_p, 0.0)
        # p / Exp(1) is largest at i with probability p[i] / sum(p): a draw that needs no sync.
        drawn = (p / torch.empty_like(p).exponential_(generator=self._generator)).argmax(dim=-1, keepdim=True)
        return order.gather(1, drawn).squeeze(1)


class Engine:
    """A loaded model, ready to be asked. Made by `r1.load`."""

    def __init__(
        self,
        model: Transformer,
        backend: Backend,
        tokenizer: Tokenizer | None = None,
        stop_ids: frozenset[int] = frozenset(),
        notes: Sequence[str] = (),
    ) -> None:
        self.model, self.backend, self.config = model, backend, model.config
        self.runner = Runner(model, backend)
        self.tokenizer, self.stop_ids, self.notes = tokenizer, stop_ids, list(notes)

    def logits(self, tokens: Tensor) -> Tensor:
        """int64 (B, S) -> fp32 (B, S, W): what each position says of the next token; causal, without a cache."""
        if not isinstance(tokens, Tensor):
            raise InputError(f"logits takes a LongTensor (batch, sequence), not a {type(tokens).__name__}")
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise InputError(f"logits takes a LongTensor (batch, sequence), not {tokens.dtype} of shape {tuple(tokens.shape)}")
        self._check(tokens.tolist())
        return self.runner.logits(tokens)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 512,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        seed: int | None = None,
        ignore_stop: bool = False,
        on_tokens: Callable[[list[int | None]], None] | None = None,
    ) -> list[Completion]:
        """Continue token prompts of any lengths, as one batch; one Completion each, in order.

        A row ends at a stop token (unless `ignore_stop`), after `max_new_tokens`, or where the longest row meets the
        model's context. `on_tokens` gets each step's new tokens as they arrive, None for rows that have ended.
        Raises InputError for prompts that are empty, too long, or hold ids outside the vocabulary.
        """
        sampler = Sampler(temperature, top_p, seed)
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens!r}: give a whole number of at least 1")
        if not isinstance(prompts, Sequence) or not all(isinstance(prompt, Sequence) for prompt in prompts):
            raise InputError("generate takes a list of prompts, each a list of token ids: [[0, 5, 7]], not [0, 5, 7]")
        rows = [list(prompt) for prompt in prompts]
        self._check(rows)
        room = self.config.max_position_embeddings - max(map(len, rows))
        if room < 1:
            context = self.config.max_position_embeddings
            raise InputError(f"a prompt of {context} tokens leaves no room for an answer in a context of {context}: shorten it")
        start = time.perf_counter()
        new: list[list[int]] = [[] for _ in rows]
        ended: dict[int, float] = {}
        ttft = 0.0
        limit = min(max_new_tokens, room)
        for step in self.steps(rows, limit, sampler, self.runner.cache(len(rows), max(map(len, rows)) + limit)):
            now = time.perf_counter() - start
            ttft = ttft or now
            live: list[int | None] = [None if row in ended else token for row, token in enumerate(step)]
            for row, token in enumerate(live):
                if token is not None:
                    new[row].append(token)
                    if token in self.stop_ids and not ignore_stop:
                        ended[row] = now
            if on_tokens:
                on_tokens(live)
            if len(ended) == len(rows):
                break
        return [
            self._completion(tokens, "stop" if row in ended else "length", len(rows[row]), ttft, ended.get(row, now))
            for row, tokens in enumerate(new)
        ]

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        max_new_tokens: int = 4096,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        seed: int | None = None,
        think: bool = True,
        on_text: Callable[[str, str], None] | None = None,
    ) -> Completion:
        """Answer a conversation; `on_text` gets (reasoning, answer) pieces as they are decoded.

        Raises InputError for a checkpoint without a tokenizer or a chat template, and for messages it can't take.
        """
        if self.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer, so it can't chat: use generate with token ids")
        prompt = self.tokenizer.chat_prompt(list(messages), think=think)
        splitter = self.tokenizer.splitter(think)

        def arrived(step: list[int | None]) -> None:
            if on_text and step[0] is not None and step[0] not in self.stop_ids:
                on_text(*splitter.push(step[0]))

        (completion,) = self.generate([prompt], max_new_tokens, temperature, top_p, seed, on_tokens=arrived)
        if on_text:
            on_text(*splitter.flush())
        completion.reasoning, completion.answer = self.tokenizer.split(self._words(completion.tokens), think)
        return completion

    def encode(self, text: str) -> list[int]:
        """Plain text as a prompt: BOS and the text's tokens."""
        if self.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer: give token ids")
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text)

    def steps(self, rows: list[list[int]], limit: int, sampler: Sampler, cache: Cache, depth: int = 0) -> Iterator[list[int]]:
        """Continue `rows` by `limit` tokens; yields each step's tokens (B) on the host. `cache` holds `depth` tokens a row.

        On a GPU the next step is under way while the last one's tokens travel.
        """
        overlap = self.runner.device.type != "cpu"
        travelling: Callable[[], list[int]] | None = None
        tokens = sampler(self.runner.prefill(rows, cache, depth))
        yield tokens.tolist()
        for _ in range(limit - 1):
            tokens = sampler(self.runner.decode(tokens[:, None], cache)[:, -1])
            arrive = _to_host(tokens)
            if travelling:
                yield travelling()
            travelling = arrive if overlap else None
            if not overlap:
                yield arrive()
        if travelling:
            yield travelling()

    def _completion(self, tokens: list[int], finish: str, prompt_tokens: int, ttft: float, seconds: float) -> Completion:
        text = self.tokenizer.decode(self._words(tokens)) if self.tokenizer else ""
        return Completion(tokens, finish, prompt_tokens, ttft, seconds, text)

    def _words(self, tokens: list[int]) -> list[int]:
        return tokens[:-1] if tokens and tokens[-1] in self.stop_ids else tokens

    def _check(self, rows: list[list[int]]) -> None:
        if not rows:
            raise InputError("there is no prompt: give at least one")
        context = self.config.max_position_embeddings
        for number, row in enumerate(rows):
            if not row:
                raise InputError(f"prompt {number} is empty: give at least one token")
            wrong = [i for i in row if isinstance(i, bool) or not isinstance(i, int)]
            if wrong:
                raise InputError(f"prompt {number} holds {wrong[0]!r}, which is no token id")
            low, high = min(row), max(row)
            if low < 0 or high >= self.config.vocab_size:
                outside = low if low < 0 else high
                raise InputError(f"prompt {number} holds token {outside}, outside the vocabulary of {self.config.vocab_size}")
            if len(row) > context:
                raise InputError(f"prompt {number} has {len(row)} tokens, more than the context of {context}: shorten it")


def _to_host(tokens: Tensor) -> Callable[[], list[int]]:
    """Start copying (B,) to the host; the function returned waits for that copy only, not for what was launched since."""
    if tokens.device.type == "cpu":
        return tokens.tolist
    host = torch.empty_like(tokens, device="cpu", pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[int]:
        arrived.synchronize()
        return host.tolist()

    return wait
