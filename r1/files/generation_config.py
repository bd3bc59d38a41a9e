"""generation_config.json: a chat model often ends a turn with other tokens than config.json's."""

from __future__ import annotations

from pathlib import Path

from r1.errors import InputError
from r1.reading import read_object


def read_stop_ids(directory: Path) -> frozenset[int]:
    """Its eos_token_id; empty where the file or the field is missing. Raises InputError."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return frozenset()
    advice = "download it again, or delete it"
    stops = read_object(path, advice).get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(type(stop) is int and stop >= 0 for stop in stops):
        raise InputError(f"{path}: eos_token_id is {stops}, not token ids: {advice}")
    return frozenset(stops)
