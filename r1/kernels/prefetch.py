"""A request that bytes be brought from memory into the second-level cache, where the chip takes
such requests.

No result depends on it and nobody waits for it. So a kernel may ask before it waits for the one
ahead (chip.py), even for bytes that the one ahead may still change: when they are read, after the
wait, they are as they should be, and near by then."""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(32)
"""Threads that make a request each."""
CHUNK = tl.constexpr(2048)
"""Bytes of a request."""


@triton.jit
def prefetch(start, nbytes, PDL: tl.constexpr):
    """Ask for `nbytes` (int64) from the pointer `start` on, less what isn't aligned to 16 at their
    ends.

    The first warp does, with Hopper's instruction; where there is none (chip.py's
    `dependent_launch`) nobody does."""
    if PDL:
        for done in range(0, nbytes, LANES * CHUNK):
            at, size = requests(start.to(tl.int64), nbytes, done)
            tl.inline_asm_elementwise(
                """{
                .reg .pred some;
                .reg .b32 thread;
                mov.u32 thread, %tid.x;
                setp.lt.u32 some, thread, 32;
                setp.gt.and.s32 some, $2, 0, some;
                @some cp.async.bulk.prefetch.L2.global [$1], $2;
                mov.b32 $0, 0;
                }""",
                "=r,l,r", [at, size], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def requests(address, nbytes, done):
    """Where each thread's next request begins, int64, and how long it is, int32: what is not above
    0 is none."""
    end = (address + nbytes) // 16 * 16
    at = (address + 15) // 16 * 16 + done + tl.arange(0, LANES).to(tl.int64) * CHUNK
    return at, tl.minimum(end - at, CHUNK).to(tl.int32)
