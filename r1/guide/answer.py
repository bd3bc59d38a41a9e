"""Everything about one model on one kind of machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from r1.footprint import Footprint, Sizes
from r1.guide import fit
from r1.guide.cost import Cost, Terms, cost
from r1.guide.gpus import Gpu, all_gpus
from r1.guide.measured import Measured
from r1.guide.predict import Predictor, Times
from r1.guide.setup import ON_DEVICE, Places, Setup
from r1.model.config import Config

MEASURED_ROWS = 32
"""The largest batch that was measured. Where a machine's rate of matrix products has no source, no
larger one is predicted: there arithmetic may take longer than memory."""


@dataclass(frozen=True)
class Speed:
    """One batch: its sizes, times and cost."""

    sizes: Sizes
    times: Times
    cost: Cost | None
    """None: no time is expected, for nothing was measured of such a layout and device."""
    least_cost: Cost | None = None
    """At the floor: what it costs if nothing is lost."""

    @property
    def floor_tokens_per_s(self) -> float:
        """Of all rows, at the floor."""
        return self.sizes.rows * 1e3 / self.times.floor_tpot_ms

    @property
    def tokens_per_s(self) -> float | None:
        """Of all rows, as expected."""
        tpot = self.times.expected_tpot_ms
        return self.sizes.rows * 1e3 / tpot if tpot else None


@dataclass(frozen=True)
class Answer:
    """One model on one kind of machine, in its best layout. `setup` None: it does not fit."""

    name: str
    gpu: Gpu
    setup: Setup | None
    memory: Footprint | None = None
    most_rows: int = 0
    longest: int = 0
    """The most tokens of one row."""
    speeds: tuple[Speed, ...] = ()
    """At the batch that was asked for and, if that is another one, at the best batch."""
    why_not: str = ""
    """Why it does not fit, if that is not the memory."""
    cut: bool = False
    """The rows that were asked for are longer than the model's context."""

    @property
    def first(self) -> Speed:
        """At the batch that was asked for."""
        return self.speeds[0]

    @property
    def best(self) -> Speed:
        """At the batch that makes most tokens."""
        return self.speeds[-1]

    @property
    def purchase_usd(self) -> float | None:
        """Of all machines together."""
        price = self.gpu.get("purchase_usd")
        return price * self.setup.count if price and self.setup else None


@dataclass(frozen=True)
class Question:
    """What is asked of every model and machine alike."""

    sizes: Sizes
    quant: str | None
    count: int | None
    terms: Terms
    predictor: Predictor
    places: Sequence[Places] = (ON_DEVICE, Places("host"))
    """Where experts may lie: the first that fits. In RAM beside one GPU if no number of them is
    enough."""

    def ask(self, name: str, config: Config, gpu: Gpu) -> Answer:
        """The answer for one model and one kind of machine."""
        sizes = within(self.sizes, config)
        found: list[Setup] = []
        for places in self.places:
            found = found or fit.fitting(name, config, gpu, self.quant, self.count, sizes, places)
        if not found:
            why = fit.why_not(config, gpu, self.quant, self.places) or fit.short_ram(
                name, config, gpu, self.quant, self.count, sizes, self.places[-1]
            )
            return Answer(name, gpu, None, why_not=why)
        setup = min(found, key=lambda each: self._order(each, sizes))
        most = fit.most_rows(setup, sizes)
        known = most if gpu.get("bf16_tflop_s") else min(most, MEASURED_ROWS)
        rows = [sizes.rows, *(2**n for n in range(known.bit_length()) if 2**n > sizes.rows)]
        speeds = [self.speed(setup, replace(sizes, rows=each)) for each in rows]
        return Answer(
            name, gpu, setup, setup.memory(sizes), most, fit.longest(setup, sizes.rows),
            _two(speeds), cut=sizes != self.sizes,
        )  # fmt: skip

    def speed(self, setup: Setup, sizes: Sizes) -> Speed:
        """Times and cost of one batch."""
        speed = Speed(sizes, self.predictor.times(setup, sizes), None)
        least = cost(setup.gpu, setup.count, speed.floor_tokens_per_s, self.terms)
        if speed.tokens_per_s is None:
            return replace(speed, least_cost=least)
        share = power_share(speed.times.step_row)
        found = cost(setup.gpu, setup.count, speed.tokens_per_s, self.terms, share)
        return replace(speed, cost=found, least_cost=least)

    def _order(self, setup: Setup, sizes: Sizes) -> float:
        times = self.predictor.times(setup, sizes)
        return times.expected_tpot_ms or times.floor_tpot_ms


def power_share(row: Measured | None) -> float | None:
    """The share of its board's power that a measured row took; None if either is not known."""
    named = [gpu for gpu in all_gpus().values() if row and gpu.machine == row.machine]
    if not (row and row.mean_power_w and named):
        return None
    return row.mean_power_w / named[0].figures["board_w"]


def _two(speeds: Sequence[Speed]) -> tuple[Speed, ...]:
    """The first, and the one of the highest rate, if that is another one."""
    best = max(speeds, key=lambda each: each.tokens_per_s or each.floor_tokens_per_s)
    return (speeds[0],) if best is speeds[0] else (speeds[0], best)


def within(sizes: Sizes, config: Config) -> Sizes:
    """The sizes, shortened to a model's context where that is less."""
    context = config.max_position_embeddings
    if sizes.tokens <= context:
        return sizes
    prompt = max(1, sizes.prompt * context // sizes.tokens)
    return replace(sizes, prompt=prompt, new=context - prompt, depth=0)
