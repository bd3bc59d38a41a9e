"""How a phase runs the model's parts: as they are, compiled, or fused by hand.

Prompts and decode steps choose separately. The captured and the autocast call are around these:
see callers.py.

Shapes: B rows, S tokens of a row, D hidden_size, W vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from r1.errors import InputError, setting
from r1.model.cache import Cache, LayerCache
from r1.model.mtp import MTPLayer
from r1.model.step import Step
from r1.model.transformer import Transformer
from r1.run.sampler import greedy
from r1.storage import activations
from r1.storage.activations import FROM_TOKENS, NEVER
from r1.switches.backend import Backend

if TYPE_CHECKING:
    from r1.kernels.chip import Chip  # Triton is optional

Block = Callable[..., Tensor]


class Eager:
    """The model as it is written."""

    def __init__(self, model: Transformer, least: int = NEVER) -> None:
        """`least`: from so many tokens on a call's projections get rounded inputs. (Experts have a
        strategy that does: model/rounded.py.)
        """
        self.model, self.least = model, least

    def block(self, block: nn.Module) -> Block:
        """A decoder layer, ready to be called."""
        return self.rounding(block)

    def rounding(self, block: Block) -> Block:
        """A block whose step brings the products that a call of its tokens takes."""
        if self.least == NEVER:
            return block

        def call(x: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
            return block(x, self.given(step), cache)

        return call

    def given(self, step: Step) -> Step:
        """The step, with products that round their inputs if it has so many tokens."""
        rounds = step.positions.numel() >= self.least
        return replace(step, multiply=activations.multiply) if rounds else step

    def mtp(self, layer: MTPLayer) -> Block:
        """An MTP layer, ready to be called."""
        return partial(layer, block=self.block(layer.block))

    def head(self, hidden: Tensor) -> Tensor:
        """Normed hidden states (B, S, D) -> logits (B, S, W)."""
        return self.model.lm_head(hidden)

    def norm_and_head(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, S, D), not normed yet -> logits (B, S, W)."""
        return self.head(self.model.norm(hidden))

    def likeliest(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """fp32 logits (..., W) -> each row's best token, into `tokens`, int64 (...); its logit,
        fp32 (...).
        """
        best, scores = greedy(logits)
        tokens.copy_(best)
        return scores

    def next_step(self, cache: Cache, tokens: int, grow: bool) -> Step:
        """A decode step for `tokens` tokens of each row, after those that the cache holds. With
        `grow` the cache's lengths count these, too, from now on.
        """
        offsets = torch.arange(tokens, device=cache.lengths.device)
        step = self.model.step("decode", cache.lengths[:, None] + offsets, cache.capacity)
        if grow:
            cache.lengths += tokens
        return step


class Compiled(Eager):
    """Blocks under torch.compile."""

    def __init__(
        self, model: Transformer, phase: str, device: torch.device, least: int = NEVER
    ) -> None:
        super().__init__(model, least)
        from r1.run.compiled import compile_block  # the compiler takes seconds to import

        self.compile = partial(compile_block, phase=phase, device=device)

    def block(self, block: nn.Module) -> Block:
        return self.rounding(self.compile(block))

    def mtp(self, layer: MTPLayer) -> Block:
        compiled = self.compile(layer)
        if self.least == NEVER:
            return compiled

        def call(embedding: Tensor, hidden: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
            return compiled(embedding, hidden, self.given(step), cache)

        return call


class Fused(Eager):
    """Blocks, output head and the start of a step as hand-written kernels (r1/kernels)."""

    def __init__(
        self, model: Transformer, device: torch.device, *, tune: bool, least: int = NEVER
    ) -> None:
        super().__init__(model, least)
        from r1.kernels.block import DecodeBlock, output_head  # Triton is optional
        from r1.kernels.chip import Chip
        from r1.kernels.greedy import likeliest
        from r1.kernels.step import begin_step

        self.chip = Chip.of(device)
        if tune:
            from r1.kernels import launches

            tuned = launches.load(torch.cuda.get_device_name(device))
            self.chip = replace(self.chip, tuned=tuned, asked={})
        self.fused = partial(DecodeBlock, chip=self.chip, least=least)
        self.why_not = DecodeBlock.why_not
        self.begin, self.output_head, self.best = begin_step, output_head, likeliest

    def block(self, block: nn.Module) -> Block:
        if why := self.why_not(block):
            raise InputError(f"{setting('kernels', 'triton')}: {why}")
        return cast(Block, self.fused(block))

    def head(self, hidden: Tensor) -> Tensor:
        return self.output_head(self.model.lm_head, self.chip, hidden)

    def norm_and_head(self, hidden: Tensor) -> Tensor:
        return self.output_head(self.model.lm_head, self.chip, hidden, self.model.norm)

    def likeliest(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return self.best(self.chip, logits, tokens)

    def next_step(self, cache: Cache, tokens: int, grow: bool) -> Step:
        frequency, factor = self.model.frequency, self.model.table_factor
        interleave = self.model.config.attention.rope_interleave
        positions, cos, sin = self.begin(
            self.chip, cache.lengths, tokens, frequency, factor, interleave, grow
        )
        # The fused blocks read `positions` before their wait. The embedding, a kernel of torch,
        # separates them from begin_step.
        return Step("decode", positions, cos, sin, cache.numbers)


class Unpacking(Eager):
    """The model as it is written or compiled, but its packed weights are multiplied by our kernels.

    The product comes with each call, in its Step. The model itself does not change, so other
    runners of the same model keep their own.
    """

    def __init__(
        self, model: Transformer, chip: Chip, *, rounded: bool = False,
        compiled: Compiled | None = None,
    ) -> None:  # fmt: skip
        """`rounded`: whether projections get rounded inputs. Then every prompt's are. `compiled`
        compiles the blocks, if it is given.
        """
        super().__init__(model)
        from r1.kernels.prompt import multiply  # Triton is optional
        from r1.kernels.prompt_block import fused

        self.plain = partial(multiply, chip)
        self.multiply = partial(multiply, chip, round_x=True) if rounded else self.plain
        self.compile = compiled.compile if compiled else lambda block: block
        self.fused = partial(fused, chip) if rounded else lambda block: block

    def block(self, block: nn.Module) -> Block:
        inner = self.compile(self.fused(block))

        def call(x: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
            return cast(Tensor, inner(x, replace(step, multiply=self.multiply), cache))

        return call

    def head(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.model.lm_head(hidden, self.plain))


def ways_of(model: Transformer, backend: Backend, device: torch.device) -> dict[str, Eager]:
    """The way of each phase, as the resolved switches say."""
    rounds = backend.quant_activations != "none"
    least = FROM_TOKENS if rounds else dict.fromkeys(FROM_TOKENS, NEVER)
    if backend.compile:
        ways: dict[str, Eager] = {p: Compiled(model, p, device, n) for p, n in least.items()}
    else:
        ways = {phase: Eager(model, tokens) for phase, tokens in least.items()}
    if backend.kernels == "triton":
        fused = Fused(model, device, tune=backend.tune, least=least["decode"])
        ways["decode"] = fused
        prompts = ways["prefill"]
        compiled = prompts if isinstance(prompts, Compiled) else None
        ways["prefill"] = Unpacking(model, fused.chip, rounded=rounds, compiled=compiled)
    return ways
