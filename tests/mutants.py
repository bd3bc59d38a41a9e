"""Makes broken files of sound ones: by bytes, and by the structure of JSON. Seeded."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 10**20, 10**400, -0.5, 0.5, 1e-300, 1e300,
    float("nan"), float("inf"), "", "x", "x\n\x1b[2J\u202e", "\ud800", "a\0b", "x" * 300,
    [], [1], [None], {}, {"a": 1}, [{}], [[[]]], {"a": {"b": []}}, {"content": "\x1b[2J"},
]  # fmt: skip
"""Values that a field may suddenly have."""
BYTES = (b"\0", b"\xff", b"\xfe\xff", b"\n", b'"', b"{", b"\x1b[2J", b"\xed\xa0\x80", b"9" * 40)
"""Bytes that may suddenly stand somewhere."""

Place = tuple[Any, ...]


def places(value: Any, above: Place = (), width: int = 6) -> Iterator[Place]:
    """The keys that lead to each value in a JSON value; of long lists and objects only the ends."""
    if above:
        yield above
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    for key in keys if len(keys) < 100 else keys[:width] + keys[-width:]:
        yield from places(value[key], (*above, key), width)


def by_structure(content: Any, chance: random.Random) -> Any:
    """A copy with one to three values replaced, deleted, doubled, or swapped."""
    mutant = copy.deepcopy(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        all_places = list(places(mutant))
        if not all_places:
            break
        # A place near the root is as likely as one far from it.
        depth = chance.choice(sorted({len(place) for place in all_places}))
        *above, key = chance.choice([p for p in all_places if len(p) == depth])
        holder = mutant
        for each in above:
            holder = holder[each]
        change = chance.random()
        if change < 0.2:
            del holder[key]
        elif change < 0.3:
            other = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            holder[key], holder[other] = holder[other], holder[key]
        elif change < 0.4 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif change < 0.5 and isinstance(holder, dict):
            holder[chance.choice(("x\n\x1b[2J", "", key + "x"))] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(chance.choice(VALUES))
    return mutant


def by_bytes(content: bytes, chance: random.Random) -> bytes:
    """A copy with a few bytes changed, put in, or cut out, or with its end cut off."""
    mutant = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        # Headers stand at the start: half of the changes are there.
        end = min(len(mutant), 400) if chance.random() < 0.5 else len(mutant)
        at = chance.randrange(end + 1)
        change = chance.random()
        if change < 0.4 and at < len(mutant):
            mutant[at] ^= 1 << chance.randrange(8)
        elif change < 0.7:
            mutant[at : at + chance.choice((0, 1, 4))] = chance.choice(BYTES)
        elif change < 0.9:
            del mutant[at : at + chance.choice((1, 2, 16))]
        else:
            del mutant[at:]
    return bytes(mutant)


def mutate(content: bytes, chance: random.Random) -> bytes:
    """A broken copy of a file: JSON is broken by its structure, or like any file by its bytes."""
    if chance.random() < 0.7:
        try:
            broken = by_structure(json.loads(content), chance)
        except ValueError:
            pass  # no JSON
        else:
            return json.dumps(broken).encode()
    return by_bytes(content, chance)
