"""Prefill, then step after step: stopping, streaming. `Engine` is what `r1.load` gives.

Shapes: B batch (prompts), S sequence, W vocab_size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from r1.errors import InputError
from r1.model.cache import Cache
from r1.model.transformer import Transformer
from r1.run import speculate
from r1.run.runner import Runner
from r1.run.sampler import TEMPERATURE, TOP_P, Sampler
from r1.switches.backend import Backend
from r1.text.tokenizer import Tokenizer


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


class Engine:
    """A loaded model, ready to be asked. Made by `r1.load`."""

    def __init__(
        self,
        model: Transformer,
        backend: Backend,
        tokenizer: Tokenizer | None = None,
        stop_ids: frozenset[int] = frozenset(),
        notes: Sequence[str] = (),
        cautions: Sequence[str] = (),
    ) -> None:
        """`notes`: what loading left out, by design, for who asks. `cautions`: what whoever runs it
        should know."""
        self.model, self.backend, self.config = model, backend, model.config
        self.runner = Runner(model, backend)
        self.tokenizer, self.stop_ids, self.notes, self.cautions = (
            tokenizer,
            stop_ids,
            list(notes),
            list(cautions),
        )
        self._kept: Cache | None = None

    def logits(self, tokens: Tensor) -> Tensor:
        """int64 (B, S) -> fp32 (B, S, W): what each position says of the next token; causal,
        without a cache."""
        if not isinstance(tokens, Tensor):
            raise InputError(
                f"logits takes a LongTensor (batch, sequence), not a {type(tokens).__name__}"
            )
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
            raise InputError(
                f"logits takes a LongTensor (batch, sequence), not {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
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

        A row ends at a stop token (unless `ignore_stop`), after `max_new_tokens`, or where the
        longest row meets the model's context. `on_tokens` gets the new tokens as they arrive, one
        of each row at a time: None for a row that has ended or, under speculation, had fewer in
        this step. Raises InputError for prompts that are empty, too long, or hold ids outside the
        vocabulary."""
        sampler = Sampler(temperature, top_p, seed)
        if (
            isinstance(max_new_tokens, bool)
            or not isinstance(max_new_tokens, int)
            or max_new_tokens < 1
        ):
            raise InputError(
                f"max_new_tokens={max_new_tokens!r}: give a whole number of at least 1"
            )
        if not isinstance(prompts, Sequence) or not all(
            isinstance(prompt, Sequence) for prompt in prompts
        ):
            raise InputError(
                "generate takes a list of prompts, each a list of token ids: [[0, 5, 7]], not [0, 5, 7]"
            )
        rows = [list(prompt) for prompt in prompts]
        self._check(rows)
        room = self.config.max_position_embeddings - max(map(len, rows))
        if room < 1:
            context = self.config.max_position_embeddings
            raise InputError(
                f"a prompt of {context} tokens leaves no room for an answer in a context of {context}: shorten it"
            )
        start = time.perf_counter()
        completions = [Completion([], "length", len(row), ttft=0.0, seconds=0.0) for row in rows]
        live = set(range(len(rows)))
        limit = min(max_new_tokens, room)
        cache = self._cache(len(rows), max(map(len, rows)) + limit)
        for step in self.steps(rows, limit, sampler, cache):
            now = time.perf_counter() - start
            for row in live:
                self._count(completions[row], len(step[row]), now)
            for column in zip_longest(
                *step
            ):  # each row's first token of this step, each row's second, ...
                arrived = [token if row in live else None for row, token in enumerate(column)]
                for row, token in enumerate(arrived):
                    if token is None:
                        continue
                    done = completions[row]
                    done.tokens.append(token)
                    done.seconds = now
                    if token in self.stop_ids and not ignore_stop:
                        done.finish = "stop"
                    if done.finish == "stop" or len(done.tokens) == limit:
                        live.discard(row)
                if on_tokens and any(token is not None for token in arrived):
                    on_tokens(arrived)
            if not live:
                break
        if cache.graphs:
            self._kept = cache
        for completion in completions:
            completion.text = (
                self.tokenizer.decode(self._words(completion.tokens)) if self.tokenizer else ""
            )
        return completions

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

        Raises InputError for a checkpoint without a tokenizer or a chat template, and for messages
        it can't take."""
        if self.tokenizer is None:
            raise InputError(
                "this checkpoint has no tokenizer, so it can't chat: use generate with token ids"
            )
        prompt = self.tokenizer.chat_prompt(list(messages), think=think)
        splitter = self.tokenizer.splitter(think)

        def arrived(step: list[int | None]) -> None:
            if on_text and step[0] is not None and step[0] not in self.stop_ids:
                on_text(*splitter.push(step[0]))

        (completion,) = self.generate(
            [prompt], max_new_tokens, temperature, top_p, seed, on_tokens=arrived
        )
        if on_text:
            on_text(*splitter.flush())
        completion.reasoning, completion.answer = self.tokenizer.split(
            self._words(completion.tokens), think
        )
        return completion

    def encode(self, text: str) -> list[int]:
        """Plain text as a prompt: BOS and the text's tokens."""
        if self.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer: give token ids")
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text)

    def steps(
        self,
        rows: list[list[int]],
        limit: int,
        sampler: Sampler,
        cache: Cache,
        depth: int = 0,
        assumed: float | None = None,
    ) -> Iterator[list[list[int]]]:
        """Continue `rows` until each has `limit` tokens; yields each step's new tokens of each row
        (B, 1 or more), on the host.

        `cache` holds `depth` tokens a row. Under speculation a row may get more than `limit`, while
        others get there; `assumed` is speculate.py's assumed acceptance."""
        if self.backend.speculate == "off":
            yield from _arrivals(self._launch(rows, limit, sampler, cache, depth))
            return
        counts = [0] * len(rows)
        for step in _arrivals(speculate.launch(self.runner, rows, sampler, cache, depth, assumed)):
            new = [tokens[: accepted + 1] for *tokens, accepted in step]
            yield new
            counts = [count + len(tokens) for count, tokens in zip(counts, new, strict=True)]
            if min(counts) >= limit:
                return

    def _launch(
        self, rows: list[list[int]], limit: int, sampler: Sampler, cache: Cache, depth: int
    ) -> Iterator[Tensor]:
        """Step after step without speculation: int64 (B, 1) on the device."""
        tokens = sampler(self.runner.prefill(rows, cache, depth))[:, None]  # (B, 1)
        yield tokens
        for _ in range(limit - 1):
            tokens = sampler(self.runner.decode(tokens, cache))
            yield tokens

    def _cache(self, rows: int, tokens: int) -> Cache:
        """A call's cache. Where steps are captured the last call's is kept, with its graphs, for
        another of its size."""
        kept, self._kept = self._kept, None
        if kept and (kept.rows, kept.capacity) == self.runner.cache_size(rows, tokens):
            kept.reset()
            return kept
        if kept:
            del kept
            torch.cuda.empty_cache()  # so that there is room for another
        return self.runner.cache(rows, tokens)

    def _count(self, completion: Completion, new: int, now: float) -> None:
        """Put a step that brought `new` tokens down to a completion; its first is the prompt's."""
        if not completion.tokens:
            completion.ttft = now
            return
        completion.steps += 1
        completion.drafted += self.runner.drafts
        completion.accepted += new - 1

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
                raise InputError(
                    f"prompt {number} holds token {outside}, outside the vocabulary of {self.config.vocab_size}"
                )
            if len(row) > context:
                raise InputError(
                    f"prompt {number} has {len(row)} tokens, more than the context of {context}: shorten it"
                )


def _arrivals(launched: Iterator[Tensor]) -> Iterator[list[list[int]]]:
    """Each step's tensor (B, S) on the host. On a GPU the next step is under way while the last
    one's tokens travel."""
    yield next(launched).tolist()
    travelling: Callable[[], list[list[int]]] | None = None
    for tokens in launched:
        arrive = _to_host(tokens)
        if travelling:
            yield travelling()
        travelling = arrive if tokens.device.type != "cpu" else None
        if not travelling:
            yield arrive()
    if travelling:
        yield travelling()


def _to_host(tokens: Tensor) -> Callable[[], list[list[int]]]:
    """Start copying (B, S) to the host; the function returned waits for that copy only, not for
    what was launched since."""
    if tokens.device.type == "cpu":
        return tokens.tolist
    host = torch.empty_like(tokens, device="cpu", pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[list[int]]:
        arrived.synchronize()
        rows: list[list[int]] = host.tolist()
        return rows

    return wait
