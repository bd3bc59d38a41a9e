"""The least time of a step and of a prompt, and the time to expect.

The floor is bench.py's: bytes or operations of roofline.py, over the rates of rates.py. A machine
that was measured has its measured rates. Of another one the published rates are known, and the
measured machine's share of its own published ones is taken as this machine's too.

The time to expect of a step is

    its bytes and unpacking (steps.py) + layers x what a layer takes beside them + sums (links.py)

where the second term is that of the nearest measured row (measured.py). So a prediction starts from
one row, and says which. Nothing predicted is shown as measured. What a layer takes beside its bytes
is taken as it is for other machines too: it is kernels that start and wait, and their processors
differ less than memories do. Where experts lie elsewhere the floor, which is that of their copies,
stands for the first term. Where stages take turns, or a CPU computes, it is floor / share + sums:
the nearest row reached that share of its own floor.

A prompt that is not captured takes the longer of two times: the device's, floor / share of the
nearest row that waited for the device, and the host's, a layer's launches in the nearest row that
waited for the host, times the layers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from r1.bench.rates import Rates
from r1.footprint import Sizes
from r1.guide import links, measured
from r1.guide.gpus import Gpu, all_gpus, chip_of
from r1.guide.measured import Measured
from r1.guide.setup import Setup
from r1.guide.steps import Read, packed
from r1.model.config import AttentionShape
from r1.roofline import Work, expected_experts, step_work
from r1.run.runner import round_rows
from r1.storage.kinds import kind_of

DEVICE_SHARE = 0.5
"""A prompt that reached less of the floor's rates than that waited for the host."""


@dataclass(frozen=True)
class Times:
    """Milliseconds: the least, and the ones to expect, with the rows that these start from."""

    floor_tpot_ms: float
    floor_ttft_ms: float | None
    """None: the machine's rate of matrix products is not known, and nothing else is slower."""
    expected_tpot_ms: float | None
    """None: nothing was measured of such a layout on such a device."""
    expected_ttft_ms: float | None
    step_row: Measured | None
    prompt_row: Measured | None
    parts_ms: dict[str, float]
    """What each part of the machine takes for a step, at the least."""
    slots: int = 0
    """Experts of each layer on the device, where the others lie elsewhere."""
    only_floor: str | None = None
    """Why nothing is expected, whatever was measured."""
    staged_floor_ms: float | None = None
    """The least, if stages worked on parts of the batch at a time; None without stages."""

    @property
    def slowest(self) -> str:
        """The part of the machine that takes longest."""
        return max(self.parts_ms, key=lambda name: self.parts_ms[name])


@dataclass(frozen=True)
class Predictor:
    """Predicts from some measured rows."""

    rows: Sequence[Measured]
    calibrated: bool = False
    """Whether rows of the user's own machine are among them."""
    drive_gb_s: float = 0.0
    """What the drive reads, for experts on disk."""

    def rates(self, gpu: Gpu) -> Rates:
        """A machine's rates: measured where it was, else published ones times a measured share."""
        host, drive = links.host_rate(gpu), self.drive_gb_s * 1e9
        own = [row for row in self.rows if row.machine == gpu.machine]
        if own:
            copy = statistics.median(row.copy_gb_s for row in own)
            matmul = statistics.median(row.matmul_tflop_s for row in own)
            rates = [row.link_gb_s for row in own if row.link_gb_s]
            host = statistics.median(rates) * 1e9 if rates else host
            return Rates(copy * 1e9, matmul * 1e12, 0.0, 0.0, host, drive)
        copy_share, matmul_share = self.shares()
        products = gpu.get("bf16_tflop_s")
        return Rates(
            gpu.figures["bandwidth_gb_s"] * 1e9 * copy_share,
            products * 1e12 * matmul_share if products else math.inf,
            0.0,
            0.0,
            host,
            drive,
        )

    def shares(self) -> tuple[float, float]:
        """Measured rates over published ones: of copies, of bf16 products."""
        known = {gpu.machine: gpu for gpu in all_gpus().values() if gpu.machine}
        pairs = [(row, known[row.machine]) for row in self.rows if row.machine in known]
        pairs = pairs or [(row, known[row.machine]) for row in measured.committed()]
        copy = (row.copy_gb_s / gpu.figures["bandwidth_gb_s"] for row, gpu in pairs)
        matmul = (row.matmul_tflop_s / gpu.figures["bf16_tflop_s"] for row, gpu in pairs)
        return statistics.median(copy), statistics.median(matmul)

    def times(self, setup: Setup, sizes: Sizes) -> Times:
        """Both times of a model with these rows, as floor and as expected."""
        rates, backend, config = self.rates(setup.gpu), setup.on_device, setup.config
        slots = setup.slots(sizes) if setup.streams else 0
        rows = round_rows(sizes.rows) if backend.cuda_graphs else sizes.rows
        hit = expected_experts(config, sizes.rows)
        step = self._step(setup, sizes, sizes.rows, slots)
        floor = 1e3 * rates.seconds(step)
        prompt_floor = self._prompt_floor(setup, sizes, slots, rates)
        like, why = Like.of(setup), links.only_floor(setup, step)
        known = [] if why else self._of_kind(setup)
        row = nearest(measured.best(known), like, rows, step.nbytes)
        numbers = packed(config, backend, hit)
        read = Read(step.nbytes, numbers, rates.copy, backend.quant, rows)
        expected = step_ms(floor, read, row, like) + _exchange_ms(setup, rows) if row else None
        first, tokens, like_prompt = None, rows * sizes.prompt, None
        prompts = measured.best_prompts(known)
        if prompts and prompt_floor:
            first, like_prompt = prompt_ms(prompt_floor, prompts, like, tokens, step.nbytes)
            first += _exchange_ms(setup, tokens)
        staged = self._step(setup, sizes, math.ceil(sizes.rows / backend.pp), slots)
        return Times(
            floor, prompt_floor, expected, first, row, like_prompt,
            links.parts_ms(setup, step, rates, rows), slots, why,
            1e3 * rates.seconds(staged) if backend.pp > 1 else None,
        )  # fmt: skip

    def _step(self, setup: Setup, sizes: Sizes, rows: int, slots: int) -> Work:
        """A decode step's work, in the middle of the answer."""
        context = sizes.depth + sizes.prompt + sizes.new / 2
        hit = expected_experts(setup.config, rows)
        work = step_work(setup.config, setup.on_device, rows, 1, context, hit)
        return links.with_fetches(setup, work, hit, slots)

    def _prompt_floor(self, setup: Setup, sizes: Sizes, slots: int, rates: Rates) -> float | None:
        """Milliseconds. None where arithmetic bounds it, and the rate of that is not known.

        Experts that are copied bound a prompt too.
        """
        config, backend = setup.config, setup.on_device
        work = measured.prompt_work(config, backend, sizes.rows, sizes.prompt, sizes.depth)
        hit = expected_experts(config, sizes.rows * sizes.prompt)
        work = links.with_fetches(setup, work, hit, slots)
        unknown = rates.matmul == math.inf and not setup.streams
        return None if unknown else 1e3 * rates.seconds(work)

    def _of_kind(self, setup: Setup) -> list[Measured]:
        """The rows that say something about such a layout on such a device."""
        kind = setup.gpu.device == "cpu", setup.places.experts, setup.backend.pp > 1
        return [row for row in self.rows if row.kind == kind]


def _exchange_ms(setup: Setup, tokens: int) -> float:
    """Of a layout for which a time is expected: its links are known."""
    seconds = links.exchange_seconds(setup.config, setup.backend, setup.gpu, tokens)
    assert seconds is not None
    return 1e3 * seconds


@dataclass(frozen=True)
class Like:
    """What a row to start from should be like, but for its sizes."""

    quant: str
    machine: str | None
    fused: bool
    latent: bool
    layers: int
    ranks: int = 1

    @staticmethod
    def of(setup: Setup) -> Like:
        """As a model on a machine is."""
        backend, config = setup.backend, setup.config
        latent = isinstance(config.attention, AttentionShape)
        fused = backend.kernels == "triton"
        layers = config.num_hidden_layers
        return Like(backend.quant, setup.gpu.machine, fused, latent, layers, backend.ranks)

    @staticmethod
    def of_row(row: Measured) -> Like:
        """As a measured row was."""
        return Like(row.quant, row.machine, row.fused, row.latent, row.layers, row.ranks)

    def distance(self, row: Measured) -> float:
        """How unlike a row is, but for its batch and its sizes.

        A layer with latent attention has other kernels, and more small ones, than a layer with
        grouped queries: that weighs most. A layer of several devices ends in sums, which its
        kernels wait for. A machine with the same processors weighs least.
        """
        kinds = kind_of(row.quant), kind_of(self.quant)
        other, far = kinds[0] != kinds[1], (kinds[0] is None) != (kinds[1] is None)
        shared, fused = (row.ranks > 1) != (self.ranks > 1), row.fused != self.fused
        chips = chip_of(row.machine), chip_of(self.machine)
        machine = 2 * (chips[0] != chips[1]) + 0.3 * (row.machine != self.machine)
        most = 9 * (row.latent != self.latent)
        return most + 6 * fused + 5.5 * shared + 4 * far + machine + other


def step_ms(floor_ms: float, read: Read, row: Measured, like: Like) -> float:
    """A step's time without sums, if its layers take as long beside their bytes as the row's.

    It is never below the floor: a step of large kernels may read faster than a copy.
    """
    if row.experts == "device" and not row.whole:
        return floor_ms / row.share
    known = read.ms if row.whole else floor_ms
    return max(floor_ms, known + row.layer_ms * like.layers)


def nearest(rows: Sequence[Measured], like: Like, batch: int, step_bytes: float) -> Measured | None:
    """The row to start from: of like attention, kernels and storage, then of like sizes.

    Bytes a layer decide how long a kernel runs, and so what its start and end weigh. Of two rows
    as far away, the one of the more similar batch is taken. One token has kernels of its own.
    """

    def far(row: Measured) -> float:
        own, theirs = step_bytes / like.layers, row.step_gb * 1e9 / row.layers
        sizes = math.log2(own / theirs) ** 2 / 2 + 0.2 * abs(math.log2(batch / row.batch))
        several = 2 * ((batch == 1) != (row.batch == 1))
        return like.distance(row) + sizes + several

    return min(rows, key=far, default=None)


def prompt_ms(
    floor_ms: float, rows: Sequence[Measured], like: Like, tokens: int, step_bytes: float
) -> tuple[float, Measured]:
    """The time to the first token of a prompt, and the row that it starts from.

    `tokens`: how many all rows have together. By these, and by the bytes of a layer, the nearest
    rows are chosen, and those first that are packed if this is.
    """

    def far(row: Measured) -> float:
        size = step_bytes / like.layers / (row.step_gb * 1e9 / row.layers)
        away = abs(math.log2(tokens / (row.batch * row.prompt))) + abs(math.log2(size))
        return like.distance(row) + away + 8 * ((row.quant == "none") != (like.quant == "none"))

    times = []
    elsewhere = [row for row in rows if row.experts != "device"]  # it waits for copies
    if device := elsewhere or [row for row in rows if row.prompt_share >= DEVICE_SHARE]:
        row = min(device, key=far)
        times.append((floor_ms / min(1.0, row.prompt_share), row))
    host = [row for row in rows if row.prompt_share < DEVICE_SHARE]
    if host and not elsewhere:
        row = min(host, key=far)
        times.append((max(floor_ms, row.ttft_ms / row.layers * like.layers), row))
    return max(times, key=lambda each: each[0])
