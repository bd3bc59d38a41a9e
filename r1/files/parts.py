"""Which part of each tensor this process reads: its share, as far as the files' formats let it.

A quantized matrix is several tensors, each in units of its own: a word holds 8 columns, a scale is
for a block of 128 x 128. So a share is rounded outwards to whole units of all of them, and what was
read too much is left out when it is put into its place (fill.py).

Shapes: out and in are a matrix's rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from r1.files.names import Slot
from r1.files.quantized.published import Axis, Found
from r1.files.shards import Entry, width
from r1.placement.placement import Part
from r1.storage.spec import Spec


@dataclass(frozen=True)
class Reading:
    """What is read of one weight."""

    shape: tuple[int, ...]
    """The whole weight's shape."""
    mine: Part
    """What this process holds of the weight."""
    read: Part
    """What is read of it: `mine`, or more around it."""
    region: Part
    """What that is of the tensor with the numbers."""
    beside: Mapping[str, tuple[Entry, Part]] = field(default_factory=dict)
    """The other tensors of a quantized matrix, by their endings, and what is read of each."""

    @property
    def inside(self) -> Part:
        """Where `mine` lies in what is read."""
        return tuple(
            slice(mine.start - read.start, mine.stop - read.start)
            for mine, read in zip(self.mine, self.read, strict=True)
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of what is read, as a weight of its own."""
        return tuple(cut.stop - cut.start for cut in self.read)


def nbytes(main: Entry, reading: Reading) -> int:
    """How many bytes are read; `main` is the tensor with the numbers."""
    tensors = ((main, reading.region), *reading.beside.values())
    return sum(_count(region) * width(entry) for entry, region in tensors)


def _count(part: Part) -> int:
    return math.prod(cut.stop - cut.start for cut in part)


def plan(found: Found | None, slot: Slot, shape: tuple[int, ...], mine: Part) -> Reading:
    """What to read for a slot that holds `mine` of a weight; `found` is None for plain numbers."""
    if found is None:
        read = _for_quantizing(mine, shape, slot.spec)
        return Reading(shape, mine, read, read)
    again = None if slot.spec == found.spec else slot.spec
    layout = found.format.layout(found.spec)
    read = _outwards(_for_quantizing(mine, shape, again), shape, layout)
    regions = {
        ending: (entry, _region(entry.shape, layout.get(ending, ()), read, shape))
        for ending, entry in found.tensors.items()
    }
    _, region = regions.pop(found.format.main)
    return Reading(shape, mine, read, region, regions)


def _for_quantizing(mine: Part, shape: tuple[int, ...], spec: Spec | None) -> Part:
    """A scale that is for a whole row, or for all rows, is made of more than a share of them."""
    if spec is None:
        return mine
    sides = zip(mine, shape, (spec.rows, spec.columns), strict=True)
    return tuple(cut if block else slice(0, size) for cut, size, block in sides)


def _outwards(part: Part, shape: tuple[int, ...], layout: Mapping[str, tuple[Axis, ...]]) -> Part:
    """The part, rounded to whole units of each tensor."""
    units = [1] * len(part)
    for axis, unit in (each for axes in layout.values() for each in axes):
        units[axis] = math.lcm(units[axis], unit or 1)
    return tuple(
        slice(cut.start // unit * unit, min(-(-cut.stop // unit) * unit, size))
        for cut, unit, size in zip(part, units, shape, strict=True)
    )


def _region(
    shape: tuple[int, ...], axes: tuple[Axis, ...], read: Part, whole: tuple[int, ...]
) -> Part:
    """What to read of a tensor; one that runs along neither side is read whole.

    A tensor of fewer dimensions than `axes` is that of the first ones: one scale for each row.
    """
    region = [slice(0, size) for size in shape]
    for dim, (size, (axis, unit)) in enumerate(zip(shape, axes, strict=False)):
        if unit and read[axis] != slice(0, whole[axis]):
            region[dim] = slice(read[axis].start // unit, min(-(-read[axis].stop // unit), size))
    return tuple(region)
