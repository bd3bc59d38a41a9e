"""A bootstrap interval of a step's mean time.

Steps of one repetition are more alike than those of two. So repetitions are drawn with replacement,
and then steps of each: the interval is wide where repetitions differ, however many steps they have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SAMPLES = 1000
COVERED = 0.95
MOST_DRAWS = 4_000_000
"""Steps that are drawn at a time."""


def interval(
    repetitions: Sequence[Sequence[float]], steps: int
) -> tuple[float, float] | tuple[None, None]:
    """The lower and the upper end, in the unit of the steps. The same steps give the same ends.

    None with one repetition, without steps, and where repetitions do not have `steps` steps each:
    under speculation a step gives several tokens.
    """
    count = len(repetitions)
    if count < 2 or steps < 1 or any(len(each) != steps for each in repetitions):
        return None, None
    times = torch.tensor(repetitions, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    at_a_time = max(1, MOST_DRAWS // (count * steps))
    means = []
    for start in range(0, SAMPLES, at_a_time):
        samples = min(at_a_time, SAMPLES - start)
        chosen = torch.randint(count, (samples, count, 1), generator=generator)
        step = torch.randint(steps, (samples, count, steps), generator=generator)
        means.append(times[chosen.expand_as(step), step].mean(dim=(1, 2)))
    ends = torch.tensor([(1 - COVERED) / 2, (1 + COVERED) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(ends).tolist()
    return low, high
