"""generation_config.json: a chat model often ends a turn with other tokens than config.json's."""

from __future__ import annotations

import json
from pathlib import Path

from r1.errors import InputError


def read_stop_ids(directory: Path) -> frozenset[int]:
    """Its eos_token_id; empty where the file or the field is missing. Raises InputError."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return frozenset()
    try:
        stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        advice = "download it again, or delete it"
        raise InputError(f"{path} can't be read ({error}): {advice}") from None
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(isinstance(stop, int) for stop in stops):
        raise InputError(f"{path}: eos_token_id is {stops}, not token ids")
    return frozenset(stops)
