"""A prompt's latent attention without copies of its queries and keys: the function of mla.py's MLA
with the strategy `expand`.

A fused attention wants each head's two parts side by side, and the model's page copies both parts
to get there. Here the queries stay where their projection has left them, and their last R columns
are rotated in place. W_UK's product writes into the keys' memory, past which one kernel writes the
key that all heads share. For 4,096 tokens of Moonlight's shape these are 25 MB read and written a
layer, where copies are 109 MB.

Shapes: B rows, S tokens of a row, N = B S, H heads, P nope dim, R rope dim, V value dim, C latent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from r1.kernels.chip import Chip, let_next_start, power_of_two, wait_for_previous
from r1.model.attend import Expand
from r1.model.cache import LayerCache
from r1.model.layers import project
from r1.model.mla import MLA
from r1.model.rope import rotate
from r1.model.step import Step


def attention(
    layer: Any, x: Tensor, step: Step, cache: LayerCache | None, residual: Tensor | None = None
) -> Tensor:
    """A layer's attention of x (B, S, D) -> (B, S, D), and the residual (B, S, D) if there is one,
    which the output projection adds. Other layers than those of the first line compute it
    themselves, and so do all in steps that see earlier keys. `step.multiply` is prompt.py's.
    """
    expands = isinstance(layer, MLA) and type(layer.attend[step.phase]) is Expand
    if expands and step.starts_rows:
        o, add = _expanded(layer, x, step, cache), cast(Callable[..., Tensor], step.multiply)
        return add(layer.o_proj.matrix, o, residual=residual)
    y: Tensor = layer(x, step, cache)
    return y if residual is None else residual + y


def _expanded(mla: MLA, x: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
    """All but the output projection: (B, S, D) -> (B, S, H V). Read it beside `MLA.forward` and
    `Expand`.
    """
    a, multiply = mla.shape, step.multiply
    if a.q_lora_rank is None:
        # (B, S, H (P + R)), (B, S, C + R)
        q, kv = project(x, multiply, mla.q_proj, mla.kv_a_proj_with_mqa)
    else:
        # (B, S, Q), (B, S, C + R)
        c_q, kv = project(x, multiply, mla.q_a_proj, mla.kv_a_proj_with_mqa)
        q = mla.q_b_proj(mla.q_a_layernorm(c_q), multiply)  # (B, S, H (P + R))
    c_kv, k_pe = kv.split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)  # (B, S, C), (B, S, R)
    c_kv = mla.kv_a_layernorm(c_kv)  # (B, S, C)
    k_pe = rotate(k_pe[:, :, None], step.cos, step.sin)[:, :, 0]  # (B, S, R)
    if cache is not None:
        (kept,) = step.write(cache, torch.cat((c_kv, k_pe), dim=-1))  # (B, S, C + R)
        # (B, S, C), (B, S, R)
        c_kv, k_pe = kept.split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)
    q = q.unflatten(-1, (a.num_attention_heads, -1))  # (B, S, H, P + R)
    k, v = heads(q, c_kv, k_pe, *mla.kv_b_proj.by_head(), step.cos, step.sin)
    # (B, H, S, P + R), (B, H, S, P + R), (B, H, S, V)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=mla.scale)  # (B, H, S, V)
    return o.transpose(1, 2).flatten(2)  # (B, S, H V)


@torch.library.custom_op("r1::prompt_heads", mutates_args=("q",))
def heads(
    q: Tensor, c_kv: Tensor, k_pe: Tensor, w_uk: Tensor, w_uv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate the last R columns of q (B, S, H, P + R), in place, and make the keys
    (B, S, H, P + R) and values (B, S, H, V) of c_kv (B, S, C) and k_pe (B, S, R), rotated already.

    torch.compile takes it as a whole.
    """
    k, v = _results(q, w_uv)
    c = c_kv.flatten(0, 1).expand(len(w_uk), -1, -1)  # (H, N, C), all of the same memory
    for weight, made in ((w_uk, k[..., : w_uk.shape[1]]), (w_uv, v)):
        torch.bmm(c, weight.mT, out=made.flatten(0, 1).transpose(0, 1))  # (H, N, P) or (H, N, V)
    finish(Chip.of(q.device), q, k, k_pe, cos, sin)
    return k, v


@heads.register_fake
def _(
    q: Tensor, c_kv: Tensor, k_pe: Tensor, w_uk: Tensor, w_uv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return _results(q, w_uv)


def _results(q: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the keys and values."""
    return q.new_empty(q.shape), q.new_empty(*q.shape[:3], w_uv.shape[1])


def finish(chip: Chip, q: Tensor, k: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the last R columns of q (B, S, H, P + R), and write k_pe (B, S, R) to those of k."""
    tokens, (count, width), rope = cos.shape[:2].numel(), q.shape[2:], k_pe.shape[-1]
    q, k, k_pe = q.view(tokens, count, width), k.view(tokens, count, width), k_pe.flatten(0, 1)
    pads = power_of_two(count), power_of_two(rope)
    # A thread has 16 bytes of bf16 at least. So no two threads have the same numbers, of which one
    # might read what the other has rotated.
    chip.run(
        finish_kernel, (tokens,), q, q.stride(0), k, k_pe, k_pe.stride(0), cos.contiguous(),
        sin.contiguous(), HEADS=count, NOPE=width - rope, ROPE=rope, HEADS_PAD=pads[0],
        ROPE_PAD=pads[1], warps=max(1, min(8, pads[0] * pads[1] // 256)),
    )  # fmt: skip


@triton.jit
def finish_kernel(
    q, q_stride, k, k_pe, k_pe_stride, cos, sin, HEADS: tl.constexpr, NOPE: tl.constexpr,
    ROPE: tl.constexpr, HEADS_PAD: tl.constexpr, ROPE_PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token's heads: pairs (a, b) of q become (a cos - b sin, b cos + a sin), where `sin` has
    the minus already (rope.py).
    """
    WIDTH: tl.constexpr = NOPE + ROPE
    PAIRS: tl.constexpr = ROPE_PAD // 2
    token = tl.program_id(0).to(tl.int64)
    head, r = tl.arange(0, HEADS_PAD)[:, None], tl.arange(0, ROPE_PAD)
    real = (head < HEADS) & (r < ROPE)[None, :]
    column = head * WIDTH + NOPE + r[None, :]
    wait_for_previous(PDL)
    let_next_start(PDL)
    key = tl.load(k_pe + token * k_pe_stride + r, mask=r < ROPE, other=0.0)
    cosines = tl.load(cos + token * ROPE + r, mask=r < ROPE, other=0.0)
    sines = tl.load(sin + token * ROPE + r, mask=r < ROPE, other=0.0)
    place = q + token * q_stride + column
    pe = tl.load(place, mask=real, other=0.0).to(tl.float32)  # (HEADS_PAD, ROPE_PAD)
    a, b = tl.split(tl.reshape(pe, (HEADS_PAD, PAIRS, 2)))  # (HEADS_PAD, PAIRS) each
    cos_a, cos_b = tl.split(tl.reshape(cosines, (PAIRS, 2)))  # (PAIRS,) each
    sin_a, sin_b = tl.split(tl.reshape(sines, (PAIRS, 2)))
    turned_a = a * cos_a[None, :] + b * sin_a[None, :]
    turned_b = b * cos_b[None, :] + a * sin_b[None, :]
    turned = tl.reshape(tl.join(turned_a, turned_b), (HEADS_PAD, ROPE_PAD))
    tl.store(place, turned.to(q.dtype.element_ty), mask=real)
    keys = tl.broadcast_to(key[None, :], (HEADS_PAD, ROPE_PAD))
    tl.store(k + token * HEADS * WIDTH + column, keys, mask=real)
