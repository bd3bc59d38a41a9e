"""The sum over GPUs as one kernel of ours: for the few tokens of a decode step.

One-shot: each rank writes its part into a slot of every rank's buffer, its own included, and adds
up the slots of its own buffer. So a sum takes one crossing of the link. Others wait for a signal
that the data has arrived, which is a second crossing at least. Here **the data is its own signal**:
a slot holds EMPTY until it is written, and no part has EMPTY in it. (Libraries call it the Lamport
style.) The rules that make it safe:

1. EMPTY is -0.0 in each 16 bits; in fp32 that is a number of size 5e-41. A part that has it sends
   0.0 instead. A number is written as a whole, so a reader sees EMPTY or the number.
2. A buffer has three sets of slots, used in turn. While a rank is in its call n, another one is in
   call n or n + 1: to end that, it needs this rank's data of n + 1. So it writes to the sets of n
   and n + 1, and meanwhile this rank empties the third set, that of n - 1, which it has read. It
   is written again in call n + 2, which nobody begins before this rank's call n has ended.
3. The turn is a number in memory, and each program has its own for its piece of the buffers. A CUDA
   graph replays the kernel with the same arguments, and sums of other sizes come between.
4. Every program waits for the same program of the other ranks. So all programs must run at the same
   time: they are few (LIMITS in r1/placement/symmetric.py, PIECE), of one warp each.

All ranks add up in the same order, in fp32, and so get the same bits.

Rule 2 counts on what NVIDIA's GPUs do: a write to another GPU's memory arrives while the kernel
still runs, and volatile reads see it. So there it is offered (r1/switches/allreduce.py).

Shapes: n ranks of a group; ... any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.chip import Chip, ceil_div, let_next_start, power_of_two, wait_for_previous
from r1.placement.collectives import Group
from r1.placement.symmetric import MappedSum, limit, share

TURNS = tl.constexpr(3)
"""Sets of slots."""
PIECE = 1024
"""Bytes of a part that a program adds up: two loads of 16 bytes for each thread of a warp."""
EMPTY = {2: -(2**15), 4: -(2**31) + 2**15}
"""By bytes of an element: the integer whose every 16 bits are those of -0.0 in bf16 and fp16."""
INTEGERS = {2: torch.int16, 4: torch.int32}


@triton.jit
def receive(places, inside, EMPTY: tl.constexpr):
    """Read these places again and again, until none is empty; other threads of the GPU, and other
    GPUs, write to them.
    """
    bits = tl.load(places, mask=inside, other=0, volatile=True)
    while tl.max(tl.max((bits == EMPTY).to(tl.int32), axis=1), axis=0) > 0:
        bits = tl.load(places, mask=inside, other=0, volatile=True)
    return bits


@triton.jit
def all_reduce_kernel(
    part, y, buffer, peers, turns, count, rank,
    RANKS: tl.constexpr, PADDED: tl.constexpr, SLOT: tl.constexpr, ELEMENTS: tl.constexpr,
    EMPTY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = the sum of all ranks' parts, `count` numbers; `part` is this rank's, as integers.

    buffer   this rank's slots, integers (TURNS, RANKS, SLOT)
    peers    int64 (RANKS,), the addresses of all ranks' buffers
    turns    int32, for each program the set of slots that is next
    PADDED   RANKS, rounded up to a power of two; ELEMENTS of each program
    """
    let_next_start(PDL)
    program = tl.program_id(0)
    offsets = program * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = offsets < count
    ranks = tl.arange(0, PADDED)
    itemsize: tl.constexpr = part.dtype.element_ty.primitive_bitwidth // 8
    away = tl.load(peers + ranks, mask=ranks < RANKS, other=0) - buffer.to(tl.int64)
    away = tl.multiple_of(away // itemsize, 16)[:, None]
    ranks = ranks[:, None]
    wait_for_previous(PDL)
    turn = tl.load(turns + program)
    bits = tl.load(part + offsets, mask=inside, other=0)  # (ELEMENTS,)
    bits = tl.where(bits == EMPTY, 0, bits).to(part.dtype.element_ty)
    wanted = (ranks < RANKS) & inside[None, :]  # (PADDED, ELEMENTS)
    place = (turn * RANKS + rank) * SLOT + offsets  # in everybody's buffer
    tl.store(buffer + away + place[None, :], bits[None, :], mask=wanted)

    slots = ranks * SLOT + offsets[None, :]  # (PADDED, ELEMENTS), of one set
    before = (turn + TURNS - 1) % TURNS
    nothing = tl.full((PADDED, ELEMENTS), EMPTY, part.dtype.element_ty)
    tl.store(buffer + before * RANKS * SLOT + slots, nothing, mask=ranks < RANKS)

    bits = receive(buffer + turn * RANKS * SLOT + slots, wanted, EMPTY)
    numbers = bits.to(y.dtype.element_ty, bitcast=True).to(tl.float32)
    tl.store(y + offsets, tl.sum(numbers, axis=0).to(y.dtype.element_ty), mask=inside)
    tl.store(turns + program, (turn + 1) % TURNS)


def all_reduce(
    chip: Chip, y: Tensor, buffer: Tensor, peers: Tensor, turns: Tensor, rank: int
) -> Tensor:
    """(...) on each rank -> the sum, (...), on every rank, in the same dtype: fp32, bf16, fp16.

    buffer   uint8, this rank's slots: every 16 bits are EMPTY before the first call
    peers    int64 (n,): the addresses of all ranks' buffers
    turns    int32, at least one for each PIECE of a slot: zeros before the first call
    """
    ranks, itemsize = len(peers), y.itemsize
    slot = len(buffer) // (TURNS.value * ranks) // itemsize
    assert y.numel() <= slot, f"{y.numel()} elements do not fit a slot of {slot}"
    integers = INTEGERS[itemsize]
    summed = torch.empty_like(y)
    elements = PIECE // itemsize
    chip.run(
        all_reduce_kernel, (ceil_div(y.numel(), elements),),
        y.view(integers), summed, buffer.view(integers), peers, turns, y.numel(), rank, warps=1,
        RANKS=ranks, PADDED=power_of_two(ranks), SLOT=slot, ELEMENTS=elements,
        EMPTY=EMPTY[itemsize],
    )  # fmt: skip
    return summed


class OneShotSum(MappedSum):
    """Adds up by the kernel. For the slots of a Block."""

    def __init__(
        self, group: Group, chip: Chip, rank: int, buffer: Tensor, addresses: Sequence[int]
    ) -> None:
        """`buffer`: uint8, this rank's; `addresses`: those of all ranks' buffers, as seen here."""
        super().__init__(group)
        self.chip, self.rank, self.buffer = chip, rank, buffer
        self.most = len(buffer) // (TURNS.value * len(addresses))
        device = buffer.device
        self.peers = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.turns = torch.zeros(ceil_div(self.most, PIECE), dtype=torch.int32, device=device)
        buffer.view(torch.int16).fill_(EMPTY[2])

    @staticmethod
    def of(group: Group) -> OneShotSum:
        """Every rank of the group calls it; none may add up before all have returned.

        Raises RuntimeError where memory can't be mapped.
        """
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        nbytes = TURNS.value * ranks * limit("triton", ranks)
        buffer, handle = share(nbytes, group)
        addresses = [
            handle.get_buffer(each, (nbytes,), torch.uint8).data_ptr() for each in range(ranks)
        ]
        made = OneShotSum(group, Chip.of(buffer.device), rank, buffer, addresses)
        made.handle = handle  # keeps the others' memory mapped
        torch.cuda.synchronize()
        return made

    handle: object = None

    def small(self, y: Tensor) -> Tensor:
        return all_reduce(self.chip, y, self.buffer, self.peers, self.turns, self.rank)
