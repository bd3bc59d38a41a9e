"""Sorting the tokens' choices by expert, and cutting the sorted choices into tiles.

Shapes: N tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.chip import Chip, ceil_div, let_next_start, power_of_two, wait_for_previous
from r1.model.dispatch import by_expert

MOST_CHOICES = 2**16
"""As many choices as a program of `sort_kernel` looks through in the time of torch's sort."""
MOST_AT_ONCE = 1024
"""As many choices, and experts, as a program counts sooner than another kernel starts."""


def sort_by_expert(chip: Chip, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`order` and `ends` of dispatch.py's `by_expert` for choices (N, K) among `count` experts.

    Both are int32. One kernel makes them: each program counts for one expert. More than
    MOST_CHOICES choices are sorted by torch.
    """
    choices = indices.numel()
    if choices > MOST_CHOICES:
        return sort_by_expert_torch(indices, count)
    return _sort(chip, indices, count, (count,), None)


def sort_by_expert_torch(indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The twin."""
    order, _, ends = by_expert(indices, count)
    return order.int(), ends


def sort_into_tiles(
    chip: Chip, indices: Tensor, count: int, rows: int, shared: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`order` and `ends` of `sort_by_expert`, and the sorted choices in tiles: `work` of `divide`.

    Of a decode step one kernel makes them all.
    """
    tokens, choices = len(indices), indices.numel()
    tiles = most_tiles(choices, count, rows, tokens, shared)
    if max(choices, count) > MOST_AT_ONCE:
        order, ends = sort_by_expert(chip, indices, count)
        return order, ends, divide(chip, ends, tiles, rows, tokens, shared)
    work = indices.new_empty(tiles, 3, dtype=torch.int32)
    order, ends = _sort(chip, indices, count, (count + shared + 1,), work, shared, rows)
    return order, ends, work


def _sort(
    chip: Chip, indices: Tensor, count: int, grid: tuple[int], work: Tensor | None,
    shared: int = 0, rows: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch `sort_kernel`, which makes `order` and `ends`, and fills `work` if it is given."""
    choices, tiles = indices.numel(), 0 if work is None else len(work)
    order = indices.new_empty(choices, dtype=torch.int32)
    ends = indices.new_empty(count, dtype=torch.int32)
    block = min(4096, power_of_two(choices, 64))  # as many as a warp has threads, or more
    # Few choices are few instructions, and one warp's sums need no barrier.
    chip.run(
        sort_kernel, grid, indices, order, ends, work, choices, len(indices), count, shared, tiles,
        BLOCK=block, ONE=choices <= block, ROWS=rows, PAD=power_of_two(count),
        warps=max(1, min(8, block // 128)),
    )  # fmt: skip
    return order, ends


def most_tiles(choices: int, count: int, rows: int, tokens: int, shared: int) -> int:
    """As many tiles as `divide` can need: only an expert's last tile isn't full."""
    return min(choices, choices // rows + count) + shared * ceil_div(tokens, rows)


def divide(chip: Chip, ends: Tensor, tiles: int, rows: int, tokens: int, shared: int) -> Tensor:
    """Cut sorted choices into tiles of `rows`, each of one expert: int32 (tiles, 3).

    A tile is its expert, its first choice and its end. The experts of `ends` are followed by
    `shared` ones, which have all tokens. Tiles that aren't needed are empty.
    """
    count = len(ends)
    work = ends.new_empty(tiles, 3)
    chip.run(
        divide_kernel, (count + shared + 1,), ends, work, tokens, count, shared, tiles, ROWS=rows,
        PAD=power_of_two(count), warps=1,
    )  # fmt: skip
    return work


def divide_torch(ends: Tensor, tiles: int, rows: int, tokens: int, shared: int) -> Tensor:
    """The twin."""
    zero = ends.new_zeros(1)
    start = torch.cat((zero, ends[:-1], zero.expand(shared)))
    stop = torch.cat((ends, ends.new_full((shared,), tokens)))
    each = (stop - start + rows - 1) // rows
    tile = torch.arange(tiles, device=ends.device)
    expert = torch.searchsorted(each.cumsum(0), tile, right=True).clamp(max=len(each) - 1)
    first = start[expert] + (tile - each.cumsum(0)[expert] + each[expert]) * rows
    work = torch.stack((expert, first, torch.minimum(first + rows, stop[expert])), dim=1).int()
    return work.masked_fill((tile >= each.sum())[:, None], 0)


@triton.jit
def sort_kernel(
    indices, order, ends, work, choices, tokens, count, shared, tiles, BLOCK: tl.constexpr,
    ONE: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program e counts the choices of experts before e, and writes the places of e's own choices.

    The order is stable, so it is the same in every run. If there is `work`, all choices are one
    block, and the program also writes e's tiles. Then further programs do so for shared experts.
    """
    let_next_start(PDL)
    wait_for_previous(PDL)
    expert = tl.program_id(0)
    choice, limit = tl.arange(0, BLOCK), BLOCK if ONE else choices
    first = tl.load(indices + choice, mask=choice < choices, other=2**31 - 1).to(tl.int32)
    if work is not None:
        counts = tl.histogram(first, PAD, mask=first < count)
    before = (first < expert).to(tl.int32)
    for block in range(BLOCK, limit, BLOCK):
        at = block + choice
        index = tl.load(indices + at, mask=at < choices, other=2**31 - 1).to(tl.int32)
        before += (index < expert).to(tl.int32)
    start = tl.sum(before, axis=0)
    end = start
    for block in range(0, limit, BLOCK):
        mine = ((first == expert) & (expert < count)).to(tl.int32)
        rank = tl.cumsum(mine, axis=0)  # from 1
        tl.store(order + end + rank - 1, block + choice, mask=mine > 0)
        end += tl.sum(mine, axis=0)
        behind = block + BLOCK + choice
        first = tl.load(indices + behind, mask=behind < choices, other=2**31 - 1).to(tl.int32)
    tl.store(ends + expert, end, mask=expert < count)
    if work is not None:
        store_tiles(work, counts, start, end, tokens, count, shared, tiles, ROWS, PAD)


@triton.jit
def divide_kernel(
    ends, work, tokens, count, shared, tiles, ROWS: tl.constexpr, PAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One expert's tiles."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    expert, e = tl.program_id(0), tl.arange(0, PAD)
    starts = tl.load(ends + e - 1, mask=(e > 0) & (e < count), other=0)
    stops = tl.load(ends + e, mask=e < count, other=0)
    start = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < count), other=0)
    end = tl.load(ends + expert, mask=expert < count, other=0)
    store_tiles(work, stops - starts, start, end, tokens, count, shared, tiles, ROWS, PAD)


@triton.jit
def store_tiles(
    work, counts, start, end, tokens, count, shared, tiles, ROWS: tl.constexpr, PAD: tl.constexpr
):
    """Store this program's tiles behind those of the experts before it, of which `counts` (PAD,)
    says how many choices they have.

    Routed experts have the sorted choices from `start` to `end`, and shared ones all tokens. The
    program after the last expert stores the empty tiles.
    """
    expert, e = tl.program_id(0), tl.arange(0, PAD)
    tile = tl.sum(tl.where(e < expert, tl.cdiv(counts, ROWS), 0), axis=0)
    tile += tl.maximum(expert - count, 0) * tl.cdiv(tokens, ROWS)
    real = expert < count + shared
    start = tl.where(expert < count, start, 0)
    end = tl.where(expert < count, end, tl.where(real, tokens, (tiles - tile) * ROWS))
    for some in range(start, end, 32 * ROWS):  # a decode step's experts have one tile, or none
        number = tl.arange(0, 32)
        first = some + number * ROWS
        place, inside = work + 3 * (tile + number), first < end
        tl.store(place, tl.where(real, expert, 0), mask=inside)
        tl.store(place + 1, tl.where(real, first, 0), mask=inside)
        tl.store(place + 2, tl.where(real, tl.minimum(first + ROWS, end), 0), mask=inside)
        tile += 32
