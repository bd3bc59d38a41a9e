"""The strategies that a switch can name: one table for each slot.

A new strategy is one class and one entry here. Its name is then a value of the switch.
"""

from __future__ import annotations

from collections.abc import Mapping

from r1.errors import InputError
from r1.kernels.strategies import TritonAttend, TritonDispatch, TritonGrouped
from r1.model import attend, dispatch, gqa_attend
from r1.model.attend import Attend
from r1.model.config import AttentionShape, GroupedShape
from r1.model.dispatch import Dispatch
from r1.model.gqa_attend import GroupedAttend
from r1.model.strategy import Attention, Strategy

ATTENTION: dict[str, Attend] = {s.name: s for s in (*attend.STRATEGIES, TritonAttend())}
"""For `attention` and `prefill_attention` of models with latent attention."""
GROUPED: dict[str, GroupedAttend] = {s.name: s for s in (*gqa_attend.STRATEGIES, TritonGrouped())}
"""The same for models with grouped-query attention."""
EXPERTS: dict[str, Dispatch] = {s.name: s for s in (*dispatch.STRATEGIES, TritonDispatch())}
"""For `moe` and `prefill_moe`."""


def attention_of(shape: AttentionShape | GroupedShape) -> Mapping[str, Attention]:
    """The attention strategies of models with this kind of attention."""
    return GROUPED if isinstance(shape, GroupedShape) else ATTENTION


def check_tables() -> None:
    """Check every entry of all tables; raises InputError for one that a user entered wrongly."""
    _check("ATTENTION", ATTENTION, Attend)
    _check("GROUPED", GROUPED, GroupedAttend)
    _check("EXPERTS", EXPERTS, Dispatch)
    tables: dict[str, Mapping[str, Attention]] = {"ATTENTION": ATTENTION, "GROUPED": GROUPED}
    for title, table in tables.items():
        for key, strategy in table.items():
            if strategy.needs not in (None, "mask", "bias"):
                wrong = f"{title}[{key!r}] has needs = {strategy.needs!r}"
                raise InputError(f"{wrong}: choose 'mask', 'bias' or None")


def _check(title: str, table: Mapping[str, Strategy], base: type[Strategy]) -> None:
    """Each entry is an instance of `base`, and its key is its name."""
    for key, strategy in table.items():
        entry = f"{title}[{key!r}]"
        if isinstance(strategy, type):
            name = strategy.__name__
            raise InputError(f"{entry} is the class {name}: enter an instance of it, {name}()")
        name = type(strategy).__name__
        if not isinstance(strategy, base):
            derive = f"derive its class from {base.__module__}.{base.__name__}"
            raise InputError(f"{entry} is a {name}, not a strategy for this slot: {derive}")
        if key == "auto":
            raise InputError(f"{entry}: auto lets r1 choose, so give {name} another name")
        if getattr(strategy, "name", None) != key:
            has = f"has the name {strategy.name!r}" if hasattr(strategy, "name") else "has no name"
            raise InputError(f"{entry} {has}: set name = {key!r} in the class {name}")
