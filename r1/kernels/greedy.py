"""The likeliest token of each row, in one kernel.

torch's `max` takes 28 us for the 128,256 logits of Llama 3's vocabulary on an H100, 3% of a step of
the 1B shape. Here the chip's processors share a row, and the program that finishes it compares what
they found.

Shapes: ... any leading dimensions (rows, positions), N rows of all of them, W vocab_size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.chip import Chip, ceil_div, power_of_two, wait_for_previous
from r1.kernels.router import tickets

COLUMNS = 1024
"""Logits that a program compares."""


def likeliest(chip: Chip, logits: Tensor, tokens: Tensor) -> Tensor:
    """fp32 (..., W) -> each row's best token, into `tokens`, int64 (...); its logit, fp32 (...).

    Its twin is r1/run/sampler.py's `greedy`. Of equals the first wins, and NaN is the largest.
    """
    (*shape, vocab), flat = logits.shape, logits.flatten(0, -2)
    rows, parts = len(flat), ceil_div(vocab, COLUMNS)
    best, where = flat.new_empty(rows, parts), flat.new_empty(rows, parts, dtype=torch.int32)
    scores = flat.new_empty(rows)
    assert tokens.shape == torch.Size(shape) and tokens.is_contiguous()
    chip.run(
        likeliest_kernel, (parts, rows), flat, flat.stride(0), best, where,
        tickets(flat.device, power_of_two(rows, 64)), tokens, scores, vocab, PARTS=parts,
        PAD=power_of_two(parts), BLOCK=COLUMNS, warps=4,
    )  # fmt: skip
    return scores.view(shape)


@triton.jit
def likeliest_kernel(
    logits, stride, best, where, tickets, tokens, scores, vocab, PARTS: tl.constexpr,
    PAD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK logits of one row; a row's last program chooses among what all of them found."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = part * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    v = tl.load(logits + row * stride + column, mask=column < vocab, other=float("-inf"))
    best += row * PARTS
    where += row * PARTS
    place, score = largest(v)
    tl.store(best + part, score)
    tl.store(where + part, part * BLOCK + place)
    tl.debug_barrier()  # both stand before the ticket that says so
    if tl.atomic_add(tickets + row, 1) == PARTS - 1:
        tl.store(tickets + row, 0)
        each = tl.arange(0, PAD)
        winner, most = largest(tl.load(best + each, mask=each < PARTS, other=float("-inf")))
        tl.store(tokens + row, tl.load(where + winner).to(tl.int64))
        tl.store(scores + row, most)


@triton.jit
def largest(v):
    """The place of the first of the largest numbers of v, and this number: NaN is the largest."""
    place = tl.argmax(tl.where(v == v, v, float("inf")), axis=0)
    here = tl.arange(0, v.shape[0]) == place
    return place, tl.sum(tl.where(here, v, 0.0), axis=0)
