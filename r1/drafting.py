"""Load a small model that drafts for a larger one: of the same vocabulary, and in what memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from r1 import build
from r1.device import available_bytes, torch_device
from r1.errors import InputError, setting
from r1.files.config_json import load_config
from r1.files.folder import check_folder
from r1.files.tokenizer import tokenizer_of
from r1.model.config import Config
from r1.run.draft_model import Draft
from r1.switches.backend import Backend
from r1.switches.draft import resolve_draft
from r1.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class DraftFolder:
    """A draft's folder that fits a model: what is known before its weights are read."""

    directory: Path
    config: Config
    backend: Backend
    """Resolved for the draft."""
    ids: frozenset[int] | None
    """See Draft."""

    def check_memory(self, config: Config, backend: Backend) -> None:
        """Raise InputError if the weights of a model and of this draft do not fit the memory.

        `config` and the resolved `backend` are the model's.
        """
        own, drafts = (
            build.weight_bytes(*each) for each in ((config, backend), (self.config, self.backend))
        )
        available = available_bytes(torch_device(backend.device))
        if own + drafts + build.HEADROOM > available:
            raise InputError(
                f"the model needs {own / 1e9:.1f} GB and its draft {drafts / 1e9:.1f} GB, and "
                f"{backend.device} has {available / 1e9:.1f} GB free: use a smaller draft, or "
                f"{setting('speculate', 'off')}"
            )

    def load(self, *, quiet: bool = False) -> tuple[Draft, list[str]]:
        """The draft, and what loading left out knowingly. Raises InputError."""
        try:
            model, report = build.from_checkpoint(
                self.directory, self.config, self.backend, quiet=quiet
            )
        except InputError as error:
            raise about(self.directory, error) from None
        notes = [f"the draft: {sentence}" for sentence in report.sentences()]
        return Draft(model, self.backend, self.ids), notes


def find(
    directory: str | Path, asked: Backend, tokenizer: Tokenizer | None, *, batch: int = 1
) -> DraftFolder:
    """Look at a draft's folder, for a model with this tokenizer and the switches `asked` of it.

    Raises InputError for a folder that can't be used, and for another vocabulary.
    """
    directory = Path(directory)
    try:
        config = load_config(directory)
        check_folder(directory)
        backend = resolve_draft(asked, config, batch=batch)
        ids = shared_ids(tokenizer, tokenizer_of(directory, config))
    except InputError as error:
        raise about(directory, error) from None
    return DraftFolder(directory, config, backend, ids)


def shared_ids(model: Tokenizer | None, draft: Tokenizer | None) -> frozenset[int] | None:
    """The ids of both vocabularies. None if neither model has a tokenizer.

    Raises InputError if an id has another text in the draft's, or if that can't be known.
    """
    if model is None and draft is None:
        return None
    if model is None or draft is None:
        which = "the model" if model is None else "the draft"
        raise InputError(f"{which} has no tokenizer, so whether ids mean the same can't be known")
    return model.shared_ids(draft)


def about(directory: Path, error: InputError) -> InputError:
    """The error of a draft, which says that it is about the draft."""
    return InputError(f"{setting('draft_model', directory)}: {error}")
