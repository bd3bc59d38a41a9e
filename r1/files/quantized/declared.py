"""What a checkpoint may say of its own quantization, and the reader of such a description.

The tensors' names and dtypes tell what a format is (recognize.py). They do not tell everything: how
many numbers share a scale, or whether GPTQ's zero points are stored minus one. That is read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from r1.errors import InputError

PLAIN = "get the model's own repository, in bf16 or FP8 blocks"


@dataclass(frozen=True)
class Declared:
    """The facts that tensors do not tell. None, or the default: nothing is said."""

    where: str = "config.json"
    """The file and the field, for messages."""
    method: str = ""
    bits: int | None = None
    group: int | None = None
    """Columns that share a scale; 0: a whole row."""
    block: tuple[int, int] | None = None
    """Rows and columns of the blocks that share a scale."""
    symmetric: bool = False
    """No zero points; where the format has a place for them it is not read."""
    zero_offset: int = 0
    """What was subtracted from the zero points before they were packed."""
    ordered: bool = False
    """Columns lie in order, so that a table of their groups only repeats that."""
    unlisted: bool = False
    """The index may omit tensors that the quantizer added."""
    groups: tuple[int, ...] = ()
    """The columns that share a scale, where matrices differ in it: their scales tell which."""

    def columns(self, key: str, columns: int, across: int) -> int | None:
        """How many columns of a matrix share a scale, `across` scales to a row (see `group`).

        Of several sizes that make as many scales it is the one that divides the matrix. Raises
        InputError where there is none.
        """
        if not self.groups:
            return self.group
        sizes = {min(size or columns, columns) for size in self.groups}
        fitting = {size for size in sizes if -(-columns // size) == across}
        fitting = {size for size in fitting if columns % size == 0} or fitting
        if len(fitting) > 1:
            raise InputError(
                f"{self.where} has groups of {' and '.join(map(str, sorted(fitting)))} columns, "
                f"and {key} may be of either: {PLAIN}"
            )
        return next(iter(fitting), self.group)


class Reader:
    """Reads one description's fields; every method raises InputError for an unsuitable value."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def fail(self, problem: str) -> InputError:
        return InputError(f"{self.where} {problem}")

    def only(self, name: str, *allowed: Any) -> Any:
        """A field's value, which must be one of `allowed`. The first stands for a missing field."""
        value = self.raw.get(name)
        value = allowed[0] if value is None else value
        if not any(value == each and type(value) is type(each) for each in allowed):
            reads = " or ".join(str(each) for each in allowed)
            raise self.fail(f"has {name} = {value!r}, but r1 reads only {reads}: {PLAIN}")
        return value

    def none_of(self, name: str, why: str) -> None:
        """Refuse a field that holds anything."""
        value = self.raw.get(name)
        if value:
            raise self.fail(f"has {name} = {str(value)[:60]}, {why}: {PLAIN}")

    def whole(self, name: str, least: int, default: int | None = None) -> int:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise self.fail(f"has {name} = {value!r}, which is no whole number of at least {least}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(f"has {name} = {value!r}, which is neither true nor false")
        return value

    def group(self, name: str = "group_size") -> int:
        """Columns of a group: 0 where the file says -1, a whole row."""
        value = self.whole(name, -1)
        if value == 0:
            raise self.fail(f"has {name} = 0: a group has columns (-1: all)")
        return max(value, 0)

    def pair(self, name: str) -> tuple[int, int]:
        """Rows and columns of a block."""
        block = self.raw.get(name)
        pair = isinstance(block, list) and len(block) == 2
        if not pair or not all(type(size) is int and 0 < size < 2**31 for size in block or ()):
            problem = f"has {name} = {block!r}, not two whole numbers such as [128, 128]"
            raise self.fail(problem)
        assert isinstance(block, list)
        return block[0], block[1]
