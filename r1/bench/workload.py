"""A workload: the model, and how many tokens of which kind every arm must process."""

from __future__ import annotations

import os
from dataclasses import dataclass

from r1.bench.routing import named
from r1.files.config_json import load_config
from r1.model.config import Config
from r1.model.shapes import shape

SIZES = ("batch", "prompt", "new", "depth")
"""The sizes that distinguish the workloads of one command."""


@dataclass(frozen=True)
class Workload:
    """The work that every arm does. Sizes are in tokens, except batch."""

    model: str | None
    """The path of a checkpoint's folder. None: random weights of `shape`."""
    shape: str | None
    layers: int | None
    batch: int
    prompt: int
    new: int
    depth: int
    """Tokens in each row's cache before the prompt."""
    seed: int
    routing: str = "model"
    """"uniform", "fresh" or the path of a recording: experts are drawn, see routing.py."""
    assumed: float | None = None
    """With speculation: accept each draft with this probability, whatever the model says.

    Random weights draft badly, so their own acceptance says little."""
    draft: str | None = None
    """The path of the folder of the model that drafts, in arms that speculate with one."""
    alone: bool = False
    """There is no baseline and no reference of the original numbers: an arm is compared with its
    own numbers in fp32. So random packed weights need not be those of other storages."""

    @property
    def name(self) -> str:
        """The name of the checkpoint's folder (never its path), or the shape."""
        spread = "" if self.routing == "model" else f", routing {named(self.routing)}"
        if self.model is not None:
            return os.path.basename(os.path.abspath(self.model)) + spread
        count = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        layers = f", {count}" if self.layers else ""
        return f"{self.shape}{layers}, random weights{spread}"

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes in SIZES, by name."""
        return {name: getattr(self, name) for name in SIZES}

    @property
    def tokens(self) -> int:
        """How many tokens a row of the cache holds at the end."""
        return self.depth + self.prompt + self.new

    def describe(self) -> str:
        """The name and the sizes in one line."""
        deep = f", {self.depth} tokens in the cache" if self.depth else ""
        assumed = (
            ""
            if self.assumed is None
            else f", drafts accepted by a coin that says yes with {self.assumed:g}"
        )
        by = f", drafts by {os.path.basename(os.path.abspath(self.draft))}" if self.draft else ""
        sizes = f"batch {self.batch}, prompt {self.prompt}, new {self.new}"
        return f"{self.name}: {sizes}{deep}{by}{assumed}"

    def config(self) -> Config:
        """The model's config.

        If the acceptance is assumed, a shape without an MTP layer gets one.
        """
        if self.model is not None:
            return load_config(self.model)
        config = shape(self.shape or "", self.layers)
        missing = self.assumed is not None and not config.num_nextn_predict_layers
        return config.change(num_nextn_predict_layers=1) if missing else config
