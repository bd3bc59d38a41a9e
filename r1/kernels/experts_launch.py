"""How the experts' kernels are launched: how many rows, columns and tokens a program takes.

Shapes: N tokens, D hidden_size, I moe_intermediate_size, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from r1.kernels.chip import LEAST_TILE, Chip, Choices, Sizes, ceil_div, power_of_two
from r1.kernels.narrow import Form


@dataclass(frozen=True)
class ExpertsLaunch:
    """Each program makes `up_outputs` inner values, or `down_outputs` outputs, for `rows` tokens.

    It reads `up_inputs` or `down_inputs` columns of weights at a time. Less than 16 rows: no
    tl.dot, but if it is `narrow`. With `apart` each tile of tokens has programs of its own, so that
    an expert's tokens are spread over the chip. Without it one program takes all of its expert's
    tokens, so weights are read once.
    `ahead`: of one token, so many tiles of down's weights are loaded before the wait.
    `narrow`: the kernels of experts_narrow.py, or of rounded.py, which have their own number of
    columns. (Of rounded.py `up_outputs` is always 128, too.)
    """

    rows: int
    up_outputs: int
    up_inputs: int
    down_outputs: int
    down_inputs: int
    warps: int = 4
    stages: int = 1
    apart: bool = False
    ahead: int = 1
    narrow: bool = False

    @staticmethod
    def default(sizes: Sizes, chip: Chip) -> ExpertsLaunch:
        tokens, chosen, experts, dim, inner, itemsize, *packed = sizes
        if packed[3:]:
            return _rounded(ceil_div(tokens * chosen, experts), chip)
        # Dot products of packed weights, also of several tokens as long as few experts meet two. On
        # an H100, a step of Moonlight with 2, 4 and 8 tokens took 1.73, 2.42 and 3.77 ms so (4
        # bits); narrow products take about as long with 4, and half a millisecond less with 8.
        most = experts if packed[:2] == [4, 1] and not packed[2:] else experts // 4
        if packed and (tokens == 1 or tokens * chosen <= most):
            up_inputs, down_inputs = (power_of_two(size, 32) for size in (dim, inner))
            up_inputs, down_inputs = min(2048, up_inputs), min(512, down_inputs)
            # Of long rows more at once: one token of R1's takes 87 us in 4 bits, and 94 with half
            # as many; in FP8 141 and 142. One token of Moonlight's layers took 28 us less in 4 bits
            # with 8 rows of up in place of 4, and 11 less with 2 tiles ahead in place of 3.
            long, one, four = dim > 4096, tokens == 1, packed[:2] == [4, 1]
            up = 8 if long or (one and four) else 4
            if four:
                down, ahead = (4, 3) if long else (2, 2 if one else 3)
                return ExpertsLaunch(1, up, up_inputs, down, down_inputs, 4, ahead=ahead)
            # R1's take 105 us on an H200 with 2 rows of down, and 110 with 4.
            if packed[:1] == [8]:
                return ExpertsLaunch(1, up, up_inputs, 2 if one else 4, down_inputs, 4)
            return ExpertsLaunch(1, up, up_inputs, 4, min(256, down_inputs), 4)
        if tokens == 1:
            down_inputs = min(512, power_of_two(inner))
            return ExpertsLaunch(1, 2, min(2048, power_of_two(dim)), 4, down_inputs)
        share = ceil_div(tokens * chosen, experts)
        if packed[2:] and (packed[0] == 8 or share < 128):
            return _narrow(share, fp8=packed[0] == 8, chip=chip)
        if tokens * chosen >= 32 * experts:
            # A prompt: arithmetic is the limit, so tiles are as square as they can be. (Of fp32,
            # larger ones would spill.)
            columns = 128 // itemsize
            large = itemsize == 2 and chip.shared >= 3 * 3 * 128 * columns * itemsize
            up = 128 if large else 64
            stages = max(1, min(4, chip.shared // ((2 * up + 128) * columns * itemsize)))
            return ExpertsLaunch(128, up, columns, 2 * up, columns, 8, stages, apart=True)
        # Few experts get twice their share of tokens.
        rows = min(64, power_of_two(2 * share, 16))
        columns = min(256 // itemsize, power_of_two(min(dim, inner), 16))
        # Packed, where narrow products don't do: the best of a sweep on an H100, as above.
        large = packed[:1] != [8] and chip.shared >= 2 * (2 * 64 + rows) * columns * itemsize
        up, most = 64 if large else 32, 3 if packed and packed[:1] != [8] else 4
        stages = max(1, min(most, chip.shared // ((2 * up + rows) * columns * itemsize)))
        return ExpertsLaunch(rows, up, columns, 64, columns, 4, stages, apart=bool(packed))

    def form(self, length: int, stored: tuple[int, ...]) -> Form | None:
        """The form in which the kernels so launched take vectors of `length` numbers, where not as
        they are. `stored`: `storage_sizes`.
        """
        if self.narrow and stored[2:]:
            return Form(length, stored[2], fp8=stored[0] == 8)
        return Form(length) if stored[1:2] == (1,) and self.rows < LEAST_TILE else None

    @property
    def up(self) -> dict[str, int]:
        """How gate's and up's kernel is launched."""
        tile = {"BLOCK_OUT": self.up_outputs, "BLOCK_IN": self.up_inputs}
        return tile | {"warps": self.warps, "stages": self.stages}

    @property
    def down(self) -> dict[str, int]:
        """How down's kernel is launched."""
        tile = {"BLOCK_OUT": self.down_outputs, "BLOCK_IN": self.down_inputs}
        return tile | {"warps": self.warps, "stages": self.stages}

    @property
    def choices(self) -> Choices:
        if self.rows < LEAST_TILE and not self.narrow:
            return {
                "rows": (1, 16), "up_outputs": (1, 2, 4, 8),
                "up_inputs": (512, 1024, 2048), "down_outputs": (1, 2, 4, 8),
                "down_inputs": (64, 128, 256, 512), "warps": (1, 2, 4, 8), "ahead": (1, 2, 3, 4),
            }  # fmt: skip
        if self.narrow:
            return {
                "rows": (8, 16, 32, 64, 128), "up_outputs": (16, 32, 64, 128),
                "down_outputs": (16, 32, 64, 128, 256), "warps": (4, 8), "stages": (2, 3, 4, 5),
                "narrow": (False, True),
            }  # fmt: skip
        return {
            "rows": (1, 8, 16, 32, 64, 128), "up_outputs": (16, 32, 64, 128),
            "up_inputs": (32, 64, 128, 256), "down_outputs": (16, 32, 64, 128, 256),
            "down_inputs": (32, 64, 128, 256), "warps": (4, 8), "stages": (2, 3, 4, 5),
            "apart": (False, True), "narrow": (False, True),
        }  # fmt: skip


def _narrow(share: int, fp8: bool, chip: Chip) -> ExpertsLaunch:
    """Where an expert has `share` tokens. Best of sweeps on an H100, microseconds of a layer of
    Moonlight for 32, 512 and 4,096 tokens: 4 bits 139, 368, 2,789 (tiles: 207, 653, 2,505), FP8
    206, -, 2,120 (213, -, 2,595).
    """
    rows = min(64 if share >= 64 else 32, power_of_two(share, 8))
    up, down = 128 if share >= 32 else 64, 128 if share >= 8 else 64
    stages = min(4 if fp8 and share < 8 else 3, chip.shared // (2 * (up + rows) * 128))
    warps = 8 if rows == 64 else 4
    return ExpertsLaunch(rows, up, 128, down, 128, warps, max(1, stages), apart=True, narrow=True)


def _rounded(share: int, chip: Chip) -> ExpertsLaunch:
    """Where x is FP8, too (rounded.py), and an expert has `share` tokens. Others are not timed."""
    rows = 64 if share <= 64 else 128
    stages = min(4, chip.shared // ((256 + rows) * 128))
    return ExpertsLaunch(rows, 128, 128, 256, 128, 8, stages, apart=True, narrow=True)
