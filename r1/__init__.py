"""r1: DeepSeek-R1 from scratch, readable, with every optimization a switch that is measured alone.

>>> import r1
>>> engine = r1.load("weights/tiny-r1", r1.Backend(device="cpu"))
>>> engine.generate([[0, 5, 7], [0, 9]], max_new_tokens=8, temperature=0.0)

Read r1/model/transformer.py first.
"""

from __future__ import annotations

from pathlib import Path

from r1 import starting

if starting.is_command():
    starting.begin()  # before torch is imported, which takes seconds

from r1 import build, drafting
from r1.errors import InputError
from r1.files.config_json import load_config
from r1.files.folder import check_folder
from r1.files.generation_config import read_stop_ids
from r1.files.load import Report
from r1.files.tokenizer import tokenizer_of
from r1.model.config import Config
from r1.model.transformer import Transformer
from r1.placement.alike import check_weights
from r1.run.completion import Completion
from r1.run.engine import Engine
from r1.switches.backend import Backend
from r1.switches.draft import check_given
from r1.switches.resolve import resolve
from r1.text.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["Backend", "Completion", "Config", "Engine", "InputError", "Tokenizer", "load"]


def load(
    directory: str | Path,
    backend: Backend | None = None,
    *,
    draft_model: str | Path | None = None,
    batch: int = 1,
    mtp: bool = False,
    quiet: bool = False,
) -> Engine:
    """Load a checkpoint: a folder with config.json, *.safetensors, and a tokenizer for chats.

    `batch` is how many prompts at a time the "auto" switches are chosen for; any number may be
    given later. `mtp` loads the multi-token-prediction layers too, which `speculate="mtp"` does by
    itself. `draft_model` is the folder of the model that drafts under `speculate="draft"`; the same
    id must have the same text in its tokenizer, and ids that one of the two lacks are not drafted.
    Where devices share the model (`tp`, `ep`, `pp`), each is a process that calls this, and calls
    the engine alike; torch.distributed must connect them before. Raises InputError, with one
    sentence, for a folder or switch that can't be used: if one process does, all do.
    """
    directory, asked = Path(directory), backend or Backend()
    check_given(asked, draft_model is not None)
    config = load_config(directory)
    check_folder(directory)
    backend = resolve(asked, config, batch=batch)
    mesh = build.connected(backend)
    mesh.check_alike("the switches", vars(backend), "give every rank the same command")
    mesh.check_alike("config.json", config, "give every rank the same checkpoint")
    placement = build.placement_of(config, backend, mesh)
    tokenizer = tokenizer_of(directory, config)
    stop_ids = frozenset(config.eos_token_ids) | read_stop_ids(directory)
    stop_ids |= tokenizer.stop_ids if tokenizer else frozenset()
    small = None
    if draft_model is not None:
        small = drafting.find(draft_model, asked, tokenizer, batch=batch)
        small.check_memory(config, backend)

    def fill() -> tuple[Transformer, Report]:
        return build.from_checkpoint(
            directory, config, backend, mtp=mtp, quiet=quiet or mesh.rank > 0, placement=placement
        )

    model, report = mesh.together(fill)
    check_weights(model, mesh)
    draft, more = small.load(quiet=quiet) if small else (None, [])
    notes, cautions = [*report.sentences(), *more], _cautions(tokenizer, backend)
    return Engine(model, backend, tokenizer, stop_ids, notes, cautions, mesh, draft)


def _cautions(tokenizer: Tokenizer | None, backend: Backend) -> list[str]:
    """Risks that the user of an engine should know."""
    cautions = list(tokenizer.cautions) if tokenizer else []
    if "fp16" in (backend.dtype, backend.amp):
        ends = "fp16 ends at 65504, which this family's activations can pass"
        cautions.append(f"{ends}: prefer bf16 where the machine has it")
    return cautions
