"""How a matrix is cut where several devices share a layer: one table, by the matrix's name.

Cut by rows, each device makes its own outputs: whole heads, or whole inner values. Cut by columns,
each device multiplies its own inputs, and the outputs are sums to be added up. What is not in the
table is held whole by every device.
"""

from __future__ import annotations

from r1.errors import InputError

ROWS, COLUMNS = 0, 1
CUTS: dict[str, int] = {
    "q_proj": ROWS,  # heads
    "q_b_proj": ROWS,  # heads
    "kv_b_proj": ROWS,  # heads
    "o_proj": COLUMNS,  # the heads' outputs
    "gate_proj": ROWS,  # inner values
    "up_proj": ROWS,  # inner values
    "down_proj": COLUMNS,  # inner values
    "embed_tokens": ROWS,  # vocabulary
    "lm_head": ROWS,  # vocabulary
}


def share(key: str, shape: tuple[int, ...], rank: int, ranks: int) -> tuple[slice, ...]:
    """The part of a checkpoint's tensor that device `rank` of `ranks` holds, for each dimension.

    Raises InputError where the dimension is no multiple of `ranks`.
    """
    whole = tuple(slice(0, size) for size in shape)
    name = key.removesuffix(".weight").rpartition(".")[2]
    if ranks == 1 or name not in CUTS:
        return whole
    cut = CUTS[name]
    if shape[cut] % ranks:
        side = "rows" if cut == ROWS else "columns"
        raise InputError(f"{key} has {shape[cut]} {side}, which {ranks} devices can't share evenly")
    size = shape[cut] // ranks
    mine = slice(rank * size, (rank + 1) * size)
    return (*whole[:cut], mine, *whole[cut + 1 :])
