"""A small model as the drafter of a larger one of the same vocabulary.

Its layers of the cache lie after the model's, in the same rows and slots: a token stands at the
same position in both. Lengths are shared too. One turn, as speculate.py draws it:

    position       ...  L-1    L      L+1    L+2
    model reads                t      d_1    d_2   d_1 is accepted, and n is new: L grows by 2
    draft has read ...         t      d_1          it never read its last draft
    draft reads                       d_1    n     the last two tokens, and drafts d'_1
    draft reads                                d'_1  at L+3, and drafts d'_2

*The draft reads the last two tokens of each row at the start of every turn.* If all drafts were
accepted, it has not read the one before the last. If not, it reads that token once more, and writes
the same entry again. So every row has the same two tokens to read, and no row needs a look on the
host. Entries of rejected drafts stand from the last token on: this pass and the next ones overwrite
them, and until then no token sees them, because each sees the slots up to its own.

Shapes: B rows, S tokens of a row, k drafts, D' the draft's hidden_size, W the model's vocab_size,
V the draft's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.model.cache import Cache, LayerCache
from r1.model.step import Step
from r1.model.transformer import Transformer
from r1.run.drafter import Judged
from r1.run.runner import Runner
from r1.switches.backend import Backend


@dataclass(frozen=True)
class Draft:
    """A model that drafts for another one."""

    model: Transformer
    backend: Backend
    """Resolved for this model (switches/draft.py)."""
    ids: frozenset[int] | None = None
    """The ids that it may draft: those of both tokenizers. None: no tokenizer is known, and it may
    draft each id that both models have."""


class ModelDrafter:
    """Drafts with a model of its own; see Drafter for its methods."""

    def __init__(self, runner: Runner, draft: Draft) -> None:
        self.runner, self.count = runner, runner.backend.draft_tokens
        self.draft = Runner(draft.model, draft.backend)
        both = min(runner.config.vocab_size, self.draft.config.vocab_size)
        ids = range(both) if draft.ids is None else [each for each in draft.ids if each < both]
        blocked = torch.ones(runner.config.vocab_size, dtype=torch.bool)  # (W,)
        blocked[list(ids)] = False
        self.blocked = blocked.to(runner.device)
        """The ids that are never drafted."""

    @property
    def backend(self) -> Backend:
        """The draft's own switches, resolved."""
        return self.draft.backend

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in the draft's layers of the cache."""
        return self.draft.token_bytes()

    def cache(self, rows: int, tokens: int) -> Cache:
        return self.runner.cache(rows, tokens + self.count, beside=self.draft)

    def cache_size(self, rows: int, tokens: int) -> tuple[int, int]:
        return self.runner.cache_size(rows, tokens + self.count)

    def along(
        self, tokens: Tensor, following: Tensor, hidden: Tensor, step: Step,
        layers: list[LayerCache],
    ) -> None:  # fmt: skip
        slots = 0 if step.starts_rows else layers[0][0].shape[1]
        self._read(tokens, self.draft.model.step("prefill", step.positions, slots), layers)

    def first(self, judged: Judged, cache: Cache) -> Tensor:
        place = judged.last[:, None]
        pair = (judged.tokens.gather(1, place), judged.following.gather(1, place))  # (B, 1) each
        # A row of length 0, which a captured cache may have, has no token: it reads two of no use.
        start = (cache.lengths - 1).clamp(min=0)[:, None]  # (B, 1)
        positions = torch.cat((start, start + 1), dim=1)  # (B, 2)
        return self._decode(torch.cat(pair, dim=1), positions, cache)[:, 1:]  # (B, 1, D')

    def again(self, draft: Tensor, state: Tensor, number: int, cache: Cache) -> Tensor:
        return self._decode(draft, cache.lengths[:, None] + number, cache)

    def logits(self, state: Tensor) -> Tensor:
        missing = self.runner.config.vocab_size - self.draft.config.vocab_size
        logits = F.pad(self.draft.lm_head(state).float(), (0, missing))  # (B, 1, V) -> (B, 1, W)
        return logits.masked_fill(self.blocked, -math.inf)

    def _decode(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """The draft reads int64 (B, S) at `positions` (B, S); returns hidden states (B, S, D')."""
        step = self.draft.model.step("decode", positions, cache.capacity)
        return self._read(tokens, step, cache.layers)

    def _read(self, tokens: Tensor, step: Step, layers: list[LayerCache]) -> Tensor:
        own = layers[self.runner.config.num_hidden_layers :]
        # The model's ids that the draft lacks stand for one that it has: they cost it a good draft.
        tokens = tokens.clamp(max=self.draft.config.vocab_size - 1)
        return self.draft.model(tokens, step, own, self.draft.blocks[step.phase])
