"""The experts of a step, launched: only the chosen ones are read, and by few tokens each only once.

Shared experts are extra experts that every token chooses with weight 1. A shared MLP of width n I
is n experts of width I: their gates, ups and downs stand side by side in its matrices.

One token takes the kernels of experts_vector.py, and so do a few whose weights are packed. Several
take those of experts_narrow.py, where weights are packed, or else of experts_tiles.py.

Shapes: N tokens, D hidden_size, I moe_intermediate_size, E experts, K experts per token, J slots of
a token (K + shared).
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from r1.kernels import rounded
from r1.kernels.chip import LEAST_TILE, Chip, Sizes, ceil_div, power_of_two
from r1.kernels.experts_launch import ExpertsLaunch
from r1.kernels.experts_narrow import down_narrow_kernel, up_narrow_kernel
from r1.kernels.experts_tiles import add_kernel, down_tile_kernel, up_tile_kernel
from r1.kernels.experts_vector import down_vector_kernel, up_vector_kernel
from r1.kernels.fixed import Fixed, fix, storage_sizes
from r1.kernels.narrow import Form, narrow, pairs
from r1.kernels.rounded import down_rounded_kernel, round_input, rounds, up_rounded_kernel
from r1.kernels.sort import sort_by_expert, sort_into_tiles
from r1.kernels.tiles import Operand, operand
from r1.model.dispatch import Gather
from r1.model.layers import MLP, matmul
from r1.model.moe import Experts
from r1.model.rounded import Rounded
from r1.storage import activations
from r1.storage.activations import GROUP, NEVER
from r1.storage.matrix import Matrix


class Swiglu(NamedTuple):
    """The operands of gate_proj, up_proj and down_proj."""

    gate: Operand
    up: Operand
    down: Operand

    @staticmethod
    def of(chip: Chip, *matrices: Matrix | Tensor) -> Swiglu:
        return Swiglu(*(operand(each, chip.ptx) for each in matrices))


def experts(
    chip: Chip, x: Tensor, indices: Tensor, weights: Tensor, experts: Experts,
    shared: MLP | None = None, residual: Tensor | None = None, norm: Tensor | None = None,
    eps: float = 0.0, launch: ExpertsLaunch | None = None, fixed: Fixed | None = None,
    round_x: bool = False,
) -> Tensor:  # fmt: skip
    """x (N, D), indices int64 (N, K), weights fp32 (N, K) -> the experts' weighted sum, (N, D).

    The outputs of `shared` and the `residual` (N, D) are added in fp32. (With `apart` each expert's
    output is rounded to x's dtype before.) `norm` (D,) says that x is the residual, RMS-normed with
    this gain by the previous kernel, and that the residual is older. Then one token's shared
    experts don't wait for x. `fixed` is x again, if an earlier kernel has made it (see
    `experts_take_fixed`). `round_x`: x and the inner values become FP8 for matrices of FP8
    (r1/storage/activations.py).
    """
    routed, always = _operands(chip, experts, shared)
    more, sizes = 0, tuple(experts.down_proj.shape)
    if shared is not None:
        more = shared.down_proj.matrix.shape[1] // sizes[2]
    return launch_experts(
        chip, x, indices, weights, sizes, routed, more, always, residual, norm, eps,
        experts.partial, launch, fixed, round_x,
    )  # fmt: skip


def _operands(chip: Chip, experts: Experts, shared: MLP | None) -> tuple[Swiglu, Swiglu | None]:
    """The operands of the routed experts, and of the shared ones."""
    routed = Swiglu.of(chip, experts.gate_proj, experts.up_proj, experts.down_proj)
    if shared is None:
        return routed, None
    layers = (shared.gate_proj, shared.up_proj, shared.down_proj)
    return routed, Swiglu.of(chip, *(layer.matrix for layer in layers))


def experts_take_fixed(
    chip: Chip, x: Tensor, experts: Experts, shared: MLP | None, chosen: int, round_x: bool = False
) -> Form | None:
    """The form in which `experts` takes x (N, D), if not as it is. Tokens have `chosen` experts."""
    sizes, operands = tuple(experts.down_proj.shape), _operands(chip, experts, shared)
    if round_x and rounds(operands[0].gate):
        return None  # of other numbers
    stored = stored_sizes(chip, x, sizes[2], *operands)
    return _use(chip, x, chosen, sizes, stored).form(sizes[1], stored)


def experts_torch(
    x: Tensor, indices: Tensor, weights: Tensor, experts: Experts, shared: MLP | None = None,
    residual: Tensor | None = None, norm: Tensor | None = None, eps: float = 0.0,
    fixed: None = None, round_x: bool = False,
) -> Tensor:  # fmt: skip
    """The twin. It waits for x in any case, and has no use for `norm`."""
    y = Rounded(Gather(), 1 if round_x else NEVER)(experts, x, indices, weights)
    if shared is not None:
        y = y + shared(x, activations.multiply if round_x else matmul)
    return y if residual is None else residual + y


EXPERTS: dict[str, Callable[..., Tensor]] = {"torch": experts_torch, "triton": experts}


def launch_experts(
    chip: Chip, x: Tensor, indices: Tensor, weights: Tensor, sizes: Sizes, routed: Swiglu,
    more: int, shared: Swiglu | None, residual: Tensor | None, norm: Tensor | None, eps: float,
    partial: bool, launch: ExpertsLaunch | None, fixed: Fixed | None = None,
    round_x: bool = False,
) -> Tensor:  # fmt: skip
    """`experts` of operands: `sizes` are E, D, I of routed.down, and there are `more` shared
    experts. `partial`: an index E is no expert (see dispatch.py).
    """
    (count, dim, inner), (tokens, chosen) = sizes, indices.shape
    stored = stored_sizes(chip, x, inner, routed, shared, round_x)
    use = launch or _use(chip, x, chosen, sizes, stored)
    names = {"DIM": dim, "INNER": inner, "CHOSEN": chosen, "SHARED": more}
    step = stored[2] if use.narrow and stored[2:] else 0
    if stored[3:]:  # however a search would launch them: `fixed` is then all that there is of x
        return _rounded_tokens(
            chip, use, names, count, x, indices, weights, routed, shared, residual, partial, fixed
        )
    # Here no kernel takes an x of FP8: it is rounded, and nothing is faster.
    if round_x and rounds(routed.gate):
        x, fixed = activations.rounded(x), None
    form = use.form(dim, stored)
    fixed = fixed if fixed and Form.of(fixed) == form else None
    if step or use.rows >= LEAST_TILE:
        return _several_tokens(
            chip, use, names, step, count, x, indices, weights, routed, shared, residual, partial,
            fixed, round_x,
        )  # fmt: skip
    given = (fixed or fix(chip, x)) if form else x
    shared_gate, shared_up, shared_down = shared or (None, None, None)
    h, out = x.new_empty(tokens, chosen + more, inner), torch.empty_like(x)
    names["COUNT"], whole = count if partial else 0, isinstance(given, Fixed)
    chip.run(
        up_vector_kernel, (ceil_div(inner, use.up_outputs) * (chosen + more) * tokens,),
        given, indices, routed.gate, routed.up, shared_gate, shared_up, residual,
        norm if tokens == 1 else None, eps, h, tokens, FIXED=whole, MANY=tokens > 1, **names,
        **use.up,
    )  # fmt: skip
    h, pad = activations.rounded(h) if round_x and rounds(routed.down) else h, power_of_two(chosen)
    chip.run(
        down_vector_kernel, (ceil_div(dim, use.down_outputs) * tokens,),
        fix(chip, h.flatten(1)) if whole else h, indices, weights, routed.down,
        shared_down, residual, out, tokens, CHOSEN_PAD=pad, FIXED=whole, AHEAD=use.ahead,
        BESIDE=_beside(routed.down, shared_down, inner, more, pad - chosen), **names,
        **use.down,
    )  # fmt: skip
    return out


def _beside(down: Operand, shared: Operand | None, inner: int, count: int, room: int) -> int:
    """How many of `count` shared experts can be read as the chosen ones are, in the same tiles, of
    which `room` slots are free: all or none. They must be stored alike (a checkpoint may leave them
    dense, or give them groups of another size), and begin at whole blocks and at 16 bytes.
    """
    if shared is None or count > room:
        return 0
    kinds = [(w.FORMAT, w.PER, w.ZEROS, w.TALL, w.WIDE) for w in (down, shared)]
    steps = inner // down.PER.value, down.ROW.value, down.EXPERT.value, shared.ROW.value
    places = [step * down.weight.itemsize for step in steps]
    places += [w.weight.data_ptr() for w in (down, shared)]
    whole = inner % down.WIDE.value == 0 and all(place % 16 == 0 for place in places)
    return count if kinds[0] == kinds[1] and whole else 0


def stored_sizes(
    chip: Chip, x: Tensor, inner: int, routed: Swiglu, shared: Swiglu | None,
    round_x: bool = False,
) -> tuple[int, ...]:  # fmt: skip
    """`storage_sizes` of the experts. Inner values are vectors, too."""
    length = gcd(x.shape[-1], inner)
    return storage_sizes(chip, x, length, *routed, *(shared or ()), round_x=round_x)


def _use(
    chip: Chip, x: Tensor, chosen: int, sizes: Sizes, stored: tuple[int, ...]
) -> ExpertsLaunch:
    return chip.launch(ExpertsLaunch, len(x), chosen, *sizes, x.itemsize, *stored)


def _several_tokens(
    chip: Chip, use: ExpertsLaunch, sizes: dict[str, int], step: int, count: int, x: Tensor,
    indices: Tensor, weights: Tensor, routed: Swiglu, shared: Swiglu | None,
    residual: Tensor | None, partial: bool, fixed: Fixed | None, round_h: bool,
) -> Tensor:  # fmt: skip
    """Sort the choices by expert, launch the tiles' kernels, and add up each token's slots. With a
    `step` products are narrow (narrow.py), tiles apart. `fixed`: x's pairs. `round_h`: round h.
    """
    dim, inner, more = sizes["DIM"], sizes["INNER"], sizes["SHARED"]
    tokens, chosen = indices.shape
    order, ends, places, work = _sorted(chip, indices, count, use.rows, more, use.apart or step > 0)
    up_kernel, down_kernel, how = up_tile_kernel, down_tile_kernel, sizes | {"ROWS": use.rows}
    up, down, whole = use.up, use.down, use.apart and not step
    if step:
        up_kernel, down_kernel = up_narrow_kernel, down_narrow_kernel
        routed, shared = Swiglu(*map(narrow, routed)), shared and Swiglu(*map(narrow, shared))
        up["BLOCK_IN"] = down["BLOCK_IN"] = step
        # Products of 4 bits take less time than a step has to wait: so two of them at a time.
        how["UNROLL"] = 2 if routed.gate.FORMAT.value == "int4" and use.rows <= 8 else 1
    else:
        how["APART"] = use.apart
    shared_gate, shared_up, shared_down = shared or (None, None, None)
    h = x.new_empty(tokens * (chosen + more), inner)
    chip.run(
        up_kernel, (ceil_div(inner, use.up_outputs), places),
        (fixed or pairs(chip, x, routed.gate, step)) if step else x, order, ends, work, routed.gate,
        routed.up, shared_gate, shared_up, h, tokens, count, **how, **up,
    )  # fmt: skip
    h = activations.rounded(h) if round_h and rounds(routed.down) else h
    y = _slots(x, chosen + more, x.dtype if whole else torch.float32, partial)
    chip.run(
        down_kernel, (ceil_div(dim, use.down_outputs), places),
        pairs(chip, h, routed.down, step) if step else h, order, ends, work, weights, routed.down,
        shared_down, y, tokens, count, **how, **down,
    )  # fmt: skip
    return _added(chip, y, residual, x, min(1024, power_of_two(dim)) if whole else 256)


def _rounded_tokens(
    chip: Chip, use: ExpertsLaunch, sizes: dict[str, int], count: int, x: Tensor, indices: Tensor,
    weights: Tensor, routed: Swiglu, shared: Swiglu | None, residual: Tensor | None, partial: bool,
    fixed: Fixed | None,
) -> Tensor:  # fmt: skip
    """The same where x and the inner values are FP8 (rounded.py). `fixed`, if it is given, stands
    in for the numbers of x. Each expert's output is rounded to x's dtype.
    """
    dim, inner, more = sizes["DIM"], sizes["INNER"], sizes["SHARED"]
    tokens, chosen = indices.shape
    order, ends, places, work = _sorted(chip, indices, count, use.rows, more, True)
    how = sizes | {"ROWS": use.rows, "warps": use.warps, "stages": use.stages}
    routed, shared = Swiglu(*map(narrow, routed)), shared and Swiglu(*map(narrow, shared))
    shared_gate, shared_up, shared_down = shared or (None, None, None)
    h = rounded.empty(x, tokens * (chosen + more), inner)
    chip.run(
        up_rounded_kernel, (inner // GROUP, places), fixed or round_input(chip, x), order, ends,
        work, routed.gate, routed.up, shared_gate, shared_up, h, tokens, count, **how,
    )  # fmt: skip
    y = _slots(x, chosen + more, x.dtype, partial)
    chip.run(
        down_rounded_kernel, (ceil_div(dim, use.down_outputs), places), h, order, ends, work,
        weights, routed.down, shared_down, y, tokens, count, BLOCK=use.down_outputs // 2, **how,
    )  # fmt: skip
    return _added(chip, y, residual, x, min(1024, power_of_two(dim)))


def _slots(x: Tensor, slots: int, dtype: torch.dtype, partial: bool) -> Tensor:
    """Memory for the outputs of x's (N, D) slots, (N, J, D). Those of no expert are not written."""
    shape = (len(x), slots, x.shape[1])
    return x.new_zeros(shape, dtype=dtype) if partial else x.new_empty(shape, dtype=dtype)


def _sorted(
    chip: Chip, indices: Tensor, count: int, rows: int, shared: int, apart: bool
) -> tuple[Tensor, Tensor, int, Tensor | None]:
    """Choices (N, K) sorted by expert, `order` and `ends`, and the work: how many programs share an
    output, and what each has, where tiles of `rows` tokens are taken `apart`.
    """
    if apart:
        order, ends, work = sort_into_tiles(chip, indices, count, rows, shared)
        return order, ends, len(work), work
    order, ends = sort_by_expert(chip, indices, count)
    return order, ends, count + shared, None


def _added(chip: Chip, y: Tensor, residual: Tensor | None, x: Tensor, block: int) -> Tensor:
    """Each token's slots (N, J, D), and the residual, added up: (N, D) in x's dtype."""
    (tokens, slots, dim), out = y.shape, torch.empty_like(x)
    # With more numbers a thread, the compiler waits for the first slots before it loads the last.
    chip.run(
        add_kernel, (tokens * ceil_div(dim, block),), y, residual, out, DIM=dim, SLOTS=slots,
        BLOCK=block, warps=4,
    )  # fmt: skip
    return out
