"""The edges of the sampler, and the arithmetic of a Completion.

Holds r1/run/sampler.py and r1/run/completion.py to account. test_generate.py tests distributions.
"""

from __future__ import annotations

import pytest
import torch
from refusals import refused

from r1.run import completion
from r1.run.completion import Collector, Completion
from r1.run.sampler import Sampler

HALVES = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log()  # powers of two: sums are exact


@pytest.mark.parametrize(
    ("top_p", "wanted"),
    [
        (0.5, [0.0, 1.0, 0.0, 0.0]),
        (0.75, [0.0, 2 / 3, 0.0, 1 / 3]),
        (0.875, [1 / 7, 4 / 7, 0.0, 2 / 7]),
        (1.0, [0.125, 0.5, 0.125, 0.25]),
    ],
)
def test_a_nucleus_that_is_reached_exactly(top_p: float, wanted: list[float]) -> None:
    """It ends with the token that reaches top_p; and what is left sums to 1."""
    found = Sampler(1.0, top_p).probabilities(HALVES)
    # Of the two with 0.125 either may come first.
    torch.testing.assert_close(
        found.sort().values, torch.tensor([sorted(wanted)]), rtol=1e-6, atol=1e-7
    )
    assert float(found.sum()) == pytest.approx(1, abs=1e-6)


def test_seeds() -> None:
    """0 to 2^63 - 1. (On a CPU torch uses the lowest 32 bits.)"""
    logits = torch.zeros(64, 50)
    seeds = (0, 1, 2**32 - 2, 2**63 - 1)
    drawn = [Sampler(1.0, 1.0, seed)(logits)[0].tolist() for seed in seeds]
    assert len({tuple(each) for each in drawn}) == len(seeds)
    assert Sampler(1.0, 1.0, seeds[-1])(logits)[0].tolist() == drawn[-1]
    for seed in (-1, 2**63, 2**64):
        with refused(f"seed={seed}: give a whole number from 0 to"):
            Sampler(1.0, 1.0, seed)


def test_what_a_completion_reckons() -> None:
    """5 tokens: the first after 2 s, the last after 6; two steps of 2 drafts, 2 accepted."""
    done = Completion([1, 2, 3, 4, 5], "length", 3, ttft=2.0, seconds=6.0)
    done.steps, done.drafted, done.accepted = 2, 4, 2
    assert (done.tpot, done.acceptance, done.tokens_per_step) == (1.0, 0.5, 2.0)
    one = Completion([1], "length", 3, ttft=2.0, seconds=2.0)
    assert (one.tpot, one.acceptance, one.tokens_per_step) == (0.0, 0.0, 0.0)


def test_what_a_collector_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows with 2 drafts a step and a limit of 4; 9 stops. Time is the test's own."""
    clock = iter([10.0, 11.0, 13.0, 16.0])
    monkeypatch.setattr(completion.time, "perf_counter", lambda: next(clock))
    seen: list[list[int | None]] = []
    collector = Collector([[1, 2], [3]], 4, {9}, drafts=2)
    collector.add([[5], [6]], seen.append)
    collector.add([[0, 8, 7], [9, 8]], seen.append)
    assert not collector.live
    collector.add([[1], [2]], seen.append)
    first, second = collector.completions
    assert (first.tokens, first.finish, first.prompt_tokens) == ([5, 0, 8, 7], "length", 2)
    assert (second.tokens, second.finish, second.prompt_tokens) == ([6, 9], "stop", 1)
    assert (first.ttft, first.seconds, first.steps) == (1.0, 3.0, 1)
    assert (second.ttft, second.seconds, second.steps) == (1.0, 3.0, 1)
    assert (first.drafted, first.accepted, second.drafted, second.accepted) == (2, 2, 2, 1)
    assert seen == [[5, 6], [0, 9], [8, None], [7, None]]
