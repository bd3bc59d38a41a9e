"""Does a model fit: the layout, the fewest GPUs, the largest batch and the longest context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from r1.footprint import Sizes
from r1.guide.gpus import Gpu
from r1.guide.layouts import setups
from r1.guide.setup import COUNTS, ON_DEVICE, Places, Setup, computes, precisions
from r1.model.config import Config

MOST_ROWS = 256
"""The largest batch that is looked at: measured rows end at 32."""


def fitting(
    name: str,
    config: Config,
    gpu: Gpu,
    quant: str | None,
    count: int | None,
    sizes: Sizes,
    places: Places = ON_DEVICE,
) -> list[Setup]:
    """The layouts on the fewest machines that hold the model; empty if no number of them does.

    `quant` None: the most exact storage that fits on these fewest; the smallest where experts lie
    elsewhere, for there the way to the device takes longest. `count` None: any number.
    """
    kinds = [quant] if quant and computes(gpu, quant) else []
    kinds = kinds if quant else precisions(config, gpu)
    if gpu.device == "cpu":
        count = 1
    if places.experts != "device":
        return _elsewhere(name, config, gpu, kinds[::-1], count or 1, sizes, places)
    for number in COUNTS if count is None else (count,):
        for kind in kinds:
            if number > 1 and not _could_fit(name, config, gpu, kind, number):
                continue
            found = [s for s in setups(name, config, gpu, kind, number) if s.fits(sizes)]
            if found:
                return found
    return []


def _elsewhere(
    name: str,
    config: Config,
    gpu: Gpu,
    kinds: Sequence[str],
    count: int,
    sizes: Sizes,
    places: Places,
) -> list[Setup]:
    """The same with experts elsewhere. A computer's memory is its GPU's: RAM beside it is none."""
    if why_not(config, gpu, None, (places,)):
        return []
    for kind in kinds:
        found = [s for s in setups(name, config, gpu, kind, count, places) if s.fits(sizes)]
        if found:
            return found
    return []


def why_not(config: Config, gpu: Gpu, quant: str | None, places: Sequence[Places]) -> str:
    """Why nothing was found, if more memory would not help; empty if it would."""
    if quant and not computes(gpu, quant):
        return f"it does not multiply by {quant}, so use another --quant"
    if places[0].experts == "device":
        return ""
    if not config.experts.n_routed_experts:
        return "this model has no routed experts, so leave --experts out"
    if places[0].experts == "host" and not gpu.get("host_link_gb_s"):
        return "there is no RAM beside this memory, so leave --experts host out"
    return ""


def short_ram(
    name: str,
    config: Config,
    gpu: Gpu,
    quant: str | None,
    count: int | None,
    sizes: Sizes,
    places: Places,
) -> str:
    """What the experts take, where only the RAM that was given is too little; else empty."""
    if places.experts != "host" or places.ram_bytes is None:
        return ""
    enough = fitting(name, config, gpu, quant, count, sizes, replace(places, ram_bytes=None))
    if not enough:
        return ""
    needed, stored = enough[0].elsewhere_bytes / 1e9, enough[0].stored
    given = f"--ram-gb gives {places.ram_bytes / 1e9:g}"
    takes = f"its experts take {needed:.0f} GB of RAM in {stored}"
    return f"{takes}, and {given}: give more, or use --experts disk"


def _could_fit(name: str, config: Config, gpu: Gpu, quant: str, count: int) -> bool:
    """Whether the weights alone would fit, if they could be shared evenly."""
    whole = next(setups(name, config, gpu, quant, 1), None)
    return whole is not None and whole.memory(Sizes()).weights <= count * gpu.capacity


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` for which `fits`; 0 if 1 does not."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def most_rows(setup: Setup, sizes: Sizes) -> int:
    """The largest batch of such rows, at most MOST_ROWS."""
    return largest(lambda rows: setup.fits(replace(sizes, rows=rows)), MOST_ROWS)


def longest(setup: Setup, rows: int) -> int:
    """The most tokens of each of `rows` rows, within the model's context."""
    return largest(
        lambda tokens: setup.fits(Sizes(rows, tokens)), setup.config.max_position_embeddings
    )
