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


def sort_by_expert(chip: Chip, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`order` and `ends` of dispatch.py's `by_expert` for choices (N, K) among `count` experts.

    Both are int32. One kernel makes them: each program counts for one expert. More than
    MOST_CHOICES choices are sorted by torch.
    """
    choices = indices.numel()
    if choices > MOST_CHOICES:
        return sort_by_expert_torch(indices, count)
    order = indices.new_empty(choices, dtype=torch.int32)
    ends = indices.new_empty(count, dtype=torch.int32)
    block = min(4096, power_of_two(choices))
    chip.run(
        sort_kernel, (count,), indices, order, ends, choices, BLOCK=block,
        warps=4 if block <= 1024 else 8,
    )  # fmt: skip
    return order, ends


def sort_by_expert_torch(indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The twin."""
    order, _, ends = by_expert(indices, count)
    return order.int(), ends


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
        divide_kernel, (tiles,), ends, work, tokens, count, shared, ROWS=rows,
        PAD=power_of_two(count + shared), warps=1,
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
def sort_kernel(indices, order, ends, choices, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program e counts the choices of experts before e, and writes the places of e's own choices.

    The order is stable, so it is the same in every run.
    """
    let_next_start(PDL)
    wait_for_previous(PDL)
    expert = tl.program_id(0)
    choice = tl.arange(0, BLOCK)
    # A decode step has no more choices than this first block.
    first = tl.load(indices + choice, mask=choice < choices, other=2**31 - 1).to(tl.int32)
    before = (first < expert).to(tl.int32)
    for block in range(BLOCK, choices, BLOCK):
        at = block + choice
        index = tl.load(indices + at, mask=at < choices, other=2**31 - 1).to(tl.int32)
        before += (index < expert).to(tl.int32)
    end = tl.sum(before, axis=0)
    for block in range(0, choices, BLOCK):
        mine = (first == expert).to(tl.int32)
        rank = tl.cumsum(mine, axis=0)  # from 1
        tl.store(order + end + rank - 1, block + choice, mask=mine > 0)
        end += tl.sum(mine, axis=0)
        behind = block + BLOCK + choice
        first = tl.load(indices + behind, mask=behind < choices, other=2**31 - 1).to(tl.int32)
    tl.store(ends + expert, end)


@triton.jit
def divide_kernel(
    ends, work, tokens, count, shared, ROWS: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr
):
    """One tile. The experts before its own have no more tiles together than the tile's number."""
    wait_for_previous(PDL)
    let_next_start(PDL)
    tile = tl.program_id(0)
    e = tl.arange(0, PAD)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < count), other=0)
    stop = tl.load(ends + e, mask=e < count, other=0)
    stop = tl.where((e >= count) & (e < count + shared), tokens, stop)
    each = tl.cdiv(stop - start, ROWS)
    through = tl.cumsum(each, axis=0)
    mine = (through > tile) & (through - each <= tile)  # of no expert, after the last tile
    begin = start + (tile - through + each) * ROWS
    first = tl.sum(tl.where(mine, begin, 0), axis=0)
    end = tl.sum(
        tl.where(mine, tl.minimum(stop, start + (tile - through + each + 1) * ROWS), 0), axis=0
    )
    tl.store(work + 3 * tile, tl.sum(tl.where(mine, e, 0), axis=0))
    tl.store(work + 3 * tile + 1, first)
    tl.store(work + 3 * tile + 2, end)
