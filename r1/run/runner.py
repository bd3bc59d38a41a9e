"""One model and one way to call it: prompts and decode steps over a cache.

Shapes: B rows, S tokens of a row, W vocab_size, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.device import DTYPES, available_bytes, torch_device
from r1.errors import InputError, setting
from r1.model.cache import Cache, LayerCache, bytes_per_token
from r1.model.config import Config
from r1.model.step import Step
from r1.model.strategy import Attention
from r1.model.transformer import Block, Transformer
from r1.placement.streamed import StreamedExperts
from r1.run.callers import Caller, Captured, Plain
from r1.run.sampler import Sampler
from r1.run.ways import ways_of
from r1.switches.backend import Backend
from r1.switches.strategies import attention_of

MOST_TOKENS = 2**16
"""Tokens of all rows together in a prefill call: its activations must fit beside the weights."""
CHUNK = {"bias": 2048}
"""Tokens of a row in a prefill call, by what attention needs: scores and fp32 bias are in
memory."""
FUSED_CHUNK = 8192
"""The same for fused attention; grouped experts want prompts whole, too."""
SMALL_CHUNK = 256
"""Tokens of a row for which stages do not split a prompt further: its products would be small."""

Along = Callable[[Tensor, Tensor, Tensor, Step, list[LayerCache]], object]
"""Runs along with a prompt: `along(tokens, following tokens, hidden states, step, cache layers)`.
"""


def round_rows(rows: int) -> int:
    """Rows of a cache whose steps are captured: a power of two, so few graphs serve all batches."""
    return 2 ** (rows - 1).bit_length()


def round_capacity(tokens: int) -> int:
    """Capacity of a cache for `tokens`: four sizes an octave, as each one is compiled anew."""
    step = max(128, 2 ** (tokens.bit_length() - 1) // 4)
    return -(-tokens // step) * step


def chunk_of(strategy: Attention, rows: int) -> int:
    """Tokens of a row in one prefill call of `rows` rows, with this attention."""
    return max(1, min(CHUNK.get(strategy.needs or "", FUSED_CHUNK), MOST_TOKENS // rows))


class Runner:
    """Calls a model as the resolved switches say."""

    def __init__(
        self,
        model: Transformer,
        backend: Backend,
        prefill_chunk: int | None = None,
    ) -> None:
        self.model, self.backend = model, backend
        self.config: Config = model.config
        self.device = torch_device(backend.device)
        table = attention_of(self.config.attention)
        strategy = table[backend.prefill_attention]
        self.prefill_chunk = prefill_chunk or chunk_of(strategy, rows=1)
        # Of the heads that this device has (r1/placement).
        shape = cast(Block, model.layers[0]).self_attn.shape
        self.entry = table[backend.attention].entry(shape)
        self.cache_dtype = DTYPES[backend.dtype]
        self.ways = ways_of(model, backend, self.device)
        self.blocks = {p: [way.block(b) for b in model.layers] for p, way in self.ways.items()}
        self.plain = Plain(backend, self.device)
        self.context = self.plain.context
        streamed = (each for each in model.modules() if isinstance(each, StreamedExperts))
        self.link = next((each.link for each in streamed), None)
        captured = {"prefill": backend.prefill_graphs, "decode": backend.cuda_graphs}
        self.callers: dict[str, Caller] = {
            phase: Captured(self.plain, self.link) if asked else self.plain
            for phase, asked in captured.items()
        }

    def cache_size(self, rows: int, tokens: int) -> tuple[int, int]:
        """The rows and the capacity of `cache`."""
        return round_rows(rows) if self.backend.cuda_graphs else rows, round_capacity(tokens)

    def token_bytes(self, extra_layers: int = 0) -> int:
        """Bytes of one token in the cache, in the model's layers and some more of their kind."""
        layers = len(self.model.layers) + extra_layers
        return bytes_per_token(self.entry, self.cache_dtype, layers)

    def cache(
        self, rows: int, tokens: int, extra_layers: int = 0, beside: Runner | None = None
    ) -> Cache:
        """A cache for `rows` rows of at least `tokens` tokens, in the model's layers and some more.

        After these come the layers of the model `beside`. Raises InputError where it would not fit
        the memory.
        """
        rows, capacity = self.cache_size(rows, tokens)
        layers = len(self.model.layers) + extra_layers
        needed = self.token_bytes(extra_layers) + (beside.token_bytes() if beside else 0)
        needed *= rows * capacity
        available = available_bytes(self.device)
        if needed > available:
            fewer = f"fewer or shorter prompts, or a smaller {setting('max_new_tokens')}"
            free = f"{available / 1e9:.1f} GB are free: use {fewer}"
            whose = " (the draft's included)" if beside else ""
            size = f"the cache of {rows} x {capacity} tokens{whose} needs {needed / 1e9:.1f} GB"
            raise InputError(f"{size} and {free}")
        dtype = self.cache_dtype
        cache = Cache(self.entry, rows, capacity, layers, device=self.device, dtype=dtype)
        if beside:
            layers = beside.config.num_hidden_layers
            cache.extend(beside.entry, layers, beside.cache_dtype)
        return cache

    def logits(self, tokens: Tensor) -> Tensor:
        """int64 (B, S) -> fp32 (B, S, W): one causal forward, without a cache."""
        with self.context():
            tokens = tokens.to(self.device)
            positions = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
            step = self.model.step("prefill", positions, 0)
            hidden = self.model(tokens, step, None, self.blocks["prefill"])
            return self.lm_head(hidden, "prefill").float()

    def prefill(self, prompts: list[list[int]], cache: Cache, depth: int = 0) -> Tensor:
        """Read prompts of any lengths, in chunks; returns each row's next logits, fp32 (B, W).

        Every row of the cache holds `depth` tokens before, and its prompt after them afterwards.
        """
        hidden = self.read(prompts, cache, depth)
        with self.context():
            return self.lm_head(hidden, "prefill").float()

    def read(
        self,
        prompts: list[list[int]],
        cache: Cache,
        depth: int = 0,
        along: Along | None = None,
    ) -> Tensor:
        """`prefill` without the output head: each row's last hidden state (B, D).

        Shorter rows are padded at their end: no real token sees the padding, and its cache entries
        lie after the row's length. With prefill_graphs every row is padded, to one of a few
        lengths. `along` reads the same chunks, with the token that follows each one. The token
        after a row's last is not known yet; `along` gets 0 there.
        """
        with torch.inference_mode():
            longest = max(map(len, prompts))
            if depth + longest > cache.capacity:
                more = f"are more than the cache's {cache.capacity}: make a larger one"
                raise InputError(f"{depth + longest} tokens {more}")
            width = longest
            if self.backend.prefill_graphs:
                width = min(round_capacity(longest), cache.capacity - depth)
            padded = [prompt + [0] * (width - len(prompt)) for prompt in prompts]
            tokens = torch.tensor(padded, dtype=torch.int64, device=self.device)  # (B, width)
            following = F.pad(tokens[:, 1:], (0, 1))  # (B, width)
            sizes = [len(prompt) for prompt in prompts]
            lengths = torch.tensor(sizes, dtype=torch.int64, device=self.device)  # (B,)
            final = None
            chunk = self._chunk(len(prompts), longest)
            for start in range(0, longest, chunk):
                piece = slice(start, min(width, start + chunk))
                last = (lengths - 1 - start).clamp(0, piece.stop - start - 1)
                inputs = tokens[:, piece], following[:, piece], last
                key = ("prefill", *inputs[0].shape, depth + start, along is not None)
                read = partial(self._read, depth + start, along)
                (state,) = self.callers["prefill"](key, read, inputs, cache)
                fresh = (lengths > start)[:, None]
                final = state.clone() if final is None else torch.where(fresh, state, final)
            cache.lengths[: len(prompts)].copy_(lengths + depth)
            if self.backend.memory == "empty-cache":
                torch.cuda.empty_cache()
            assert final is not None  # no prompt is empty
            return final

    def _chunk(self, rows: int, longest: int) -> int:
        """Tokens of a row in one call, for prompts of at most `longest` tokens.

        Where layers lie on several stages, these read different chunks at a time: with four chunks
        a stage, m = 4 p, a prompt takes (m + p - 1) / m of the time without waiting, at most 1.25.
        """
        chunk = max(1, min(self.prefill_chunk, MOST_TOKENS // rows))
        stages = self.backend.pp
        return chunk if stages == 1 else min(chunk, max(SMALL_CHUNK, -(-longest // (4 * stages))))

    def _read(
        self, at: int, along: Along | None, tokens: Tensor, following: Tensor, last: Tensor,
        cache: Cache,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """A chunk of prompts, int64 (B, S), which stands at place `at` of each row.

        Returns the hidden states (B, D) of its tokens `last` (B,).
        """
        rows, stop = tokens.shape[0], at + tokens.shape[1]
        positions = torch.arange(at, stop, device=self.device).expand(rows, -1)
        step = self.model.step("prefill", positions, stop if at else 0)
        layers = cache.first(rows, stop)
        hidden = self.model(tokens, step, layers, self.blocks["prefill"])
        if along:
            along(tokens, following, hidden, step, layers)
        return (hidden[torch.arange(rows, device=self.device), last],)

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """One step: tokens (B, S) follow each row's; returns fp32 logits (B, S, W); rows grow.

        With cuda_graphs the logits are the graph's own memory, which the next step overwrites.
        Rows of the cache beyond B are computed and discarded.
        """
        rows, tokens = len(tokens), self._all_rows(tokens, cache)
        key = ("decode", *tokens.shape)
        (logits,) = self.callers["decode"](key, self._decode, (tokens,), cache)
        return logits[:rows]

    def next_tokens(self, tokens: Tensor, cache: Cache, sampler: Sampler) -> tuple[Tensor, Tensor]:
        """One step and its choices: tokens (B, 1) -> the next tokens (B, 1), and the numbers that
        chose them, fp32 (B, 1).

        A captured step chooses itself where it is greedy, and writes the choice where it reads its
        input. So a row of steps is a row of replays. The next step overwrites these tensors.
        """
        if sampler.temperature or not self.backend.cuda_graphs:
            return sampler(self.decode(tokens, cache))

        def step(tokens: Tensor, cache: Cache) -> tuple[Tensor, ...]:
            (logits,) = self._decode(tokens, cache)
            return tokens, self.ways["decode"].likeliest(logits, tokens)

        rows = len(tokens)
        given = self._all_rows(tokens, cache)
        key = ("decode", *given.shape, "greedy")
        chosen, scores = self.callers["decode"](key, step, (given,), cache)
        return (chosen, scores) if rows == cache.rows else (chosen[:rows], scores[:rows])

    def _all_rows(self, tokens: Tensor, cache: Cache) -> Tensor:
        """A step's tokens, with zeros for rows that only a captured step has."""
        if not self.backend.cuda_graphs or cache.rows == len(tokens):
            return tokens
        return F.pad(tokens, (0, 0, 0, cache.rows - len(tokens)))

    def _decode(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, ...]:
        step = self.next_step(cache, tokens.shape[1], grow=True)
        hidden = self.model(tokens, step, cache.layers, self.blocks["decode"], normed=False)
        return (self.ways["decode"].norm_and_head(hidden).float(),)

    def lm_head(self, hidden: Tensor, phase: str = "decode") -> Tensor:
        """The output head as a phase runs it: (B, S, D) -> (B, S, W); a prompt's (B, D) too."""
        return self.ways[phase].head(hidden)

    def next_step(self, cache: Cache, tokens: int, grow: bool = False) -> Step:
        """A decode step for `tokens` tokens of each row, after those that the cache holds. With
        `grow` the cache's lengths count these, too, from now on.
        """
        return self.ways["decode"].next_step(cache, tokens, grow)

    def call(
        self, key: tuple[Any, ...], step: Any, inputs: tuple[Tensor, ...], cache: Cache
    ) -> tuple[Tensor, ...]:
        """Run `step(*inputs, cache)` as decode steps are run: captured under cuda_graphs."""
        return self.callers["decode"](key, step, inputs, cache)
