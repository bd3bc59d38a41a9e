"""How a matrix is cut where several devices share a layer: one table, by the matrix's name.

Cut by rows, each device makes its own outputs: whole heads, inner values of a feed-forward, or
words. Cut by columns, each device multiplies its own inputs, and the outputs are sums to be added
up. What is not in the table is held whole by every device: the norms, the router, and the
projections down to the latents, which also make the cache that every device keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from r1.errors import InputError, setting
from r1.model.config import Config, GroupedShape
from r1.storage.spec import Spec

ROWS, COLUMNS = 0, 1
ALIGNMENT = 8
"""Inner values are shared in blocks of at least so many. torch's grouped products read rows of a
multiple of 16 bytes: 8 numbers of bf16."""


@dataclass(frozen=True)
class Cut:
    """How one matrix is cut: along which dimension, and what that dimension counts."""

    dim: int
    of: str
    """"heads", "inner values", "words" or "outputs"."""


CUTS: dict[str, Cut] = {
    "q_proj": Cut(ROWS, "heads"),
    "q_b_proj": Cut(ROWS, "heads"),
    "k_proj": Cut(ROWS, "heads"),  # of keys and values: grouped-query attention
    "v_proj": Cut(ROWS, "heads"),
    "kv_b_proj": Cut(ROWS, "heads"),  # a head's W_UK and W_UV lie together
    "o_proj": Cut(COLUMNS, "heads"),
    "gate_proj": Cut(ROWS, "inner values"),
    "up_proj": Cut(ROWS, "inner values"),
    "down_proj": Cut(COLUMNS, "inner values"),
    "embed_tokens": Cut(ROWS, "words"),
    "lm_head": Cut(ROWS, "words"),
    "eh_proj": Cut(ROWS, "outputs"),  # the MTP layer's own
}
"""By the last part of a matrix's name. Stacks of experts have the names of their matrices. The bias
of a matrix that is cut by rows is cut like it."""


def span(size: int, rank: int, ranks: int, block: int = 1, what: str = "values") -> slice:
    """The share of device `rank` of `ranks`, of `size` rows or columns; `what` names them.

    No block is split: `size` is shared in whole blocks, as evenly as they allow. The first devices
    have one more block where that is not even. A last block may be cropped. Raises InputError for
    fewer blocks than devices.
    """
    blocks = -(-size // block)
    if blocks < ranks:
        raise InputError(
            f"{size} {what} are {blocks} blocks of {block}, which can't be shared by {ranks} "
            f"devices: use fewer, or {setting('quant', 'none')} where a storage makes the blocks"
        )
    fewest, more = divmod(blocks, ranks)
    first = rank * fewest + min(rank, more)
    stop = first + fewest + (rank < more)
    return slice(first * block, min(stop * block, size))


def share(
    name: str, shape: tuple[int, ...], rank: int, ranks: int, block: int = 1
) -> tuple[slice, ...]:
    """The part of a matrix (..., out, in) that device `rank` of `ranks` holds, in each dimension.

    `name` is the last part of the matrix's name. `block`: see `span`; for heads the shares are
    equal. Raises InputError where the dimension can't be shared.
    """
    whole = tuple(slice(0, size) for size in shape)
    cut = CUTS.get(name)
    if ranks == 1 or cut is None:
        return whole
    dim = len(shape) - 2 + cut.dim
    if cut.of != "inner values" and shape[dim] % ranks:
        side = "rows" if cut.dim == ROWS else "columns"
        raise InputError(
            f"{name} has {shape[dim]} {side}, which {ranks} devices can't share evenly"
        )
    size = block if cut.of == "inner values" else shape[dim] // ranks
    mine = span(shape[dim], rank, ranks, size, f"{cut.of} of {name}")
    return (*whole[:dim], mine, *whole[dim + 1 :])


def block_of(specs: Iterable[Spec]) -> int:
    """The block in which inner values are shared, where matrices are stored in these formats.

    They are rows of gate_proj and up_proj, and columns of down_proj: one block serves all three.
    """
    sides = (side for spec in specs for side in (spec.rows, spec.columns) if side)
    return math.lcm(ALIGNMENT, *sides)


def why_not(config: Config, tp: int, ep: int, pp: int = 1) -> str | None:
    """Why a model can't be cut for `pp` stages of `tp` x `ep` devices; None where it can.

    Blocks of a storage are not looked at here: making the model does (parallel.py).
    """
    heads, experts = config.attention.num_attention_heads, config.experts.n_routed_experts
    if isinstance(config.attention, GroupedShape):
        heads = config.attention.num_key_value_heads  # their queries' heads are shared with them
    if heads % tp:
        has = f"this model has {heads} heads, which {tp} devices can't share evenly"
        return f"{setting('tp', tp)}: {has}: use {_divisors('tp', heads)}"
    if ep > 1 and not experts:
        return f"{setting('ep', ep)} spreads experts, and this model has none: use {setting('tp')}"
    if ep > 1 and experts % ep:
        has = f"this model has {experts} experts, which {ep} devices can't share evenly"
        return f"{setting('ep', ep)}: {has}: use {_divisors('ep', experts)}"
    if pp > (layers := config.num_hidden_layers):
        has = f"this model has {layers} layers, and each stage needs one"
        return f"{setting('pp', pp)}: {has}: use at most {setting('pp', layers)}"
    for size in (config.vocab_size, config.hidden_size):
        if size % (tp * ep):
            both = f"{setting('tp', tp)} and {setting('ep', ep)}"
            what = "words" if size == config.vocab_size else "values in a hidden state"
            has = f"this model has {size} {what}, which {tp * ep} devices can't share evenly"
            return f"{both}: {has}: use a power of two"
    return None


def _divisors(name: str, count: int) -> str:
    """The first numbers of devices that share `count` evenly, as a setting's values."""
    return " or ".join(setting(name, n) for n in (2, 4, 8) if count % n == 0) or setting(name, 1)
