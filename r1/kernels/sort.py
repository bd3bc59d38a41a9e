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
"""More choices are left to torch's sort. (Each program reads what all chunks have counted.)"""
MOST_AT_ONCE = 1024
"""As many choices, and experts, as a program counts sooner than another kernel starts."""
BLOCK = 4096
"""As many choices as each program looks through."""
CHUNK = 128
"""Of more choices, a program takes so many, and a first kernel has counted those before. (With 256,
each compared with each, registers are spilled.)
"""


def sort_by_expert(chip: Chip, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`order` and `ends` of dispatch.py's `by_expert` for choices (N, K) among `count` experts.

    Both are int32. For up to BLOCK choices one kernel makes them, and each program counts for one
    expert; for more, `_sort_chunks`. More than MOST_CHOICES are sorted by torch.
    """
    choices = indices.numel()
    if choices > MOST_CHOICES:
        return sort_by_expert_torch(indices, count)
    return (_sort if choices <= BLOCK else _sort_chunks)(chip, indices, count, None)


def sort_by_expert_torch(indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The twin."""
    order, _, ends = by_expert(indices, count)
    return order.int(), ends


def sort_into_tiles(
    chip: Chip, indices: Tensor, count: int, rows: int, shared: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`order` and `ends` of `sort_by_expert`, and `divide_torch`'s tiles of the sorted choices.

    Of a decode step one kernel makes them all, and of a prompt two.
    """
    tokens, choices = len(indices), indices.numel()
    tiles = most_tiles(choices, count, rows, tokens, shared)
    if choices > MOST_CHOICES:
        order, ends = sort_by_expert_torch(indices, count)
        return order, ends, divide_torch(ends, tiles, rows, tokens, shared)
    work = indices.new_empty(tiles, 3, dtype=torch.int32)
    few = max(choices, count) <= MOST_AT_ONCE
    order, ends = (_sort if few else _sort_chunks)(chip, indices, count, work, shared, rows)
    return order, ends, work


def _sort(
    chip: Chip, indices: Tensor, count: int, work: Tensor | None, shared: int = 0, rows: int = 1
) -> tuple[Tensor, Tensor]:
    """Launch `sort_kernel`, which makes `order` and `ends`, and fills `work` if it is given."""
    choices, order, ends = indices.numel(), *_results(indices, count)
    block = power_of_two(choices, 64)  # as many as a warp has threads, or more
    # Few choices are few instructions, and one warp's sums need no barrier.
    chip.run(
        sort_kernel, (count if work is None else count + shared + 1,), indices, order, ends, work,
        choices, len(indices), count, shared, _length(work), BLOCK=block, ROWS=rows,
        PAD=power_of_two(count), warps=max(1, min(8, block // 128)),
    )  # fmt: skip
    return order, ends


def _sort_chunks(
    chip: Chip, indices: Tensor, count: int, work: Tensor | None, shared: int = 0, rows: int = 1
) -> tuple[Tensor, Tensor]:
    """The same in two steps, for many choices: no program looks through all of them."""
    choices, order, ends = indices.numel(), *_results(indices, count)
    chunks, pad = ceil_div(choices, CHUNK), power_of_two(count, 16)
    counts = indices.new_empty(chunks, pad, dtype=torch.int32)
    chip.run(
        count_kernel, (chunks,), indices, counts, choices, count, CHUNK=CHUNK, PAD=pad, warps=4
    )
    chip.run(
        place_kernel, (chunks if work is None else max(chunks, count + shared + 1),), indices,
        counts, order, ends, work, choices, chunks, len(indices), count, shared, _length(work),
        CHUNK=CHUNK, SPAN=max(1, 4096 // pad), ROWS=rows, PAD=pad, warps=8,
    )  # fmt: skip
    return order, ends


def _results(indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Memory for `order` and `ends`."""
    lengths = indices.numel(), count
    order, ends = (indices.new_empty(length, dtype=torch.int32) for length in lengths)
    return order, ends


def _length(work: Tensor | None) -> int:
    return 0 if work is None else len(work)


def most_tiles(choices: int, count: int, rows: int, tokens: int, shared: int) -> int:
    """As many tiles as `sort_into_tiles` can need: only an expert's last tile isn't full."""
    return min(choices, choices // rows + count) + shared * ceil_div(tokens, rows)


def divide_torch(ends: Tensor, tiles: int, rows: int, tokens: int, shared: int) -> Tensor:
    """Cut sorted choices into tiles of `rows`, each of one expert: int32 (tiles, 3).

    A tile is its expert, its first choice and its end. The experts of `ends` are followed by
    `shared` ones, which have all tokens. Tiles that aren't needed are empty.
    """
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
    ROWS: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program e counts the choices of experts before e, and writes the places of e's own choices.

    The order is stable, so it is the same in every run. If there is `work`, the program also writes
    e's tiles. Then further programs do so for shared experts.
    """
    let_next_start(PDL)
    wait_for_previous(PDL)
    expert, choice = tl.program_id(0), tl.arange(0, BLOCK)
    index = tl.load(indices + choice, mask=choice < choices, other=2**31 - 1).to(tl.int32)
    if work is not None:
        counts = tl.histogram(index, PAD, mask=index < count)
    start = tl.sum((index < expert).to(tl.int32), axis=0)
    mine = ((index == expert) & (expert < count)).to(tl.int32)
    rank = tl.cumsum(mine, axis=0)  # from 1
    tl.store(order + start + rank - 1, choice, mask=mine > 0)
    end = start + tl.sum(mine, axis=0)
    tl.store(ends + expert, end, mask=expert < count)
    if work is not None:
        store_tiles(work, counts, start, end, tokens, count, shared, tiles, ROWS, PAD)


@triton.jit
def load_chunk(indices, choices, CHUNK: tl.constexpr):
    """The numbers of this program's choices, and their experts. Beyond the last: no expert."""
    choice = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(indices + choice, mask=choice < choices, other=2**31 - 1).to(tl.int32)
    return choice, expert


@triton.jit
def count_kernel(
    indices, counts, choices, count, CHUNK: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr
):
    """How many of CHUNK choices are of each expert: a row of `counts` (chunks, PAD)."""
    let_next_start(PDL)
    wait_for_previous(PDL)
    _choice, expert = load_chunk(indices, choices, CHUNK)
    here = tl.histogram(expert, PAD, mask=expert < count)
    tl.store(counts + tl.program_id(0) * PAD + tl.arange(0, PAD), here)


@triton.jit
def place_kernel(
    indices, counts, order, ends, work, choices, chunks, tokens, count, shared, tiles,
    CHUNK: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, PAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Write the places of CHUNK choices, by what all chunks have counted, SPAN of them at a time.

    The order is stable. If there is `work`, program e also writes the tiles of expert e.
    """
    let_next_start(PDL)
    wait_for_previous(PDL)
    program, e, row = tl.program_id(0), tl.arange(0, PAD), tl.arange(0, SPAN)[:, None]
    choice, expert = load_chunk(indices, choices, CHUNK)
    total, before = tl.zeros((PAD,), tl.int32), tl.zeros((PAD,), tl.int32)
    for first in range(0, chunks, SPAN):
        chunk = first + row
        some = tl.load(counts + chunk * PAD + e[None, :], mask=chunk < chunks, other=0)
        total += tl.sum(some, axis=0)
        before += tl.sum(tl.where(chunk < program, some, 0), axis=0)
    stops = tl.cumsum(total, axis=0)
    tl.store(ends + e, stops, mask=e + program * PAD < count)  # by the first program
    # A choice's place is behind those of the experts before, and behind its own expert's earlier
    # ones: of the chunks before, and in this one.
    place = tl.gather(stops - total + before, tl.minimum(expert, PAD - 1), axis=0)
    i = tl.arange(0, CHUNK)
    earlier = (expert[None, :] == expert[:, None]) & (i[None, :] < i[:, None])
    place += tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(order + place, choice, mask=expert < count)
    if work is not None:
        end = tl.sum(tl.where(e == program, stops, 0), axis=0)
        start = end - tl.sum(tl.where(e == program, total, 0), axis=0)
        store_tiles(work, total, start, end, tokens, count, shared, tiles, ROWS, PAD)


@triton.jit
def store_tiles(
    work, counts, start, end, tokens, count, shared, tiles, ROWS: tl.constexpr, PAD: tl.constexpr
):
    """Store this program's tiles behind those of the experts before it, of which `counts` (PAD,)
    says how many choices they have.

    Routed experts have the sorted choices from `start` to `end`, and shared ones all tokens. The
    program after the last expert stores the empty tiles, and further ones some of them again.
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
