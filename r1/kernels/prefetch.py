"""A request that bytes be brought into the second-level cache, where the chip takes one.

No result depends on it and nobody waits for it, so it may stand before a kernel's wait for the one ahead, whatever it is for:
a program that waits anyway has its first bytes under way meanwhile, in one piece each, which memory likes best.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(32)
"""Threads that make a request each."""
CHUNK = tl.constexpr(2048)
"""Bytes of a request."""


@triton.jit
def prefetch(start, nbytes, PDL: tl.constexpr):
    """Ask for `nbytes` (int64) from the pointer `start` on, less what isn't aligned to 16 at their ends. Hopper's instruction."""
    if PDL:
        begin = start.to(tl.int64)
        end = (begin + nbytes) // 16 * 16
        begin = (begin + 15) // 16 * 16
        lane = tl.arange(0, LANES).to(tl.int64)
        for first in range(0, nbytes, LANES * CHUNK):
            at = begin + first + lane * CHUNK
            size = tl.minimum(end - at, CHUNK).to(tl.int32)
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
