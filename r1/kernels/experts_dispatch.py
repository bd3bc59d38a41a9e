"""The experts' kernels as a strategy of the model: the slot `dispatch`, also under torch.compile.

Shapes: N tokens, D hidden_size, I moe_intermediate_size, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.kernels.chip import Chip
from r1.kernels.experts import EXPERTS, Swiglu, launch_experts
from r1.kernels.in_graph import made_of, parts_of
from r1.model.moe import Experts
from r1.model.rounded import RoundedExperts


@torch.library.custom_op("r1::experts", mutates_args=())
def _experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate: list[Tensor], up: list[Tensor],
    down: list[Tensor], how: str, partial: bool, round_x: bool,
) -> Tensor:  # fmt: skip
    """`gate`, `up`, `down`: see parts_of; `how`: of each, with commas between."""
    chip, inner = Chip.of(x.device), gate[0].shape[1]
    sizes = (len(gate[0]), x.shape[1], inner)  # E, D, I
    matrices = zip((gate, up, down), how.split(","), (x.shape[1], x.shape[1], inner), strict=True)
    given = [made_of(parts, how, columns) if how else parts[0] for parts, how, columns in matrices]
    return launch_experts(
        chip, x, indices, weights, sizes, Swiglu.of(chip, *given), 0, None, None, None, 0.0,
        partial, None, round_x=round_x,
    )  # fmt: skip


@_experts.register_fake
def _(
    x: Tensor, indices: Tensor, weights: Tensor, gate: list[Tensor], up: list[Tensor],
    down: list[Tensor], how: str, partial: bool, round_x: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)


def dispatch(experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The slot `dispatch` (r1/model/dispatch.py has the shapes), by the kernels.

    torch.compile takes them as a whole.
    """
    round_x = isinstance(experts, RoundedExperts)
    if not torch.compiler.is_compiling():
        chip, x = Chip.of(x.device), x.contiguous()
        return EXPERTS["triton"](chip, x, indices, weights, experts, round_x=round_x)
    gate, gate_how = parts_of(experts.gate_proj)
    up, up_how = parts_of(experts.up_proj)
    down, down_how = parts_of(experts.down_proj)
    how = f"{gate_how},{up_how},{down_how}"
    return _experts(x.contiguous(), indices, weights, gate, up, down, how, experts.partial, round_x)
