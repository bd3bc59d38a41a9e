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
from r1.model.layers import MLP
from r1.model.moe import Experts
from r1.model.rounded import RoundedExperts
from r1.storage.activations import as_fp8


@torch.library.custom_op("r1::experts", mutates_args=())
def _experts(
    x: list[Tensor], indices: Tensor, weights: Tensor, gate: list[Tensor], up: list[Tensor],
    down: list[Tensor], how: str, partial: bool, round_x: bool, dtype: torch.dtype,
    shared_gate: list[Tensor], shared_up: list[Tensor], shared_down: list[Tensor],
    shared_how: str, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """`x`: see input_of; `gate`, `up`, `down`: see parts_of; `how`: of each, by commas. Without
    shared experts, their lists are empty.
    """
    like, fixed = input_of(x, dtype)
    chip, dim, inner = Chip.of(like.device), like.shape[1], gate[0].shape[1]
    sizes, more, shared = (len(gate[0]), dim, inner), 0, None  # E, D, I
    if shared_gate:
        width = shared_gate[0].shape[0]
        more, stored = width // inner, (shared_gate, shared_up, shared_down)
        shared = _swiglu(chip, stored, shared_how, dim, width)
    routed = _swiglu(chip, (gate, up, down), how, dim, inner)
    residual = None if residual is None else residual.contiguous()
    return launch_experts(
        chip, like, indices, weights, sizes, routed, more, shared, residual, None, 0.0, partial,
        None, fixed, round_x,
    )  # fmt: skip


def _swiglu(chip: Chip, stored: tuple[list[Tensor], ...], how: str, dim: int, inner: int) -> Swiglu:
    """The operands of gate, up and down, which `parts_of` took apart."""
    matrices = zip(stored, how.split(","), (dim, dim, inner), strict=True)
    given = [made_of(parts, how, columns) if how else parts[0] for parts, how, columns in matrices]
    return Swiglu.of(chip, *given)


@_experts.register_fake
def _(
    x: list[Tensor], indices: Tensor, weights: Tensor, gate: list[Tensor], up: list[Tensor],
    down: list[Tensor], how: str, partial: bool, round_x: bool, dtype: torch.dtype,
    shared_gate: list[Tensor], shared_up: list[Tensor], shared_down: list[Tensor],
    shared_how: str, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    return x[0].new_empty(x[0].flatten(1).shape, dtype=dtype)


@torch.compiler.assume_constant_result
def _multiplies_fp8(device: torch.device) -> bool:
    """The compiler need not trace how a chip is found out."""
    return Chip.of(device).ptx


def dispatch(
    experts: Experts, x: Tensor, indices: Tensor, weights: Tensor, shared: MLP | None = None,
    residual: Tensor | None = None, round_x: bool = False, fp8_x: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """The slot `dispatch` (r1/model/dispatch.py has the shapes), by the kernels.

    The outputs of `shared` and the `residual` (N, D) are added. `round_x`, as of RoundedExperts: x
    and inner values become FP8. `fp8_x` is x of FP8 (`as_fp8`), if an earlier kernel has made it.
    torch.compile takes the kernels as a whole.
    """
    round_x = round_x or isinstance(experts, RoundedExperts)
    if not torch.compiler.is_compiling():
        chip, x = Chip.of(x.device), x.contiguous()
        fixed = input_of(fp8_x, x.dtype)[1] if fp8_x else None
        return EXPERTS["triton"](
            chip, x, indices, weights, experts, shared, residual, fixed=fixed, round_x=round_x
        )
    matrices = experts.gate_proj, experts.up_proj, experts.down_proj
    (gate, up, down), how = zip(*map(parts_of, matrices), strict=True)
    more: tuple[list[Tensor], ...] = ([], [], [])
    shared_how: tuple[str, ...] = ()
    if shared is not None:
        layers = shared.gate_proj, shared.up_proj, shared.down_proj
        more, shared_how = zip(*(parts_of(layer.matrix) for layer in layers), strict=True)
    fp8 = round_x and takes_one_number(_multiplies_fp8(x.device), x, *matrices)
    given = (fp8_x or as_fp8(x)) if fp8 else [x]  # in the graph, as in prompt.py
    return _experts(
        given, indices, weights, gate, up, down, ",".join(how), experts.partial, round_x, x.dtype,
        *more, ",".join(shared_how), residual,
    )  # fmt: skip
