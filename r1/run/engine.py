"""`Engine`: a loaded model, ready to be asked. `r1.load` makes one.

Shapes: B prompts, S tokens of a prompt, W vocab_size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from r1.errors import InputError
from r1.model.cache import Cache
from r1.model.transformer import Transformer
from r1.placement.mesh import Mesh
from r1.run.completion import Collector, Completion
from r1.run.draft_model import Draft, ModelDrafter
from r1.run.drafter import Drafter, MTPDrafter
from r1.run.generate import speculated_steps, steps
from r1.run.prompts import check_conversation, check_rows, check_tokens, room_for_answers
from r1.run.runner import Runner
from r1.run.sampler import TEMPERATURE, TOP_P, Sampler
from r1.run.start_up import StartUp
from r1.switches.backend import Backend
from r1.switches.draft import check_given
from r1.text.tokenizer import Tokenizer


class Engine:
    """A model, the way it is called, and its tokenizer."""

    def __init__(
        self,
        model: Transformer,
        backend: Backend,
        tokenizer: Tokenizer | None = None,
        stop_ids: frozenset[int] = frozenset(),
        notes: Sequence[str] = (),
        cautions: Sequence[str] = (),
        mesh: Mesh | None = None,
        draft: Draft | None = None,
    ) -> None:
        """`notes`: what loading left out knowingly. `cautions`: risks that its user should know.

        `mesh`: the processes that share the model; all must call the engine alike. `draft`: the
        model that drafts under `speculate="draft"`, on the same device.
        """
        self.mesh = mesh or Mesh()
        self.model, self.backend, self.config = model, backend, model.config
        self.runner = Runner(model, backend)
        self.drafter: Drafter | None = None
        if backend.speculate == "mtp":
            self.drafter = MTPDrafter(self.runner)
        check_given(backend, draft is not None)
        if draft is not None:
            self.drafter = ModelDrafter(self.runner, draft)
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self.notes, self.cautions = list(notes), list(cautions)
        self.start_up = StartUp(backend)
        self._kept: Cache | None = None

    def __repr__(self) -> str:
        c, count = self.config, sum(p.numel() for p in self.model.parameters())
        model = f"{c.model_type}, {c.num_hidden_layers} layers, {count:,} parameters"
        return f"<r1.Engine: {model}; {self.backend.describe()}>"

    def logits(self, tokens: Tensor) -> Tensor:
        """int64 (B, S) -> fp32 (B, S, W): each position's logits for the next token; no cache."""
        check_tokens(tokens)
        check_rows(tokens.tolist(), self.config)
        return self.runner.logits(tokens).clone()  # a normal tensor, not one of inference mode

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
        vocabulary.
        """
        sampler = Sampler(temperature, top_p, seed)
        wanted = max_new_tokens
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
            raise InputError(f"max_new_tokens={wanted!r}: give a whole number of at least 1")
        if not isinstance(prompts, Sequence) or not all(isinstance(p, Sequence) for p in prompts):
            takes = "generate takes a list of prompts, each a list of token ids"
            raise InputError(f"{takes}: [[0, 5, 7]], not [0, 5, 7]")
        rows = [list(prompt) for prompt in prompts]
        check_rows(rows, self.config)
        limit = min(wanted, room_for_answers(rows, self.config))
        stop_ids = frozenset[int]() if ignore_stop else self.stop_ids
        drafts = self.drafter.count if self.drafter else 0
        self._agree(rows, limit, sampler)
        collector = Collector(rows, limit, stop_ids, drafts)
        cache = self.mesh.together(lambda: self._take_cache(len(rows), max(map(len, rows)) + limit))
        if self.start_up.run(rows, sampler, cache, self.steps):
            collector.begin(time.perf_counter() - collector.start)
        for step in self.steps(rows, limit, sampler, cache):
            collector.add(step, on_tokens)
            if not collector.live:
                break
        if cache.graphs:
            self._kept = cache
        for completion in collector.completions:
            words = self._words(completion.tokens)
            completion.text = self.tokenizer.decode(words) if self.tokenizer else ""
        return collector.completions

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
        that it can't take.
        """
        if self.tokenizer is None:
            lacks = "this checkpoint has no tokenizer, so it can't chat"
            raise InputError(f"{lacks}: use generate with token ids")
        prompt = self.tokenizer.chat_prompt(list(messages), think=think)
        check_conversation(len(prompt), len(messages), self.config)
        splitter = self.tokenizer.splitter(think)

        def arrived(step: list[int | None]) -> None:
            if on_text and step[0] is not None and step[0] not in self.stop_ids:
                on_text(*splitter.push(step[0]))

        (completion,) = self.generate(
            [prompt], max_new_tokens, temperature, top_p, seed, on_tokens=arrived
        )
        if on_text:
            on_text(*splitter.flush())
        words = self._words(completion.tokens)
        completion.reasoning, completion.answer = self.tokenizer.split(words, think)
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
        """Continue `rows` until each has `limit` tokens; yields each step's new tokens.

        See generate.py. `cache` is one of `cache(...)`, and holds `depth` tokens a row.
        """
        if self.drafter is None:
            return steps(self.runner, rows, limit, sampler, cache, depth)
        return speculated_steps(self.drafter, rows, limit, sampler, cache, depth, assumed)

    def cache(self, rows: int, tokens: int) -> Cache:
        """A cache for `rows` rows of at least `tokens` tokens, and for drafts where they are made.

        With `tune`, launch parameters are searched for its shape, and for the model's own steps: a
        draft model runs with those that were found when it was tuned itself. Raises InputError
        where it would not fit the memory.
        """
        cache = (self.drafter or self.runner).cache(rows, tokens)
        if self.backend.tune:
            from r1.run.tune import tune  # Triton is optional

            tune(self.runner, cache)
        return cache

    def _agree(self, rows: list[list[int]], limit: int, sampler: Sampler) -> None:
        """Where devices share the model: make sure that all go on alike, and draw alike."""
        if self.mesh.ranks == 1:
            return
        asked = (rows, limit, sampler.temperature, sampler.top_p, sampler.seed)
        advice = "call generate with the same on every rank"
        self.mesh.check_alike("the prompts or the sampler", asked, advice)
        if sampler.seed is None:
            sampler.seed = self.mesh.shared(torch.Generator().seed() % 2**63)

    def _take_cache(self, rows: int, tokens: int) -> Cache:
        """A call's cache. The last captured call's is kept with its graphs, if it has this size."""
        kept, self._kept = self._kept, None
        if kept:
            if (kept.rows, kept.capacity) == (self.drafter or self.runner).cache_size(rows, tokens):
                kept.reset()
                return kept
            del kept
            torch.cuda.empty_cache()  # so that there is room for another
        return self.cache(rows, tokens)

    def _words(self, tokens: list[int]) -> list[int]:
        """The tokens without the stop token."""
        return tokens[:-1] if tokens and tokens[-1] in self.stop_ids else tokens
