"""The model that one arm measures, with the prompts and the cache of its workload."""

from __future__ import annotations

import time
from pathlib import Path

import torch

import r1
from r1 import build
from r1.bench import routing
from r1.bench.process import Answer
from r1.bench.sizes import check_sizes
from r1.bench.workload import Workload
from r1.device import synchronize, torch_device
from r1.errors import InputError
from r1.placement.ranks import Crew
from r1.run.draft_model import ModelDrafter
from r1.run.engine import Engine
from r1.run.runner import round_capacity
from r1.switches.backend import Backend
from r1.switches.machine import Machine
from r1.switches.resolve import resolve


class Subject:
    """An engine and the workload that it is measured on."""

    engine: Engine

    def __init__(
        self, backend: Backend, workload: Workload, folder: Path, place: Crew | None = None
    ) -> None:
        """`folder` holds the files of the reference. Nothing is loaded yet.

        `place`: this process among those that share the model.
        """
        self.place = place or Crew()
        self.backend, self.workload, self.folder = backend, workload, folder
        self.text: list[list[int]] = []
        """The tokens that the last repetition wrote, by row."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.engine.runner.device

    def build(self) -> Answer:
        """Load or make the model, its prompts and its cache. Answers how long the loading took."""
        built = self.load()
        self.prepare()
        return built

    def connect(self) -> torch.device:
        """Connect the processes that share the model. Returns the device."""
        asked = self.backend.device
        device = torch_device(Machine.here().device if asked == "auto" else asked)
        self.place.connect(device.type)
        return device

    def load(self) -> Answer:
        """Load or make the model, with the workload's routing."""
        w = self.workload
        self.connect()
        start = time.perf_counter()
        if w.model is not None:
            draft = w.draft if self.backend.speculate == "draft" else None
            self.engine = r1.load(
                w.model, self.backend, draft_model=draft, batch=w.batch, quiet=True
            )
        else:
            config = w.config()
            backend = resolve(self.backend, config, batch=w.batch)
            mesh = build.connected(backend)
            mesh.check_alike("the switches", vars(backend), "use devices of one kind")
            placement = build.placement_of(config, backend, mesh)
            made = mesh.together(
                lambda: build.from_shape(
                    config, backend, seed=w.seed, placement=placement, packed=w.alone
                )
            )
            self.engine = Engine(made, backend, mesh=mesh)
        routing.make(w.routing, self.engine.model, w.seed)
        seconds = time.perf_counter() - start
        drafter = self.engine.drafter
        own = vars(drafter.backend) if isinstance(drafter, ModelDrafter) else None
        return {"load_seconds": seconds, "backend": vars(self.engine.backend), "draft": own}

    def prepare(self) -> None:
        """Make the prompts, the same ones in every arm, and a cache for them."""
        w, config = self.workload, self.engine.config
        drafter = self.engine.drafter
        draft = drafter.token_bytes if isinstance(drafter, ModelDrafter) else 0
        check_sizes(w, config, self.engine.backend, loaded=True, draft=draft)
        tokens = torch.randint(
            config.vocab_size,
            (w.batch, w.depth + w.prompt),
            generator=torch.Generator().manual_seed(w.seed),
        )
        self.before, self.prompts = tokens[:, : w.depth].tolist(), tokens[:, w.depth :].tolist()
        padded = [n for n in (w.prompt, w.depth) if n and round_capacity(n) != n]
        if w.routing == "uniform" and self.engine.backend.prefill_graphs and w.batch > 1 and padded:
            raise InputError(
                "--routing uniform draws experts by a token's place among all, which padding "
                "moves: under --prefill-graphs give "
                f"prompts of {round_capacity(padded[0])} tokens, not {padded[0]}, or one row"
            )
        self.cache = self.engine.cache(w.batch, w.tokens)

    def repeat_rows(self, rows: int, times: int) -> None:
        """Go on with the first `rows` rows, `times` times one after the other, and a cache for
        them.
        """
        if rows * times != len(self.prompts):
            self.before, self.prompts = self.before[:rows] * times, self.prompts[:rows] * times
            del self.cache  # so that there is room for another
            self.cache = self.engine.cache(len(self.prompts), self.workload.tokens)

    def fill(self) -> None:
        """Bring the cache to the workload's depth. This is never inside a timed region.

        A drafter reads the tokens along, as it reads every prompt: else its own layer of the cache
        would be empty up to that depth, and it would draft worse than it does.
        """
        self.cache.lengths.zero_()
        if self.workload.depth:
            along = self.engine.drafter.along if self.engine.drafter else None
            self.engine.runner.read(self.before, self.cache, along=along)
        synchronize(self.device)
