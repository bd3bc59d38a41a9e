"""How one step is called: the model as it is, under autocast, or with its blocks compiled.

Shapes: B batch, S sequence, W vocab_size, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from r1.device import DTYPES, available_bytes, torch_device
from r1.errors import InputError
from r1.model.cache import Cache, LayerCache, bytes_per_token
from r1.model.config import Config
from r1.model.mtp import MTPLayer
from r1.model.transformer import Step, Transformer
from r1.run.graphs import Call, capture
from r1.switches.backend import Backend

if TYPE_CHECKING:
    from r1.kernels import Chip


MOST_TOKENS = 2**16
"""What a prefill call reads of all rows together: its activations must fit beside the weights."""


def round_rows(rows: int) -> int:
    """The rows of a cache whose decode step is captured: a power of two, so that few graphs serve
    all batches."""
    return 2 ** (rows - 1).bit_length()


def round_capacity(tokens: int) -> int:
    """A cache's capacity for at least `tokens`: each is a shape of its own to compile, so there are
    four an octave."""
    step = max(128, 2 ** (tokens.bit_length() - 1) // 4)
    return -(-tokens // step) * step


class Runner:
    """One model and one way to call it."""

    def __init__(
        self, model: Transformer, backend: Backend, prefill_chunk: int | None = None
    ) -> None:
        self.model, self.backend = model, backend
        # Fused attention and grouped experts want prompts whole; naive's scores are as many as the
        # chunk times the context.
        self.prefill_chunk = prefill_chunk or (
            2048 if backend.prefill_attention == "naive" else 8192
        )
        self.config: Config = model.config
        self.device = torch_device(backend.device)
        self.full_cache, self.cache_dtype = backend.attention == "naive", DTYPES[backend.dtype]
        if backend.memory == "expandable":
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        self.blocks: dict[str, list[Callable[..., Tensor]]] = {
            p: list(model.layers) for p in ("prefill", "decode")
        }
        # The drafter of `speculate` (speculate.py): R1 has one MTP layer; of a model with several
        # the first is used.
        self.drafts = backend.draft_tokens if backend.speculate == "mtp" else 0
        self.drafter: dict[str, Callable[..., Tensor]] = (
            {p: model.mtp[0] for p in self.blocks} if self.drafts else {}
        )
        self.lm_head: Callable[[Tensor], Tensor] = model.lm_head
        """A decode step's; prompts have the model's own."""
        if backend.compile:
            from r1.run.compiled import (
                compile_block,  # the compiler takes seconds to import, so only who uses it does
            )

            # Each shape of a decode step is compiled anew, and where this limit is reached,
            # fullgraph makes it an error.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            for phase in self.blocks:
                self.blocks[phase] = [
                    compile_block(block, phase, self.device) for block in model.layers
                ]
            for phase in self.drafter:
                self.drafter[phase] = compile_block(model.mtp[0], phase, self.device)
        self.chip: Chip | None = None
        self.begin_step: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
        """Where a decode step's tokens stand, and the rotation there, in one kernel; None:
        model.py's own operators."""
        if backend.kernels == "triton":
            from r1.kernels import (  # Triton is optional: only who asks for it imports it
                Chip,
                DecodeBlock,
                begin_step,
                head,
            )

            self.chip = Chip.of(self.device)
            if backend.tune:
                from r1.kernels import tune

                self.chip = replace(
                    self.chip, tuned=tune.load(torch.cuda.get_device_name(self.device)), asked={}
                )
            self.begin_step = partial(begin_step, self.chip)
            self.lm_head = partial(head, model.lm_head, self.chip)
            self.blocks["decode"] = [DecodeBlock(block, self.chip) for block in model.layers]
            if self.drafter:
                mtp = cast(MTPLayer, model.mtp[0])
                self.drafter["decode"] = partial(mtp, block=DecodeBlock(mtp.block, self.chip))

    def cache_size(self, rows: int, tokens: int) -> tuple[int, int]:
        """The rows and the capacity of `cache`."""
        return round_rows(rows) if self.backend.cuda_graphs else rows, round_capacity(
            tokens + self.drafts
        )

    def cache(self, rows: int, tokens: int) -> Cache:
        """A cache for `rows` rows of at least `tokens` tokens, and what a last step may draft
        beyond them.

        Under `speculate` it has one layer more, the drafter's. Raises InputError where it would not
        fit the memory."""
        rows, capacity = self.cache_size(rows, tokens)
        layers = self.config.num_hidden_layers + (self.drafts > 0)
        dtype = self.cache_dtype
        needed = rows * capacity * bytes_per_token(self.config, dtype, self.full_cache, layers)
        available = available_bytes(self.device)
        if needed > available:
            raise InputError(
                f"the cache of {rows} x {capacity} tokens needs {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free: "
                "use fewer prompts, or shorter ones"
            )
        cache = Cache(
            self.config,
            rows,
            capacity,
            device=self.device,
            dtype=dtype,
            full=self.full_cache,
            layers=layers,
        )
        if self.backend.tune:
            from r1.kernels import tune

            tune.tune(self, cache)
        return cache

    @contextmanager
    def context(self) -> Iterator[None]:
        """What surrounds every call of the model."""
        amp = self.backend.amp
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, DTYPES.get(amp), enabled=amp != "off"),
        ):
            yield

    def logits(self, tokens: Tensor) -> Tensor:
        """int64 (B, S) -> fp32 (B, S, W): one full forward without a cache, each position seeing
        what is before it."""
        with self.context():
            tokens = tokens.to(self.device)
            positions = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
            hidden = self.model(
                tokens, self.model.step("prefill", positions, 0), None, self.blocks["prefill"]
            )
            return self.model.lm_head(hidden).float()

    def prefill(self, prompts: list[list[int]], cache: Cache, depth: int = 0) -> Tensor:
        """Read prompts of any lengths, by chunks; returns each row's next-token logits, fp32 (B,
        W).

        Every row of the cache holds `depth` tokens before, and its own prompt's behind them
        afterwards."""
        hidden = self.read(prompts, cache, depth)
        with self.context():
            return self.model.lm_head(hidden).float()

    def read(self, prompts: list[list[int]], cache: Cache, depth: int = 0) -> Tensor:
        """`prefill` without the output head: each row's last hidden state (B, D).

        Shorter rows are padded at their end: padding sees real tokens and no real token sees it,
        and what it leaves in the cache lies behind the row's length. Under `prefill_graphs` all
        are, so that few graphs serve all lengths. Where there is a drafter it reads along: its
        entry i is made of the hidden state at i and the token at i + 1, so each row's last one
        waits for a token that isn't known yet (and the one at `depth` - 1 was made without knowing
        this prompt)."""
        with torch.inference_mode():
            longest = max(map(len, prompts))
            if depth + longest > cache.capacity:
                raise InputError(
                    f"{depth + longest} tokens are more than the cache's {cache.capacity}: make a larger one"
                )
            width = (
                min(round_capacity(longest), cache.capacity - depth)
                if self.backend.prefill_graphs
                else longest
            )
            padded = [prompt + [0] * (width - len(prompt)) for prompt in prompts]
            tokens = torch.tensor(padded, device=self.device)  # (B, width)
            following = torch.nn.functional.pad(tokens[:, 1:], (0, 1))  # (B, width)
            lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
            final = None
            chunk = max(1, min(self.prefill_chunk, MOST_TOKENS // len(prompts)))
            for start in range(0, longest, chunk):
                stop = min(width, start + chunk)
                piece = (
                    tokens[:, start:stop],
                    following[:, start:stop],
                    (lengths - 1 - start).clamp(0, stop - start - 1),
                )
                key = ("prefill", *piece[0].shape, depth + start)
                (last,) = self.call(
                    key,
                    partial(self._read, depth + start),
                    piece,
                    cache,
                    self.backend.prefill_graphs,
                )
                final = (
                    last.clone()
                    if final is None
                    else torch.where((lengths > start)[:, None], last, final)
                )
            cache.lengths[: len(prompts)].copy_(lengths + depth)
            if self.backend.memory == "empty-cache":
                torch.cuda.empty_cache()
            assert final is not None  # no prompt is empty
            return final

    def _read(
        self, at: int, tokens: Tensor, following: Tensor, last: Tensor, cache: Cache
    ) -> tuple[Tensor, ...]:
        """A piece of prompts, int64 (B, S), which comes to stand at `at` in each row: the hidden
        states (B, D) at `last` (B,)."""
        rows, stop = tokens.shape[0], at + tokens.shape[1]
        positions = torch.arange(at, stop, device=self.device).expand(rows, -1)
        step = self.model.step("prefill", positions, stop if at else 0)
        layers = cache.head(rows, stop)
        hidden = self.model(tokens, step, layers, self.blocks["prefill"])
        if self.drafter:
            self.foresee(following, hidden, step, layers)
        return (hidden[torch.arange(rows, device=self.device), last],)

    def foresee(
        self, following: Tensor, hidden: Tensor, step: Step, layers: list[LayerCache]
    ) -> Tensor:
        """The drafter on int64 (B, S) tokens, each `following` one of the hidden states (B, S, D)
        -> hidden states (B, S, D), of which `lm_head` makes logits for the token after it. `layers`
        are the cache's, the drafter's last."""
        return self.drafter[step.phase](
            self.model.embed_tokens(following), hidden, step, layers[-1]
        )

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """One step: tokens (B, S) come to stand behind each row's; returns fp32 logits (B, S, W),
        and the rows grow.

        Under `cuda_graphs` the logits are the graph's own memory, which the next step overwrites,
        and rows that the cache has beyond B are decoded too, to nobody."""
        rows = tokens.shape[0]
        if self.backend.cuda_graphs:
            tokens = torch.nn.functional.pad(tokens, (0, 0, 0, cache.rows - rows))
        (logits,) = self.call(
            ("decode", *tokens.shape), self._decode, (tokens,), cache, self.backend.cuda_graphs
        )
        return logits[:rows]

    def _decode(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, ...]:
        step = self.behind(cache, tokens.shape[1])
        hidden = self.model(tokens, step, cache.layers, self.blocks["decode"])
        cache.lengths += tokens.shape[1]
        return (self.lm_head(hidden).float(),)

    def behind(self, cache: Cache, tokens: int) -> Step:
        """A decode step for so many tokens of each row, which come to stand behind those that the
        cache holds."""
        if self.begin_step:
            positions, cos, sin = self.begin_step(
                cache.lengths, tokens, self.model.frequency, self.model.table_factor
            )
            # Fused blocks know their rows. But behind an ordinary kernel they may read positions
            # before they wait.
            rows = torch.arange(cache.rows, device=self.device)[:, None]
            return Step("decode", positions, cos, sin, None, None, rows)
        positions = cache.lengths[:, None] + torch.arange(tokens, device=self.device)  # (B, S)
        return self.step(positions, cache)

    def step(self, positions: Tensor, cache: Cache) -> Step:
        """A decode step for tokens at `positions` (B, S); the kernels see by positions alone, and
        need no mask."""
        return self.model.step(
            "decode", positions, 0 if self.backend.attention == "triton" else cache.capacity
        )

    def call(
        self,
        key: tuple[Any, ...],
        step: Call,
        inputs: tuple[Tensor, ...],
        cache: Cache,
        captured: bool,
    ) -> tuple[Tensor, ...]:
        """`step(*inputs, cache)`; if `captured` recorded the first time that the cache meets `key`,
        and replayed from then on.

        `key` begins with what is done. Graphs of one kind share the memory of what they compute on
        the way."""

        def within(*arguments: Any) -> tuple[Tensor, ...]:
            with self.context():
                return step(*arguments)

        if not captured:
            return within(*inputs, cache)
        with torch.inference_mode():
            if key not in cache.graphs:
                pool = next(
                    (
                        made.graph.pool()
                        for other, made in cache.graphs.items()
                        if other[0] == key[0]
                    ),
                    None,
                )
                cache.graphs[key] = capture(within, inputs, cache, pool)
            outputs: tuple[Tensor, ...] = cache.graphs[key].replay(*inputs)
            return outputs
