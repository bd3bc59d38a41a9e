"""Each layer's outputs, and the first one where two implementations differ.

Names of the traced tensors, for layer i:
- `attn.i`, `mlp.i`, `hidden.i`: outputs of its attention, feed-forward and whole block, (B, S, D);
- `router_indices.i` (ascending for each token) and `router_weights.i` (in that order), (B, S, K);
- `final_norm` (B, S, D) and `logits` (B, S, W) of the whole model.

Where kernels stand in for a whole layer (kernels/prompt_block.py), only its router is traced.

Shapes: B rows, S tokens of a row, K experts per token, D hidden_size, W vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from r1.model.moe import MoE
from r1.model.transformer import Block
from r1.run.runner import Runner


def trace(runner: Runner, tokens: Tensor) -> dict[str, Tensor]:
    """Run int64 (B, S) without a cache: every layer's outputs, fp32 on the CPU, in order."""
    seen: dict[str, Tensor] = {}
    model, shape = runner.model, tuple(tokens.shape)

    def watch(module: nn.Module, name: str) -> Any:
        return module.register_forward_hook(
            lambda _m, _i, out: seen.update({name: out.detach().float().cpu()})
        )

    def watch_router(module: nn.Module, layer: int) -> Any:
        def hook(_m: nn.Module, _i: Any, out: tuple[Tensor, Tensor]) -> None:
            indices, order = out[0].sort(dim=-1)
            seen[f"router_indices.{layer}"] = indices.unflatten(0, shape).cpu()
            seen[f"router_weights.{layer}"] = out[1].gather(1, order).unflatten(0, shape).cpu()

        return module.register_forward_hook(hook)

    hooks = [watch(model.norm, "final_norm")]
    for layer, block in enumerate(model.layers):
        assert isinstance(block, Block)
        hooks += [watch(block.self_attn, f"attn.{layer}")]
        if isinstance(block.mlp, MoE):
            hooks += [watch_router(block.mlp.gate, layer)]
        hooks += [watch(block.mlp, f"mlp.{layer}"), watch(block, f"hidden.{layer}")]
    try:
        logits = runner.logits(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return seen | {"logits": logits.cpu()}


@dataclass(frozen=True)
class Difference:
    """One traced tensor beside its reference."""

    name: str
    max_abs: float
    """Largest |ours - theirs|; for router indices the number of tokens with another choice; inf for
    another shape or NaN."""
    scale: float
    """Largest |theirs|."""
    diverges: bool


def compare(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float
) -> list[Difference]:
    """Every tensor that both have, in the order of computation. Raises KeyError for none."""
    names = [name for name in ours if name in theirs]
    if not names:
        raise KeyError("the reference has no tensor that the model puts out")
    return [_difference(name, ours[name], theirs[name], tolerance) for name in names]


def _difference(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> Difference:
    if ours.shape != theirs.shape:
        return Difference(name, float("inf"), float("nan"), True)
    if not theirs.is_floating_point():
        other = int((ours != theirs).any(dim=-1).sum())
        return Difference(name, other, float(theirs.max()), other > 0)
    gap = float((ours - theirs).abs().max())
    gap = float("inf") if gap != gap else gap
    return Difference(name, gap, float(theirs.abs().max()), gap > tolerance)


def first_divergence(differences: list[Difference]) -> Difference | None:
    """The first tensor, in the order of computation, that is off; None where all agree."""
    return next((d for d in differences if d.diverges), None)
