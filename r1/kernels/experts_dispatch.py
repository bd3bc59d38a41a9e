"""The experts' kernels as a strategy of the model: the slot `dispatch`, also under torch.compile.

Shapes: N tokens, D hidden_size, I moe_intermediate_size, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.kernels.chip import Chip
from r1.kernels.experts import EXPERTS, Swiglu, launch_experts
from r1.kernels.in_graph import input_of, made_of, parts_of
from r1.kernels.rounded import takes_one_number
from r1.model.moe import Experts
from r1.model.rounded import RoundedExperts
from r1.storage.activations import as_fp8


@torch.library.custom_op("r1::experts", mutates_args=())
def _experts(
    x: list[Tensor], indices: Tensor, weights: Tensor, gate: list[Tensor], up: list[Tensor],
    down: list[Tensor], how: str, partial: bool, round_x: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`x`: see input_of; `gate`, `up`, `down`: see parts_of; `how`: of each, by commas."""
    like, fixed = input_of(x, dtype)
    chip, dim, inner = Chip.of(like.device), like.shape[1], gate[0].shape[1]
    sizes = (len(gate[0]), dim, inner)  # E, D, I
    matrices = zip((gate, up, down), how.split(","), (dim, dim, inner), strict=True)
    given = [made_of(parts, how, columns) if how else parts[0] for parts, how, columns in matrices]
    return launch_experts(
        chip, like, indices, weights, sizes, Swiglu.of(chip, *given), 0, None, None, None, 0.0,
        partial, None, fixed, round_x,
    )  # fmt: skip


@_experts.register_fake
def _(
    x: list[Tensor], indices: Tensor, weights: Tensor, gate: list[Tensor], up: list[Tensor],
    down: list[Tensor], how: str, partial: bool, round_x: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x[0].new_empty(x[0].flatten(1).shape, dtype=dtype)


@torch.compiler.assume_constant_result
def _multiplies_fp8(device: torch.device) -> bool:
    """The compiler need not trace how a chip is found out."""
    return Chip.of(device).ptx


def dispatch(experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The slot `dispatch` (r1/model/dispatch.py has the shapes), by the kernels.

    torch.compile takes them as a whole.
    """
    round_x = isinstance(experts, RoundedExperts)
    if not torch.compiler.is_compiling():
        chip, x = Chip.of(x.device), x.contiguous()
        return EXPERTS["triton"](chip, x, indices, weights, experts, round_x=round_x)
    matrices = experts.gate_proj, experts.up_proj, experts.down_proj
    (gate, up, down), how = zip(*map(parts_of, matrices), strict=True)
    fp8 = round_x and takes_one_number(_multiplies_fp8(x.device), x, *matrices)
    given = as_fp8(x) if fp8 else [x]  # in the graph, as in prompt.py
    return _experts(
        given, indices, weights, gate, up, down, ",".join(how), experts.partial, round_x, x.dtype
    )
