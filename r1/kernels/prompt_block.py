"""A prompt's sparse layer whose experts, shared experts and residual are one sum: the function of
transformer.py's Block.

Where weights and inputs are FP8, shared experts are experts that every token chooses, as in a
decode step (experts.py). Their SwiGLU and its rounding need no pass of their own then. And one
kernel adds up a token's slots and the residual: it writes the layer's output.

Shapes: B rows, S tokens of a row, N = B S, D hidden_size.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from r1.kernels.block import split_blocks, whole_experts
from r1.kernels.chip import Chip
from r1.kernels.experts_dispatch import dispatch
from r1.kernels.prompt_attention import attention
from r1.kernels.prompt_norm import norm_and_round
from r1.kernels.rounded import takes_one_number
from r1.kernels.strategies import TritonDispatch
from r1.model.cache import LayerCache
from r1.model.moe import Experts, MoE
from r1.model.rounded import Rounded
from r1.model.step import Step
from r1.model.transformer import Block


def fused(chip: Chip, block: nn.Module) -> nn.Module:
    """A block whose inputs are rounded, or what can stand in for it."""
    return PromptBlock(block) if isinstance(block, Block) and _is_one_sum(chip, block) else block


class PromptBlock(nn.Module):
    """Stands in for a Block with shared experts."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, step: Step, cache: LayerCache | None) -> Tensor:
        """(B, S, D) -> (B, S, D). Writes the tokens' cache entries where there is a cache."""
        block, moe = self.block, self.block.mlp
        assert isinstance(moe, MoE)
        h = block.input_layernorm(x)  # (B, S, D)
        x = attention(block.self_attn, h, step, cache, x)  # (B, S, D)
        flat, fp8 = norm_and_round(block.post_attention_layernorm, x.flatten(0, 1))  # (N, D)
        indices, weights = moe.gate(flat, moe.draws, moe.route[step.phase])  # (N, K) each
        residual = x.flatten(0, 1)
        run = partial(
            dispatch, shared=moe.shared_experts, residual=residual, round_x=True, fp8_x=fp8
        )
        return moe.experts(run, flat, indices, weights).view_as(x)


def _is_one_sum(chip: Chip, block: Block) -> bool:
    """Whether shared experts and the residual can be added with the routed experts.

    It needs FP8 products of all of them, and routed experts that lie on the device: these are one
    pass, so what is added once is added in it. Devices that share a layer all add the residual at
    one place, and their parts differ: one could have whole experts, and another not. So none does.
    """
    if block.sum_heads is not Block.sum_heads or block.sum_inner is not Block.sum_inner:
        return False
    moe = block.mlp
    strategy = moe.dispatch["prefill"] if isinstance(moe, MoE) else None
    if not (isinstance(strategy, Rounded) and isinstance(strategy.strategy, TritonDispatch)):
        return False
    assert isinstance(moe, MoE)
    experts, shared = moe.experts, moe.shared_experts
    if shared is None or type(experts).forward is not Experts.forward or not experts.leads:
        return False
    layers = (shared.gate_proj, shared.up_proj, shared.down_proj)
    stacks = (experts.gate_proj, experts.up_proj, experts.down_proj)
    like = block.post_attention_layernorm.weight  # it has the dtype of x
    fp8 = takes_one_number(chip.ptx, like, *stacks, *(layer.matrix for layer in layers))
    return fp8 and whole_experts(moe, shared) and split_blocks(moe) is None
