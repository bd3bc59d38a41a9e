"""Attention of new tokens to the latent cache, split over the context, then W_UV (V2 paper, 2.1.2).

All heads share the latents, so a tile of heads meets a tile of slots in one matrix product, and
the latents loaded for it serve as values too. A row's context is cut into splits, so that few rows
still fill the chip. Each split has its own softmax, and a second kernel joins them. The kernels are
in attention_kernels.py. They read lengths from a tensor, so a graph can hold them. They never read
slots after a row's length.

Shapes: B rows, S new tokens of a row, N = B S tokens, T slots of the cache, H heads, R rope dim,
V value dim, C latent (kv_lora_rank), Z splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from r1.kernels.attention_kernels import split_kernel, sum_kernel
from r1.kernels.chip import Chip, Choices, Sizes, ceil_div, power_of_two
from r1.kernels.fixed import GROUP, Fixed
from r1.kernels.tiles import operand
from r1.model.attend import UpProjection, by_head, probabilities
from r1.model.cache import LayerCache
from r1.model.step import Step

LOG2_E = 1.4426950408889634
"""The kernels use powers of 2, which the hardware has."""


class _Splits(NamedTuple):
    """The first kernel's default tiles."""

    heads: int
    keys: int
    splits: int
    stages: int


@dataclass(frozen=True)
class AttentionLaunch:
    """How the context is split, and the tiles of both kernels.

    First kernel: each program takes `heads` heads of one token through one of `splits` (a power of
    two) parts of the context, `keys` slots at a time. `apart` keeps Triton from scheduling its two
    products together (see `split_kernel`). `early` prefetches keys while the previous kernel runs.
    Second kernel: each program makes `values` values of one head, for as many tokens as have
    `sum_rows` splits together, `latents` columns of W_UV at a time.
    """

    heads: int
    keys: int
    splits: int
    warps: int
    stages: int
    apart: bool = False
    early: bool = False
    sum_rows: int = 16
    values: int = 32
    latents: int = 128
    sum_warps: int = 4
    sum_stages: int = 2

    @staticmethod
    def default(sizes: Sizes, chip: Chip) -> AttentionLaunch:
        tokens, all_heads, latent, _rope, _capacity, itemsize = sizes
        room = chip.shared - 2**13  # the rest is for probabilities and the compiler
        heads, keys, splits, stages = _split_tiles(sizes, chip, room)
        few, many, tall = splits <= 16, all_heads >= 64, heads > 16 or all_heads >= 64
        warps = 8 if tall or (tokens == 1 and keys == 64) else 4
        # One token's few splits are no tall tile: 16 rows leave room for all of W_UV's columns.
        lone = tokens == 1 and few
        tall = tall and not lone
        rows, sum_stages = max(64 if tall else 16, splits), 3 if tall else 2
        wide = 128 if tall or itemsize > 2 else 512
        # The more shared memory the programs of one token's sum take, the fewer of the next
        # kernel's wait beside them, with their weights loaded. With 32 values in place of 64 a step
        # of Moonlight's layers took 113 us less on an H100 in FP8, and 43 less in 4 bits.
        most = 32 if lone or not (few or tall) else 64 if tokens == 1 else 128

        def fits(values: int, columns: int) -> bool:
            """Whether the sum's tiles do: all of W_UV's columns at once, or a pipeline of them."""
            tiles = 1 if columns >= latent else sum_stages
            return (rows + values) * columns * itemsize * tiles <= room

        values = next(v for v in (128, 64, 32) if v == 32 or (v <= most and fits(v, wide)))
        latents = next(c for c in (512, 128, 64, 32) if c == 32 or (c <= wide and fits(values, c)))
        sum_warps = 8 if not tall and rows * values > 1024 else 4
        return AttentionLaunch(
            heads, keys, splits, warps, stages, chip.dependent_launch and many,
            chip.dependent_launch and tokens == 1, rows, values,
            min(latents, power_of_two(latent, 16)), sum_warps, sum_stages,
        )  # fmt: skip

    @property
    def choices(self) -> Choices:
        return {
            "splits": (1, 2, 4, 8, 16, 32, 64), "keys": (16, 32, 64), "heads": (16, 32, 64),
            "warps": (4, 8), "stages": (1, 2, 3, 4), "apart": (False, True), "early": (False, True),
            "values": (16, 32, 64, 128), "sum_rows": (16, 32, 64), "latents": (64, 128, 256, 512),
            "sum_warps": (4, 8), "sum_stages": (1, 2, 3),
        }  # fmt: skip


def _split_tiles(sizes: Sizes, chip: Chip, room: int) -> _Splits:
    """The first kernel's tiles by default, in `room` bytes of shared memory."""
    tokens, heads, latent, rope, capacity, itemsize = sizes
    # Bytes of one slot's key, and of one head's query.
    key = (power_of_two(latent, 16) + power_of_two(rope, 16)) * itemsize
    # Keys that are worth a split: its sum has a cost, too.
    least = 16 if tokens == 1 else 32 if tokens <= 16 else 128

    def busy(block: int) -> bool:
        """Whether half of the processors get a program, if blocks have so many heads. (One token
        of R1's 128 heads with 256 slots on an H100: 13.5 us in blocks of 16, 15.2 of 64.)
        """
        programs = tokens * ceil_div(heads, block) * min(64, max(1, capacity // least))
        return programs >= chip.processors // 2

    block = next(
        b
        for b in (64, 32, 16)
        if b == 16 or (b <= heads and (b + 2 * 32) * key <= room and busy(b))
    )
    # Splits that give each processor one program.
    fill = max(1, chip.processors // (tokens * ceil_div(heads, block)))
    splits = 1 << (max(1, min(64, fill, capacity // least)).bit_length() - 1)
    wanted = max(16, min(64, power_of_two(ceil_div(capacity, splits))))
    keys = next(
        k for k in (64, 32, 16) if k == 16 or (k <= wanted and (block + 2 * k) * key <= room)
    )
    buffers = (room - block * key) // (keys * key)
    # Tiles of 16 heads pass through registers.
    stages = max(1, min(3, buffers if block > 16 else 1 + buffers))
    if tokens == 1 and block == 16:
        # Buffers for more tiles than a split has would only keep programs of the next kernel from
        # waiting beside these, with their weights loaded. 2 stages in place of 3, with 256 slots on
        # an H100: all layers of Moonlight took 39 us less in bf16, 38 less in 4 bits, and 4 more in
        # FP8; five layers of R1 33 less in 4 bits, 74 less in FP8. With 8 tokens Moonlight's took
        # 28 us more in 4 bits, so the rule is for one.
        stages = min(stages, 1 + ceil_div(capacity, splits * keys))
    return _Splits(block, keys, splits, stages)


def attention(
    chip: Chip, q_c: Tensor, q_pe: Tensor, cache: Tensor, positions: Tensor, w_uv: Tensor,
    scale: float, launch: AttentionLaunch | None = None, fixed: Fixed | None = None,
) -> Tensor:  # fmt: skip
    """q_c (N, H, C) absorbed, q_pe (N, H, R) rotated, cache (B, T, C + R), positions int64 (B, S),
    W_UV (H, V, C) -> (N, H, V).

    Token n is number n % S of row n // S, and attends to slots 0 to its position. The first kernel
    reads `positions` before its wait, so they must be older than the previous kernel (chip.py).
    `fixed` is memory for the result (N, H V): it is stored there, too.
    """
    tokens, heads, latent = q_c.shape
    rope, value, new = q_pe.shape[-1], w_uv.shape[1], positions.shape[1]
    use = launch or chip.launch(
        AttentionLaunch, tokens, heads, latent, rope, cache.shape[1], cache.itemsize
    )
    part = q_c.new_empty(tokens, heads, use.splits, latent)
    weight = q_c.new_empty(tokens, heads, use.splits, dtype=torch.float32)
    chip.run(
        split_kernel, (ceil_div(heads, use.heads), use.splits, tokens), q_c, q_pe, cache,
        cache.stride(0), cache.stride(1), cache.shape[1], positions, new, part, weight,
        scale * LOG2_E, HEADS=heads, LATENT=latent, ROPE=rope, LATENT_PAD=power_of_two(latent, 16),
        ROPE_PAD=power_of_two(rope, 16), BLOCK_H=use.heads, BLOCK_T=use.keys, SPLITS=use.splits,
        STAGES=use.stages, APART=use.apart, EARLY=use.early, warps=use.warps, stages=use.stages,
    )  # fmt: skip
    o = q_c.new_empty(tokens, heads, value)
    group = max(1, use.sum_rows // use.splits)
    values = max(min(use.values, power_of_two(value, 16)), GROUP.value if fixed else 0)
    chip.run(
        sum_kernel, (ceil_div(value, values), heads, ceil_div(tokens, group)), part, weight,
        positions, cache.shape[1], operand(w_uv, chip.ptx), o, fixed, tokens, HEADS=heads,
        LATENT=latent, VALUE=value, SPLITS=use.splits, BLOCK_T=use.keys, GROUP=group,
        BLOCK_V=values, BLOCK_C=use.latents, warps=use.sum_warps, stages=use.sum_stages,
    )  # fmt: skip
    return o


def attention_torch(
    q_c: Tensor, q_pe: Tensor, cache: Tensor, positions: Tensor, w_uv: Tensor, scale: float,
    fixed: None = None,
) -> Tensor:  # fmt: skip
    """The twin: `Absorbed` of r1/model/attend.py, over the cache's whole capacity."""
    latent = q_c.shape[-1]
    q = torch.cat((q_c, q_pe), dim=-1).view(*positions.shape, q_c.shape[1], -1)  # (B, S, H, C + R)
    scores = torch.einsum("bshd,btd->bhst", q, cache)
    slots = torch.arange(cache.shape[1], device=cache.device)
    hidden = slots > positions[:, None, :, None]  # (B, 1, S, T)
    bias = torch.zeros(hidden.shape, device=cache.device).masked_fill(hidden, float("-inf"))
    p = probabilities(scores, scale, bias).to(cache.dtype)
    c = torch.einsum("bhst,btc->bshc", p, cache[..., :latent])
    return by_head(c, w_uv.mT).flatten(0, 1)


ATTENTION = {"torch": attention_torch, "triton": attention}


@torch.library.custom_op("r1::latent_attention", mutates_args=())
def _latent_attention(
    q_c: Tensor, q_pe: Tensor, cache: Tensor, positions: Tensor, w_uv: Tensor, scale: float
) -> Tensor:
    return attention(Chip.of(q_c.device), q_c, q_pe, cache, positions, w_uv, scale)


@_latent_attention.register_fake
def _(
    q_c: Tensor, q_pe: Tensor, cache: Tensor, positions: Tensor, w_uv: Tensor, scale: float
) -> Tensor:
    return q_c.new_empty(*q_c.shape[:2], w_uv.shape[1])


def attend(
    q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, up: UpProjection, scale: float,
    step: Step, cache: LayerCache | None,
) -> Tensor:  # fmt: skip
    """A decode step's `attend` (r1/model/attend.py has the shapes), by the kernels.

    They are a custom operator, which torch.compile takes as a whole.
    """
    assert cache is not None, "a decode step has a cache"
    step.write(cache, torch.cat((c_kv, k_pe), dim=-1))
    w_uk, w_uv = up.by_head()
    q_c = by_head(q_nope, w_uk).flatten(0, 1).contiguous()  # (N, H, C)
    q_pe = q_pe.flatten(0, 1).contiguous()  # (N, H, R)
    o = _latent_attention(q_c, q_pe, cache[0], step.positions, w_uv, scale)  # (N, H, V)
    return o.view(*q_nope.shape[:3], -1)
