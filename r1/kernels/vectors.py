"""Columns of vectors, as a thread needs them that has 16 FP8 weights of a row side by side.

A thread loads no more than 8 columns of a bf16 x at once. So threads would have to exchange them
through shared memory: with barriers, and a load that stands after a barrier in the program starts
after it, too. So here each thread loads the columns of its own weights, 8 and then 8.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns_of(x, stride, real, first, limit, w, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns from `first` on of COUNT vectors x, `stride` apart, as they are stored (COUNT,
    COLUMNS): 0 from vector number `real` on, and from column `limit` on. Tiles of operand `w` are
    to be multiplied by them.
    """
    if w.PER == 4:
        n, each = tl.arange(0, COUNT * COLUMNS // 16)[:, None], COLUMNS // 16
        row, at = n // each, first + n % each * 16 + tl.arange(0, 8)[None, :]
        place = x + row * stride + at
        left = tl.load(place, mask=(row < real) & (at < limit), other=0.0)
        right = tl.load(place + 8, mask=(row < real) & (at + 8 < limit), other=0.0)
        both = tl.permute(tl.join(left, right), (0, 2, 1))  # (COUNT COLUMNS / 16, 2, 8)
        v = tl.reshape(both, (COUNT, COLUMNS))
    else:
        row, at = tl.arange(0, COUNT)[:, None], first + tl.arange(0, COLUMNS)[None, :]
        v = tl.load(x + row * stride + at, mask=(row < real) & (at < limit), other=0.0)
    return v
