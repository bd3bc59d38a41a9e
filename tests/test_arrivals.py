"""Tokens on their way to the host (r1/run/arrivals.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from r1.errors import InputError
from r1.run.arrivals import arrivals, copies, joined, parted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("more", [0, 1], ids=["step", "drafts"])
@pytest.mark.parametrize("size", [1, 3])
def test_tokens_and_scores_in_one_tensor(size: int, more: int) -> None:
    """Every bit comes back: of tokens beyond 32 bits, of NaN, of a step's rows among more."""
    tokens = torch.tensor([[2**40 + 1, -1, 7, 163_839]]).expand(4, 4)[:3, : size + more]
    scores = torch.tensor([[float("nan"), -0.0, 1e-45, float("-inf")]]).expand(4, 4)[1:, :size]
    both = joined(tokens, scores)
    assert both.shape == (3 * (3 * size + 2 * more),)
    first, second = parted(both, tokens.shape, scores.shape)
    assert torch.equal(first, tokens)
    assert torch.equal(second.view(torch.int32), scores.contiguous().view(torch.int32))


def test_columns_that_are_rows_in_memory() -> None:
    tokens, scores = torch.arange(4)[None].t(), torch.arange(8.0).view(2, 4).t()[:, :1]
    found = parted(joined(tokens, scores), tokens.shape, scores.shape)
    assert torch.equal(found[0], tokens) and torch.equal(found[1], scores)


def test_a_step_may_overwrite_the_last_ones() -> None:
    """As a captured one does: each step's tokens arrive, in order. The stream of copies to the host
    is held up, so that a copy reads after the next step has written.
    """
    tokens = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    scores = torch.zeros(2, 1, device=DEVICE)

    def launched() -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(50):
            if DEVICE.type == "cuda":
                with torch.cuda.stream(copies(DEVICE)):
                    torch.cuda._sleep(200_000)
            tokens.copy_(torch.tensor([[step], [step + 100]]))
            yield tokens, scores

    found = list(arrivals(launched(), "advice"))
    assert found == [[[step], [step + 100]] for step in range(50)]


def test_the_row_whose_scores_are_no_numbers_is_named() -> None:
    tokens = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    scores = torch.tensor([[0.0], [float("nan")], [0.0]], device=DEVICE)
    with pytest.raises(InputError, match="prompt 1 are no numbers: look"):
        list(arrivals(iter([(tokens, scores)]), "look"))
