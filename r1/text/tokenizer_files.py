"""Read the files that a tokenizer consists of: their text, their JSON, and the tokens they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from r1 import reading
from r1.errors import InputError


def read_text(path: Path) -> str:
    """The text of a file. Raises InputError if it is unreadable or not UTF-8."""
    try:
        return reading.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({error}); download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one if there is no such file."""
    return reading.read_object(path) if path.is_file() else {}


def read_chat_template(directory: Path) -> str | None:
    """The jinja text of the chat template in a folder, or None if the folder has none.

    chat_template.jinja has priority over the field of tokenizer_config.json, as in transformers.
    The field may hold several named templates. Then the one named "default" is returned.
    """
    if (path := directory / "chat_template.jinja").is_file():
        return read_text(path)
    field = read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(field, list):
        named = [t for t in field if isinstance(t, dict) and t.get("name") == "default"]
        field = named[0].get("template") if named else field
    # Any other type is no published text, so its JSON matches no template either.
    return field if field is None or isinstance(field, str) else json.dumps(field)


def named_tokens(config: dict[str, Any], directory: Path) -> dict[str, str]:
    """The texts of "bos_token" and "eos_token", each only if a file in `directory` names it.

    `config` is the content of tokenizer_config.json. It has priority over special_tokens_map.json.
    """
    special = read_json(directory / "special_tokens_map.json")
    texts = {
        key: _token_text(config.get(key)) or _token_text(special.get(key))
        for key in ("bos_token", "eos_token")
    }
    return {key: text for key, text in texts.items() if text}


def added_tokens(config: dict[str, Any], directory: Path) -> dict[str, int]:
    """Text -> id of the `added_tokens_decoder` in tokenizer_config.json, whose content is `config`.

    The field itself maps ids, written as strings, to tokens.
    """
    try:
        tokens = {
            _token_text(token): int(i)
            for i, token in (config.get("added_tokens_decoder") or {}).items()
        }
    except (AttributeError, ValueError):
        tokens = {None: 0}
    if None in tokens or min(tokens.values(), default=0) < 0:
        raise InputError(
            f"added_tokens_decoder of tokenizer_config.json in {directory} is not a table of "
            "id: token"
        )
    return {text: i for text, i in tokens.items() if text is not None}


def _token_text(token: Any) -> str | None:
    """The text of a token, which a file gives as a string or as a dict with "content"."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None
