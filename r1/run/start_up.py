"""What the first call of a size does once, told apart from the time of its answer.

torch.compile translates a block when it meets a new shape, a CUDA graph is recorded, Triton builds
kernels, and on a GPU libraries load their code. All of it happens inside the first steps that need
it. So a few steps are run ahead, on short pieces of the prompts, and discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from r1.model.cache import Cache
from r1.run.runner import round_capacity
from r1.run.sampler import Sampler
from r1.switches.backend import Backend

PIECE = 16
"""Tokens of each prompt that are read ahead: the code is the same for any number above 1."""
NEW_TOKENS = 3
"""New tokens that are made ahead: the prompt's own, and those of two decode steps."""

Steps = Callable[[list[list[int]], int, Sampler, Cache], Iterator[Any]]
"""Engine.steps."""


class StartUp:
    """Runs the first steps of every new size of a call ahead."""

    def __init__(self, backend: Backend) -> None:
        """`backend` is resolved."""
        self.backend = backend
        self.captures = backend.cuda_graphs or backend.prefill_graphs
        self.done: set[tuple[object, ...]] = set()

    @property
    def work(self) -> list[str]:
        """What there is to do, in words. Empty for plain steps on a CPU, which are all alike."""
        backend = self.backend
        words = ["compiling"] if backend.compile else []
        words += ["tuning"] if backend.tune else []
        words += ["capturing"] if self.captures else []
        return words or (["loading kernels"] if backend.device != "cpu" else [])

    def run(self, prompts: list[list[int]], sampler: Sampler, cache: Cache, steps: Steps) -> bool:
        """Run a call's first steps if none of its size has run yet. Returns whether they ran.

        The cache is empty again afterwards.
        """
        size = self._size(prompts, sampler, cache)
        if self.captures and not cache.graphs:
            self.done.clear()  # graphs are lost with the cache whose addresses they hold
        if not self.work or size in self.done:
            return False
        # A captured prompt is bound to its own length.
        whole = self.backend.prefill_graphs
        pieces = prompts if whole else [prompt[:PIECE] for prompt in prompts]
        # A sampler of its own: the random numbers of a seed are for the answer.
        alike = Sampler(sampler.temperature, sampler.top_p, seed=0)
        for _ in steps(pieces, NEW_TOKENS, alike, cache):
            pass
        cache.reset()
        if self.captures:  # a cache keeps the graph of one turn only (speculate.py)
            self.done = {done for done in self.done if done[-1] == size[-1]}
        self.done.add(size)
        return True

    def _size(self, prompts: list[list[int]], sampler: Sampler, cache: Cache) -> tuple[object, ...]:
        """What compiled code, built kernels and graphs are bound to. Loaded libraries: nothing."""
        backend = self.backend
        kernels = "triton" in (backend.attention, backend.moe, backend.prefill_moe)
        if not (backend.compile or self.captures or kernels):
            return ()
        longest = max(map(len, prompts))
        length = round_capacity(longest) if backend.prefill_graphs else 0
        # A turn of speculation judges inside its graph, by the sampler's settings.
        drafts = backend.speculate != "off"
        settings = (sampler.temperature, sampler.top_p) if drafts else ()
        return (cache.rows, cache.capacity, length, settings)
