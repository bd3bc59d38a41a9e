"""The switches of a small model that drafts for a larger one."""

from __future__ import annotations

import dataclasses
from typing import Any

from r1.errors import InputError, setting
from r1.model.config import Config
from r1.switches.backend import Backend
from r1.switches.machine import Machine
from r1.switches.resolve import resolve

OWN: dict[str, Any] = {
    "attention": "auto", "prefill_attention": "auto", "moe": "auto", "prefill_moe": "auto",
    "quant_head": "none", "quant_activations": "none", "speculate": "off", "draft_tokens": 1,
    "experts": "device", "expert_slots": 0, "expert_cache_gb": 0.0, "expert_policy": "last",
    "expert_profile": "", "guess_experts": False,
}  # fmt: skip
"""The switches that a draft does not take from the model: they depend on the kind of model."""
FIRST_PASS = 2
"""Tokens of each row in the draft's longest pass (r1/run/draft_model.py)."""


def check_given(backend: Backend, given: bool) -> None:
    """Raise InputError if a draft is missing, if one is `given` that `backend` does not use, or if
    several devices share the model: a draft runs on one.
    """
    asked = setting("speculate", "draft")
    if backend.speculate == "draft" and not given:
        raise InputError(f"{asked} needs a small model: add {setting('draft_model', 'DIR')}")
    if given and backend.speculate != "draft":
        raise InputError(f"{setting('draft_model')} is of no use without drafts: add {asked}")
    if given and backend.ranks > 1:
        raise InputError(f"{asked} runs on one device, and {backend.sharing} asks for more")


def resolve_draft(
    asked: Backend, config: Config, machine: Machine | None = None, *, batch: int = 1
) -> Backend:
    """What really runs for the draft of `config`, under the switches that are `asked` of the model.

    Raises InputError as `resolve` does.
    """
    own = dataclasses.replace(asked, **OWN)
    return resolve(own, config, machine, batch=FIRST_PASS * batch)
