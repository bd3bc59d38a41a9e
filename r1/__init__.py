"""r1: DeepSeek-R1 from scratch, readable, with every optimization a switch that can be measured
alone.

>>> import r1
>>> engine = r1.load("weights/tiny-r1", r1.Backend(device="cpu"))
>>> engine.generate([[0, 5, 7], [0, 9]], max_new_tokens=8, temperature=0.0)

Read model.py first.
"""

from __future__ import annotations

import json
from pathlib import Path

from r1 import build
from r1.errors import InputError
from r1.files.config_json import load_config
from r1.model.config import Config
from r1.run.generate import Completion, Engine
from r1.switches.backend import Backend, resolve
from r1.text.tokenizer import Tokenizer

__all__ = ["Backend", "Completion", "Config", "Engine", "InputError", "load"]


def load(
    directory: str | Path,
    backend: Backend | None = None,
    *,
    batch: int = 1,
    mtp: bool = False,
    quiet: bool = False,
) -> Engine:
    """Load a checkpoint: a folder with config.json, *.safetensors (and their index), and a
    tokenizer if it is to talk.

    `batch` is how many prompts at a time the "auto" switches are chosen for; any number may be
    given later. `mtp` loads the multi-token-prediction layers too, which `speculate="mtp"` does by
    itself. Raises InputError, in one sentence, for whatever can't be used."""
    directory = Path(directory)
    config = load_config(directory)
    backend = resolve(backend or Backend(), config, batch=batch)
    stop_ids = frozenset(config.eos_token_ids) | _generation_stops(directory)
    tokenizer = None
    if any(
        (directory / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "tiktoken.model")
    ):
        tokenizer = Tokenizer.load(
            directory, bos_id=config.bos_token_id, eos_id=next(iter(config.eos_token_ids), None)
        )
        tokenizer.check(config.vocab_size)
        stop_ids |= tokenizer.stop_ids
    model, report = build.from_checkpoint(directory, config, backend, mtp=mtp, quiet=quiet)
    cautions = []
    if "fp16" in (backend.dtype, backend.amp):
        cautions.append(
            "fp16 ends at 65504, which this family's activations can pass: prefer bf16 where the machine has it"
        )
    return Engine(model, backend, tokenizer, stop_ids, report.sentences(), cautions)


def _generation_stops(directory: Path) -> frozenset[int]:
    """generation_config.json's eos_token_id: chat models often end a turn with another token than
    config.json's."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return frozenset()
    try:
        stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{path} can't be read ({error}): download it again, or delete it"
        ) from None
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(isinstance(stop, int) for stop in stops):
        raise InputError(f"{path}: eos_token_id is {stops}, not token ids")
    return frozenset(stops)
