"""Prefetch: ask the chip to bring bytes from memory into its second-level cache.

No result depends on it, and no program waits for it. So a kernel may prefetch before it waits for
the previous one (chip.py), even bytes that the previous kernel may still change. The kernel reads
them after its wait: then they are right, and near.
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
    """Ask for `nbytes` (int64) from the pointer `start` on, except ends that aren't aligned to 16.

    The first warp asks, with Hopper's instruction. Chips without dependent launch don't prefetch.
    """
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
    """Where each thread's next request begins, int64, and its length, int32; 0 or less is none."""
    end = (address + nbytes) // 16 * 16
    at = (address + 15) // 16 * 16 + done + tl.arange(0, LANES).to(tl.int64) * CHUNK
    return at, tl.minimum(end - at, CHUNK).to(tl.int32)
