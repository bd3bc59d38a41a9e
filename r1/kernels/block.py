"""A decoder layer's decode step, fused: the function of transformer.py's Block, in a few kernels.

Same weights as Block; one line per kernel. Each norm is fused into the projection after it, each
residual into the one before. Read it beside `Block.forward`, `MLA.forward`, `GQA.forward` and
`MoE.forward`.
One token of a sparse layer takes 8 kernels (R1: 9), if the matrices that read the same input are
joined (r1/storage/joined.py). Weights of 4 bits take 2 more (R1: 3), which fixed.py explains.

Shapes: B rows, S new tokens of a row, N = B S tokens, D hidden_size, I intermediate_size,
W vocab_size, H heads, R rope dim, V value dim, C latent (kv_lora_rank), Q q_lora_rank, T slots of
the cache, U heads of keys and values, A head_dim. A layer's cache is one tensor here, the latents
(B, T, C + R), or two, the keys and the values (B, T, U, A).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from r1.kernels.attention import ATTENTION
from r1.kernels.chip import Chip
from r1.kernels.experts import EXPERTS, experts_take_fixed
from r1.kernels.fixed import Fixed
from r1.kernels.gated import GATED
from r1.kernels.grouped import GROUPED
from r1.kernels.latent import LATENT
from r1.kernels.linear import LINEAR, linear, linear_takes_fixed
from r1.kernels.narrow import Form
from r1.kernels.router import ROUTE
from r1.kernels.tiles import block_of, why_not
from r1.model.attend import UpProjection
from r1.model.cache import LayerCache
from r1.model.gqa import GQA
from r1.model.layers import MLP, Linear, RMSNorm
from r1.model.mla import MLA
from r1.model.moe import MoE
from r1.model.step import Step
from r1.model.transformer import Block
from r1.storage.activations import NEVER
from r1.storage.joined import products
from r1.storage.matrix import Matrix


class DecodeBlock:
    """Stands in for a Block in decode steps. `chip` None takes the kernels' torch twins.

    From `least` tokens on the inputs of FP8 products are rounded (r1/storage/activations.py).
    """

    def __init__(self, block: nn.Module, chip: Chip | None, least: int = NEVER) -> None:
        assert isinstance(block, Block)
        self.block, self.chip, self.least = block, chip, least
        self.forms: dict[tuple[Any, int], Form | None] = {}
        """What `fixed` has asked, by question and tokens: the answers."""

        def pick(table: Mapping[str, Any]) -> Callable[..., Any]:
            return partial(table["triton"], chip) if chip else table["torch"]

        self.product, self.latent, self.attention = pick(LINEAR), pick(LATENT), pick(ATTENTION)
        self.grouped = pick(GROUPED)
        self.attend = {MLA: self.to_latents, GQA: self.to_heads}[type(block.self_attn)]
        self.route, self.experts, self.gated = pick(ROUTE), pick(EXPERTS), pick(GATED)

    @staticmethod
    def why_not(block: nn.Module) -> str | None:
        """One sentence that says which storage the kernels can't read; None if they read all."""
        assert isinstance(block, Block)
        return why_not(*_matrices(block)) or split_blocks(block.mlp)

    def __call__(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """(B, S, D) -> (B, S, D). Writes the tokens' entries to `cache`."""
        flat = self.attend(x.flatten(0, 1).contiguous(), step, cache)  # (N, D)
        mlp = self.block.mlp
        y = self.mixture(flat, mlp) if isinstance(mlp, MoE) else self.dense(flat, mlp)
        return self.block.sum_inner(y).view_as(x)

    def fixed(self, x: Tensor, ask: Callable[..., Form | None], *about: Any) -> Fixed | None:
        """Memory for another kernel's input, of as many tokens as x (N, any) has, where that takes
        fixed-point vectors (fixed.py) or pairs (narrow.py). `ask` says in which form. It reads
        operands, which takes as long as a launch, so its answer is kept.
        """
        if self.chip is None:
            return None
        key = ask, len(x)
        if key not in self.forms:
            self.forms[key] = ask(self.chip, x, *about)
        form = self.forms[key]
        return form.empty(x, len(x)) if form else None

    def linear(self, x: Tensor, matrix: Matrix, **given: Any) -> Tensor:
        """A projection of x (N, in), with its neighbours: linear.py."""
        y: Tensor = self.product(x, matrix, round_x=len(x) >= self.least, **given)
        return y

    def to_heads(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """x + grouped-query attention(norm(x)), (N, D)."""
        gqa, norm = self.block.self_attn, self.block.input_layernorm
        normed = partial(self.linear, x, norm=norm.weight, eps=norm.eps)
        layers = (gqa.q_proj, gqa.k_proj, gqa.v_proj)
        projected = products(normed, *(layer.matrix for layer in layers))  # (N, H A), (N, U A), ...
        fixed = self.fixed(x, linear_takes_fixed, gqa.o_proj.matrix, gqa.shape.head_dim)
        o = self.grouped(*projected, gqa, step, cache, fixed=fixed)  # (N, H, A)
        return self.add_heads(o, fixed, gqa.o_proj, x)

    def to_latents(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """x + latent attention(norm(x)), (N, D)."""
        mla, norm = self.block.self_attn, self.block.input_layernorm
        low_rank = mla.shape.q_lora_rank is not None
        q_proj = mla.q_a_proj if low_rank else mla.q_proj
        normed = partial(self.linear, x, norm=norm.weight, eps=norm.eps)
        q, kv = products(normed, q_proj.matrix, mla.kv_a_proj_with_mqa.matrix)  # kv (N, C + R)
        if low_rank:
            gain, eps = mla.q_a_layernorm.weight, mla.q_a_layernorm.eps
            q = self.linear(q, mla.q_b_proj.matrix, norm=gain, eps=eps)  # (N, Q) -> (N, H (P + R))
        w_uk, w_uv = mla.kv_b_proj.by_head()
        gain, eps = mla.kv_a_layernorm.weight, mla.kv_a_layernorm.eps
        q_c, q_pe = self.latent(
            q, kv, w_uk, gain, eps, step.cos, step.sin, step.positions, cache[0]
        )  # (N, H, C), (N, H, R)
        fixed = None
        if len(x) == 1:  # of more tokens, the sum of splits would take 2 us longer on an H100
            fixed = self.fixed(x, linear_takes_fixed, mla.o_proj.matrix, w_uv.shape[1])
        o = self.attention(
            q_c, q_pe, cache[0], step.positions, w_uv, mla.scale, fixed=fixed
        )  # (N, H, V)
        return self.add_heads(o, fixed, mla.o_proj, x)

    def add_heads(self, o: Tensor, fixed: Fixed | None, o_proj: Linear, x: Tensor) -> Tensor:
        """x + o_proj(o), (N, D), of all devices' heads; o (N, H, V or A)."""
        residual = x if self.block.leads_heads else None
        y = self.linear(o.flatten(1), o_proj.matrix, residual=residual, fixed=fixed)
        return self.block.sum_heads(y)

    def dense(self, x: Tensor, mlp: MLP) -> Tensor:
        """x + mlp(norm(x)), (N, D); without x where another device adds it."""
        norm = self.block.post_attention_layernorm
        h = self.gated(x, mlp, norm.weight, norm.eps, round_x=len(x) >= self.least)  # (N, I)
        residual = x if self.block.leads_inner else None
        return self.linear(h, mlp.down_proj.matrix, residual=residual)

    def mixture(self, x: Tensor, moe: MoE) -> Tensor:
        """x + moe(norm(x)), (N, D); without x where another device adds it."""
        norm, shared, apart = self.block.post_attention_layernorm, moe.shared_experts, None
        if shared is not None and not whole_experts(moe, shared):
            shared, apart = None, shared
        chosen = moe.gate.shape.num_experts_per_tok
        round_x = len(x) >= self.least
        fixed = self.fixed(x, experts_take_fixed, moe.experts, shared, chosen, round_x)
        h, indices, weights = self.route(moe.gate, x, norm.weight, norm.eps, moe.draws, fixed=fixed)
        # The residual and the shared experts are added once: in one place, in its first pass.
        once: dict[str, Any] = {"shared": shared}
        how: dict[str, Any] = {"fixed": fixed, "round_x": round_x}
        if apart is not None:
            once["residual"] = self.dense(x, apart)
        elif self.block.leads_inner:
            once |= {"residual": x, "norm": norm.weight, "eps": norm.eps}
        extra, y = once if moe.experts.leads else {}, x
        moe.experts.look_ahead(h)
        for choices in moe.experts.here(indices, weights):
            y = self.experts(h, *choices, moe.experts, **how, **extra)
            extra = {"residual": y}  # the next pass adds to it
        return moe.experts.combine(y)


def _matrices(block: Block) -> Iterator[Matrix]:
    """The matrix objects that the kernels read. (kv_b_proj gives dense views: `by_head`.)"""
    attention, mlp = block.self_attn, block.mlp
    layers = [
        layer
        for layer in attention.children()
        if isinstance(layer, Linear) and not isinstance(layer, UpProjection)
    ]
    feed_forward = mlp.shared_experts if isinstance(mlp, MoE) else mlp
    if feed_forward is not None:
        layers += [feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj]
    yield from (layer.matrix for layer in layers)
    if isinstance(mlp, MoE):
        yield from (mlp.experts.gate_proj, mlp.experts.up_proj, mlp.experts.down_proj)


def whole_experts(moe: MoE, shared: MLP) -> bool:
    """Whether a device's part of the shared experts is as wide as some of its routed experts."""
    return int(shared.down_proj.matrix.shape[1]) % int(moe.experts.down_proj.shape[2]) == 0


def split_blocks(mlp: nn.Module) -> str | None:
    """Why shared experts can't be read one by one: a block of numbers that share a scale is in two.

    They are one matrix, and the kernels begin in it where each of them begins.
    """
    if not isinstance(mlp, MoE) or mlp.shared_experts is None:
        return None
    inner, width = mlp.experts.down_proj.shape[2], mlp.shared_experts.down_proj.matrix.shape[1]
    if not whole_experts(mlp, mlp.shared_experts):
        return None  # then they are one matrix for the kernels, too
    each = mlp.shared_experts
    rows = [block_of(layer.matrix)[0] for layer in (each.gate_proj, each.up_proj)]
    blocks = [*rows, block_of(each.down_proj.matrix)[1]]
    if width == inner or not any(inner % size for size in blocks if size):
        return None
    return (
        f"{width // inner} shared experts of {inner} are stored as one, in blocks of "
        f"{max(blocks)} that reach from one into the next: use kernels=torch"
    )


def output_head(lm_head: Linear, chip: Chip, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
    """The output head of a decode step: hidden (B, S, D) -> fp32 logits (B, S, W).

    Without `norm` the hidden states are normed already.
    """
    gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    shape, x = x.shape[:-1], x.flatten(0, 1)
    product = partial(linear, chip, x, norm=gain, eps=eps, dtype=torch.float32)
    logits = lm_head.matrix.through(product)
    return logits.view(*shape, -1)
