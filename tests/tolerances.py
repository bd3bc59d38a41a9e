"""One table of tolerances, by purpose and dtype, with the reason for each row.

A tolerance is the largest absolute difference that passes. Where no reduction changes its order
there is no row: such tests ask for `torch.equal`. test_traps.py shows that each row is tight enough
to find a mistake.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """`atol` for values of about `scale`; `why` says where the difference comes from."""

    atol: float
    scale: float
    why: str


TOLERANCES = {
    "reference fp32": Tolerance(
        1e-4,
        10.0,
        "transformers sums in another order: 1.4e-5 is the most seen on any layer of any case "
        "(values up to 14). Every wrong formula in test_traps.py is off by ten times this row "
        "or more, or chooses another expert",
    ),
    "algebra fp32": Tolerance(
        2e-5,
        3.0,
        "the same function regrouped (absorbed projections, expanded latents, cached or not, "
        "alone or in a batch): only the order of sums differs. 7.2e-6 from fp64 was the most "
        "seen, over 80 examples of each property, so two ways may be 1.5e-5 apart",
    ),
    "experts fp32": Tolerance(
        1e-5,
        3.0,
        "loop, gather and grouped add the same K products, through other matrix kernels: some 1e-6",
    ),
    "rope fp32": Tolerance(
        2e-4,
        10.0,
        "the angle of position p is p w in fp32: at p = 1000 it is off by 1000 * 2^-24 = 6e-5 "
        "radians, times norms of some units",
    ),
    "compile fp32": Tolerance(
        2e-5,
        3.0,
        "inductor fuses and reorders sums, and its exp and sigmoid are other approximations: "
        "1.1e-6 seen, on one kind of CPU",
    ),
    "amp bf16": Tolerance(
        0.06,
        3.0,
        "8 bits of mantissa (half a step is 2^-9 of a value) through a dozen matrix products, "
        "with equal routing: 0.02 seen",
    ),
    "ranks bf16": Tolerance(
        0.125,
        4.0,
        "each rank rounds its part of a sum to 8 bits before the parts are added, with equal "
        "routing: four steps (2^-5 each) of logits of 4 to 8; 0.0625 seen",
    ),
    "kernels fp32": Tolerance(
        1e-5,
        1.0,
        "a kernel beside its torch twin, relative to the largest value: only the order of sums "
        "differs, some 1e-6 seen",
    ),
    "kernels bf16": Tolerance(
        0.016,
        1.0,
        "the same, where twins round in between to 8 bits (half a step is 2^-9) once or twice "
        "more than the kernels do",
    ),
    "kernels fp16": Tolerance(
        0.002,
        1.0,
        "the same with 11 bits (half a step is 2^-12)",
    ),
    "fp8 e4m3": Tolerance(
        0.0626,
        1.0,
        "3 bits of mantissa: half a step is 2^-4 of a value, relative to its block's largest; "
        "plus the scale's own rounding",
    ),
}


def atol(row: str) -> float:
    """The tolerance of one row."""
    return TOLERANCES[row].atol
