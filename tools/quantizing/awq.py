"""AWQ: make the columns that matter larger before rounding, and undo that in what feeds them.

(Lin, Tang, Tang, Yang, Dang, Gan, Han, arXiv 2306.00978.) A column of a matrix whose input is large
does more harm when it is rounded. Multiplied by s > 1, its rounding error, divided by s again,
becomes smaller, as long as the group's scale stays the same. The division is folded into whatever
makes the input, so the model computes what it did, and the file needs nothing beside the weights.

| the input of | is made by | what is divided by s |
|---|---|---|
| q_a_proj (q_proj), kv_a_proj; or q_proj, k_proj, v_proj | input_layernorm | its weight |
| q_b_proj | q_a_layernorm | its weight |
| o_proj | kv_b_proj, whose lower rows of each head make the values | these rows |
| o_proj of grouped-query attention | v_proj | its rows and its bias |
| gate_proj, up_proj | post_attention_layernorm | its weight; the router's columns take s |
| down_proj | up_proj, times a function of the gate | its rows |

Every s is a power of two. So a division changes no digit of a number, in whatever format it is
stored, and the router chooses the same experts. kv_a_layernorm is left alone: kv_b_proj, which
reads it, is not quantized. Where several query heads share a head of values, o_proj is left alone:
a row of v_proj then makes several of its inputs.

Shapes: out and in are a matrix's rows and columns, D hidden_size, E experts, H heads, P
qk_nope_head_dim, V v_head_dim, A head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import cast

import torch
from torch import Tensor

from quantizing.rounding import (
    Grid,
    by_output,
    fit,
    groups_of,
    most_experts,
    nearest,
    parts,
)
from quantizing.sites import ATTENTION, EXPERTS, Site, Statistics, weight
from r1.model.gqa import GQA
from r1.model.moe import MoE
from r1.model.transformer import Block
from r1.storage.codes import Codes

POWERS = tuple(step / 20 for step in range(21))
"""The exponents of the mean input that are tried for s (the paper's alpha). 0: s is 1."""
CLIPS, FEW_CLIPS = parts(0.5, 1.2), parts(0.6, 1.1, 0.1)
"""The parts of a group's range that are tried for its scale: at the end, and while s is chosen."""


def clipped(w: Tensor, h: Tensor, grid: Grid) -> Codes:
    """Round (..., out, in) to nearest, with the scales that change each group's output least.

    (The paper's section 4.1.) `h` (..., in, in): the mean of x x^T.
    """
    fitted = fit(w, grid, CLIPS, by_output(h))
    return fitted.codes(nearest(w.float(), fitted))


def fold(
    block: Block, site: Site, quantized: Collection[str], seen: Mapping[str, Statistics], grid: Grid
) -> Tensor | None:
    """Choose a site's s and fold it, in place; returns s, (in,) or (E, in).

    None: the best s is 1, or no rows make each input alone. `seen` is changed to what the site's
    matrices read from now on.
    """
    if not _foldable(block, site):
        return None
    stats = seen[site.name]
    readers = [weight(block, path) for path in site.readers if path in quantized]
    s = search(readers, stats, grid)
    if s is None:
        return None
    for path in site.readers:
        weight(block, path).mul_(s[..., None, :])  # columns
    _divide(block, site)(s)
    stats.h.div_(s[..., None, :] * s[..., :, None])
    stats.size.div_(s)
    return s


def search(readers: list[Tensor], stats: Statistics, grid: Grid) -> Tensor | None:
    """The s that rounds these matrices, (..., out, in), with the least error in their outputs."""
    size = stats.size.clamp(min=1e-8)
    size = size / size.log().mean(-1, keepdim=True).exp()  # relative to the geometric mean
    shape = size.shape if size.dim() > 1 else ()
    least = torch.full(shape[:-1], torch.inf, device=size.device)  # for each expert, or one for all
    best = torch.ones_like(size)
    for power in POWERS:
        s = torch.exp2((power * size.log2()).round())  # (..., in)
        error = torch.zeros_like(least)
        for w in readers:
            error += _error(w, s, stats.h, grid)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better[..., None], s, best)
    return None if bool((best == 1).all()) else best


def _error(w: Tensor, s: Tensor, h: Tensor, grid: Grid) -> Tensor:
    """The mean squared error of the outputs, of each expert where each has its own s."""
    if w.dim() == 2:
        return _error_of(w, s, h, grid)
    each = most_experts(w)
    if s.dim() == 1:
        return torch.stack([_error_of(part, s, h, grid).sum() for part in w.split(each)]).sum()
    parts = zip(w.split(each), s.split(each), h.split(each), strict=True)
    return torch.cat([_error_of(*part, grid) for part in parts])  # (E,)


def _error_of(w: Tensor, s: Tensor, h: Tensor, grid: Grid) -> Tensor:
    """The same of each matrix, () or (E,)."""
    w, h = w.float() * s[..., None, :], h / (s[..., None, :] * s[..., :, None])
    fitted = fit(w, grid, FEW_CLIPS, by_output(h))
    change = fitted.value(nearest(w, fitted), groups_of(w.shape[-1], grid, w.device)) - w
    return ((change @ h) * change).sum((-1, -2))


def _foldable(block: Block, site: Site) -> bool:
    """Whether a site's inputs can be divided one by one in what makes them."""
    attention = block.self_attn
    if site.name != f"{ATTENTION}.o_proj" or not isinstance(attention, GQA):
        return True
    return attention.shape.num_key_value_heads == attention.shape.num_attention_heads


def _divide(block: Block, site: Site) -> Callable[[Tensor], object]:
    """The function that divides what makes a site's input by s."""
    part, _, name = site.name.rpartition(".")
    attention = block.self_attn
    if name in ("q_a_proj", "q_proj"):
        return block.input_layernorm.weight.data.div_
    if name == "q_b_proj":
        return attention.q_a_layernorm.weight.data.div_
    if name == "o_proj":
        heads = attention.shape.num_attention_heads
        return lambda s: [rows.div_(s.view(heads, -1, 1)) for rows in values_of(block)]
    if name == "down_proj":
        return lambda s: weight(block, f"{part}.up_proj").div_(s[..., None])
    norm = block.post_attention_layernorm.weight.data
    if part != EXPERTS:
        return norm.div_
    router = cast(MoE, block.mlp).gate.weight.data  # (E, D)

    def divide(s: Tensor) -> None:
        norm.div_(s)
        router.mul_(s)

    return divide


def values_of(block: Block) -> list[Tensor]:
    """Views of the rows that make the values, by head: W_UV of kv_b_proj, (H, V, C), or v_proj's,
    (H, A, D), and its bias, (H, A, 1).
    """
    attention = block.self_attn
    heads = (attention.shape.num_attention_heads, -1)
    if isinstance(attention, GQA):
        rows, bias = weight(block, f"{ATTENTION}.v_proj"), attention.v_proj.bias
        found = [rows] if bias is None else [rows, bias.data[:, None]]
        return [each.unflatten(0, heads) for each in found]
    by_head = weight(block, f"{ATTENTION}.kv_b_proj").unflatten(0, heads)  # (H, P + V, C)
    return [by_head[:, attention.shape.qk_nope_head_dim :]]
