"""Between the projections and the attention: the latent's norm, rotation, cache entry, and q W_UK.

Shapes: B rows, S new tokens of a row, N = B S tokens, T slots of the cache, H heads,
P qk_nope_head_dim, R rope dim, C latent (kv_lora_rank).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from r1.kernels.chip import (
    Chip,
    Choices,
    Sizes,
    ceil_div,
    let_next_start,
    power_of_two,
    product,
    wait_for_previous,
)
from r1.kernels.tiles import load_tile, matrix_of, operand
from r1.model.rope import rotate


@dataclass(frozen=True)
class LatentLaunch:
    """Each program makes `columns` of one head's absorbed query, for `rows` tokens."""

    rows: int
    columns: int
    warps: int = 4

    @staticmethod
    def default(sizes: Sizes, chip: Chip) -> LatentLaunch:
        tokens, _heads, _nope, latent, _itemsize = sizes
        # Twice the programs are worth reading W_UK twice.
        rows = min(64, power_of_two(ceil_div(tokens, 2), 16))
        return LatentLaunch(rows, min(128, power_of_two(latent, 16)))

    @property
    def choices(self) -> Choices:
        return {"columns": (16, 32, 64, 128, 256), "warps": (2, 4, 8)}


def latent(
    chip: Chip, q: Tensor, kv: Tensor, w_uk: Tensor, gain: Tensor, eps: float, cos: Tensor,
    sin: Tensor, positions: Tensor, cache: Tensor, launch: LatentLaunch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (N, H (P + R)), kv (N, C + R), W_UK (H, P, C) -> absorbed q_c (N, H, C), q_pe (N, H, R).

    q and kv are the projections' outputs, not yet normed or rotated; q_pe is rotated.
    Writes each token's latent to `cache` (B, T, C + R) at its place in `positions`, int64 (B, S).
    `gain` (C,) is the norm's. cos and sin are rope.py's, fp32 (B, S, 1, R).
    """
    tokens, (heads, nope, c), rope = q.shape[0], w_uk.shape, cos.shape[-1]
    q_c, q_pe = q.new_empty(tokens, heads, c), q.new_empty(tokens, heads, rope)
    use = launch or chip.launch(LatentLaunch, tokens, heads, nope, c, q.itemsize)
    absorbing = heads * ceil_div(c, use.columns) * ceil_div(tokens, use.rows)
    chip.run(
        latent_kernel, (absorbing + tokens, ), q, q.stride(0), kv, kv.stride(0),
        operand(w_uk, chip.ptx),
        gain, eps, cos, sin, positions, positions.shape[1], cache, cache.stride(0),
        cache.stride(1), cache.shape[1], q_c, q_pe, tokens, absorbing, HEADS=heads, NOPE=nope,
        ROPE=rope, LATENT=c, NOPE_PAD=power_of_two(nope, 16), ROPE_PAD=power_of_two(rope),
        LATENT_PAD=power_of_two(c), ROWS=use.rows, BLOCK_C=use.columns, warps=use.warps,
    )  # fmt: skip
    return q_c, q_pe


def latent_torch(
    q: Tensor, kv: Tensor, w_uk: Tensor, gain: Tensor, eps: float, cos: Tensor, sin: Tensor,
    positions: Tensor, cache: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The twin."""
    heads, nope, c = w_uk.shape
    rope = cos.shape[-1]
    q_nope, q_pe = q.unflatten(-1, (heads, -1)).split([nope, rope], dim=-1)  # (N, H, P), (N, H, R)
    c_kv, k_pe = kv.split([c, rope], dim=-1)
    cos, sin = cos.flatten(0, 1)[None], sin.flatten(0, 1)[None]  # (1, N, 1, R)
    pe = rotate(torch.cat((q_pe, k_pe[:, None]), dim=1)[None], cos, sin)[0]  # (N, H + 1, R)
    normed = gain * F.rms_norm(c_kv, gain.shape, eps=eps)
    entry = torch.cat((normed, pe[:, -1]), dim=-1)  # (N, C + R)
    rows = torch.arange(cache.shape[0], device=cache.device)[:, None]
    cache.index_put_((rows, positions), entry.view(*positions.shape, -1))
    return torch.einsum("nhp,hpc->nhc", q_nope, w_uk), pe[:, :-1].contiguous()


LATENT = {"torch": latent_torch, "triton": latent}


@triton.jit
def latent_kernel(
    q, q_stride, kv, kv_stride, w_uk, gain, eps, cos, sin, positions, new, cache,
    cache_row, cache_slot, capacity, q_c, q_pe, tokens, absorbing, HEADS: tl.constexpr,
    NOPE: tl.constexpr, ROPE: tl.constexpr, LATENT: tl.constexpr, NOPE_PAD: tl.constexpr,
    ROPE_PAD: tl.constexpr, LATENT_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Two kinds of programs in one launch: the first `absorbing` make queries, each of the others
    writes one token's cache entry.
    """
    let_next_start(PDL)
    program = tl.program_id(0)
    if program < absorbing:
        absorb(
            program, q, q_stride, w_uk, cos, sin, q_c, q_pe, tokens,
            HEADS, NOPE, ROPE, LATENT, NOPE_PAD, ROPE_PAD, ROWS, BLOCK_C, PDL,
        )  # fmt: skip
    else:
        token = (program - absorbing).to(tl.int64)
        write(
            kv + token * kv_stride, gain, eps, cos + token * ROPE, sin + token * ROPE,
            positions + token, cache + (token // new) * cache_row, cache_slot, capacity, ROPE,
            LATENT, ROPE_PAD, LATENT_PAD, PDL,
        )  # fmt: skip


@triton.jit
def absorb(
    program, q, q_stride, w_uk, cos, sin, q_c, q_pe, tokens, HEADS: tl.constexpr,
    NOPE: tl.constexpr, ROPE: tl.constexpr, LATENT: tl.constexpr, NOPE_PAD: tl.constexpr,
    ROPE_PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_C columns of q_nope W_UK for one head and ROWS tokens.

    A head's first block of columns also rotates its q_pe.
    """
    blocks: tl.constexpr = (LATENT + BLOCK_C - 1) // BLOCK_C
    block, head = program % blocks, program // blocks % HEADS
    row = (program // (blocks * HEADS) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    p, r = tl.arange(0, NOPE_PAD), tl.arange(0, ROPE_PAD)
    matrix = matrix_of(w_uk, head.to(tl.int64))
    # A weight, so it is loaded before the wait.
    w = load_tile(matrix, p[:, None], (p < NOPE)[:, None], c[None, :], 0, LATENT, w_uk)
    wait_for_previous(PDL)
    real = (row < tokens)[:, None]
    q += row[:, None] * q_stride + head * (NOPE + ROPE)  # (ROWS, 1)
    q_nope = tl.load(q + p[None, :], mask=real & (p < NOPE)[None, :], other=0.0)
    if block == 0:
        angle = row[:, None] * ROPE + r[None, :]
        mask = real & (r < ROPE)[None, :]
        pair = tl.load(q + NOPE + r[None, :], mask=mask, other=0.0).to(tl.float32)
        swapped = tl.load(q + NOPE + (r ^ 1)[None, :], mask=mask, other=0.0).to(tl.float32)
        turned = pair * tl.load(cos + angle, mask=mask, other=0.0) + swapped * tl.load(
            sin + angle, mask=mask, other=0.0
        )
        place = q_pe + (row[:, None] * HEADS + head) * ROPE + r[None, :]
        tl.store(place, turned.to(q_pe.dtype.element_ty), mask=mask)
    absorbed = product(q_nope, w, tl.zeros((ROWS, BLOCK_C), tl.float32))  # (ROWS, BLOCK_C)
    at = q_c + (row[:, None] * HEADS + head) * LATENT + c[None, :]
    tl.store(at, absorbed.to(q_c.dtype.element_ty), mask=real & (c < LATENT)[None, :])


@triton.jit
def write(
    kv, gain, eps, cos, sin, position, row, cache_slot, capacity, ROPE: tl.constexpr,
    LATENT: tl.constexpr, ROPE_PAD: tl.constexpr, LATENT_PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write one token's normed latent and rotated key to its slot of the cache's row.

    All inputs are loaded first: one latency, not five.
    """
    c, r = tl.arange(0, LATENT_PAD), tl.arange(0, ROPE_PAD)
    # A weight, so it is loaded before the wait.
    gains = tl.load(gain + c, mask=c < LATENT, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    at = tl.load(position)
    x = tl.load(kv + c, mask=c < LATENT, other=0.0).to(tl.float32)
    pair = tl.load(kv + LATENT + r, mask=r < ROPE, other=0.0).to(tl.float32)
    swapped = tl.load(kv + LATENT + (r ^ 1), mask=r < ROPE, other=0.0).to(tl.float32)
    turned = pair * tl.load(cos + r, mask=r < ROPE, other=0.0) + swapped * tl.load(
        sin + r, mask=r < ROPE, other=0.0
    )
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / LATENT + eps)
    normed = normed.to(kv.dtype.element_ty).to(tl.float32)  # rounded, as layers.py does
    if at < capacity:
        slot = row + at * cache_slot
        tl.store(slot + c, (normed * gains).to(row.dtype.element_ty), mask=c < LATENT)
        tl.store(slot + LATENT + r, turned.to(row.dtype.element_ty), mask=r < ROPE)
