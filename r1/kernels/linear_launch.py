"""How the projections' kernels are launched: how many rows, columns and tokens a program takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from r1.kernels.chip import LEAST_TILE, Chip, Choices, Sizes, ceil_div, power_of_two


@dataclass(frozen=True)
class LinearLaunch:
    """Each program makes `outputs` columns of y for `rows` tokens, `inputs` columns of W at a time.

    With less than 16 rows it doesn't use tl.dot, but if it is `narrow`: then products are those of
    narrow.py, or of rounded.py, which have their own number of columns. With several `parts` it
    takes so many columns of each of them: linear_parts.py.
    """

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int = 1
    narrow: bool = False
    parts: int = 1

    @staticmethod
    def default(sizes: Sizes, chip: Chip) -> LinearLaunch:
        tokens, inputs, outputs, itemsize, *packed = sizes
        if packed[3:]:
            return _rounded(tokens, outputs, chip)
        # Very many short rows: R1's q_b (24576, 1536).
        wide = outputs >= 64 * chip.processors and inputs <= 2048
        if tokens == 1 and packed[:2] == [4, 1]:
            return _four_bits(inputs, outputs, wide, chip)
        # Dot products of a few tokens, on an H100: of 8 and 4 bits, Moonlight's first projection
        # takes 6.0 us, by narrow products 7.1; of 4 and FP8 7.4, as tiles 7.6; of 8 10.0 and 7.6.
        # Of 8 and very many rows they take 28 us on an H200 (22528 rows), by narrow products 18.
        most = 4 if outputs >= 64 * chip.processors else 8
        if 1 < tokens <= most and packed[:2] == [4, 1]:
            columns = 2048 if inputs % 2048 == 0 else min(1024, power_of_two(inputs, 32))
            return LinearLaunch(2 if tokens == 2 or outputs <= inputs else 4, 8, columns, 1)
        if 1 < tokens <= 4 and packed[:1] == [8]:
            columns = min(1024, power_of_two(inputs, 32))  # of a warp
            return LinearLaunch(power_of_two(tokens), 4, columns, 1)
        if tokens == 1 and packed:
            if packed[0] == 8 and inputs < 2048 and outputs >= 160 * chip.processors:
                # A warp for each program: no barriers, no columns beyond 1536, and all 1,536
                # programs run at once: 15.9 us of a step for R1's q_b in FP8 on an H100, and 17.2
                # with 8 rows of 2048 columns and 4 warps.
                return LinearLaunch(1, 16, min(512, power_of_two(inputs, 16)), 1)
            # 8 rows where 4 make more programs than run at once: 3.4 us for Moonlight's first
            # projection in FP8 on an H100, and 3.9 with 4.
            few = 16 * chip.processors < outputs <= 32 * chip.processors or wide
            rows = 8 if few and packed[0] == 8 else 4
            return LinearLaunch(1, rows, min(2048, power_of_two(inputs, 16)), 4)
        if tokens == 1:
            if inputs == 2048 >= outputs:
                return LinearLaunch(1, 1, 2048, 2)  # few rows: a program for each
            if inputs >= 4096 and inputs % 2048 == 0:
                return LinearLaunch(1, 2, 2048, 4 if inputs >= 8192 else 8)
            return LinearLaunch(1, 2, min(1024, power_of_two(inputs)), 4)
        rows = min(64, power_of_two(tokens, 16))
        able = tokens <= 32 and chip.dependent_launch and itemsize == 2
        if able and (parts := _in_parts(inputs, outputs, rows, packed, chip)):
            return parts
        if packed[:1] == [4] and packed[2:]:
            block = 64 if outputs >= 24 * chip.processors else 32
            return LinearLaunch(min(32, power_of_two(tokens, 8)), block, 128, block // 16, 4, True)
        # Large tiles read x less often. That pays where x is long, as long as a fifth of the
        # processors has work. Elsewhere every processor must have work first.
        wide = outputs >= (12 if inputs >= 4096 else 128) * chip.processors
        block = 64 if wide else 16 if outputs <= 16 * chip.processors else 32
        columns = min(256 // itemsize, power_of_two(inputs, 16))
        stages = max(1, min(5, chip.shared // 2 // ((block + rows) * columns * itemsize)))
        return LinearLaunch(rows, block, columns, 4, stages)

    @property
    def in_tiles(self) -> LinearLaunch:
        """The same without parts, where blocks that share a scale reach from one into the next."""
        return replace(self, warps=4, stages=4, parts=1)

    @property
    def choices(self) -> Choices:
        if self.rows < LEAST_TILE and not self.narrow:
            return {
                "rows": (1, 2, 4, 8, 16), "outputs": (1, 2, 4, 8, 16),
                "inputs": (512, 1024, 2048, 4096), "warps": (1, 2, 4, 8),
            }  # fmt: skip
        if self.narrow:
            return {
                "rows": (8, 16, 32, 64, 128), "outputs": (16, 32, 64, 128, 256), "warps": (4, 8),
                "stages": (2, 3, 4, 5, 6), "narrow": (False, True),
            }  # fmt: skip
        return {
            "rows": (1, 2, 4, 8, 16, 32, 64), "outputs": (16, 32, 64, 128),
            "inputs": (64, 128, 256), "warps": (4, 8), "stages": (2, 3, 4, 5, 6),
            "narrow": (False, True), "parts": (1, 4, 8),
        }  # fmt: skip


def _four_bits(inputs: int, outputs: int, wide: bool, chip: Chip) -> LinearLaunch:
    """Of one token that is fixed-point. Best of sweeps on an H100, microseconds, and those of the
    first rule below for all: R1's qkv_a (2112, 7168) 5.2 and 7.4, q_b 8.4 and 16.6, o_proj
    (7168, 16384) 23.3 and 26.1.
    """
    if wide:
        return LinearLaunch(1, 16, min(512, power_of_two(inputs, 32)), 2)
    many = outputs > 32 * chip.processors
    if inputs > 8192 and many:
        return LinearLaunch(1, 4, 2048, 2)
    if 4096 < inputs <= 8192 and not many:
        return LinearLaunch(1, 2, 4096, 4)
    # A warp for each 2,048 columns, and rows of 4,096 or less at once. More rows where programs
    # are many: the next kernel's start after them (Moonlight's layers took 23 us less in a step).
    columns = min(4096 if inputs <= 4096 else 2048, power_of_two(inputs, 32))
    rows = 4 if inputs <= 2048 and outputs > 16 * chip.processors else 2
    return LinearLaunch(1, rows, columns, max(1, columns // 2048))


def _in_parts(
    inputs: int, outputs: int, rows: int, packed: list[int], chip: Chip
) -> LinearLaunch | None:
    """In parts, where there are few rows of W and that is faster; else None.

    Microseconds on an H200 with 8 and 32 tokens: Moonlight's (2048, 11264) in FP8 25 and 26 in
    parts, 95 and 94 in tiles; bf16 20 and 31, 31 and 31. Its first projection and o_proj together
    in a step: FP8 10.6 and 15.6, in tiles 17 and 21; 4 bits 17.4 with 32 tokens, by narrow
    products 31.
    """
    if inputs % 1024 or outputs > 32 * chip.processors:
        return None
    if inputs >= 8192 and rows <= (32 if packed else 16):
        return LinearLaunch(rows, 16, 128, 8, parts=8)
    if inputs == 2048 and packed[2:]:
        return LinearLaunch(rows, 32, 128, 8, parts=8)
    return None


def _rounded(tokens: int, outputs: int, chip: Chip) -> LinearLaunch:
    """Where x is FP8, too (rounded.py): the largest tiles that leave work for all processors. (A
    search on an H200 found nothing faster by more than 2%.)
    """
    rows = 64 if tokens <= 64 else 128
    blocks = [
        n
        for n in (256, 128, 64)
        if ceil_div(tokens, rows) * ceil_div(outputs, n) >= chip.processors
    ]
    block = next(iter(blocks), 32)
    stages = min(4, chip.shared // ((block + rows) * 128))
    return LinearLaunch(rows, block, 128, 8 if rows == 128 else 4, stages, narrow=True)
