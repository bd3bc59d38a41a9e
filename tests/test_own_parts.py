"""Parts that a user adds: they run in both phases, and one entered wrongly is refused by name.

Holds to account: r1/switches/strategies.py, r1/switches/resolve.py, r1/model/attend.py,
r1/model/step.py and r1/storage/matrix.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding import PROMPTS
from models import TINY, TINY_GROUPED, sharp_logits
from refusals import refused
from torch import Tensor

from r1 import Backend
from r1.model import gqa_attend
from r1.model.attend import Absorbed, Attend, Naive, UpProjection, probabilities
from r1.model.cache import Entry, LayerCache
from r1.model.config import AttentionShape
from r1.model.dispatch import Dispatch, Gather
from r1.model.moe import Experts
from r1.model.step import Step
from r1.model.strategy import Use
from r1.run.runner import Runner
from r1.storage.matrix import Matrix
from r1.switches.resolve import resolve
from r1.switches.strategies import ATTENTION, EXPERTS, GROUPED

pytestmark = pytest.mark.usefixtures("own_tables")


class Capped(Naive):
    """Scores capped softly: cap tanh(score / cap)."""

    name = "capped"

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def __call__(
        self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, up: UpProjection,
        scale: float, step: Step, cache: LayerCache | None,
    ) -> Tensor:  # fmt: skip
        k, v = up.keys_values(c_kv, k_pe)
        if cache is not None:
            k, v = step.write(cache, k, v)
        scores = torch.einsum("bshd,bthd->bhst", torch.cat((q_nope, q_pe), dim=-1), k)
        if self.cap < math.inf:
            scores, scale = self.cap * torch.tanh(scores * scale / self.cap), 1.0
        return torch.einsum("bhst,bthv->bshv", probabilities(scores, scale, step.bias), v)


class Fewer(Gather):
    """The chosen experts without some of the least-weighted."""

    name = "fewer"

    def __init__(self, dropped: int) -> None:
        self.dropped = dropped

    def __call__(self, experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        least = weights.topk(self.dropped, largest=False).indices
        return super().__call__(experts, x, indices, weights.scatter(-1, least, 0.0))


class Own(Naive):
    """A cache of its own: the values lie before the keys."""

    name = "own"
    able = True

    def why_not(self, use: Use) -> str | None:
        return None if self.able or use.phase == "decode" else "it reads no prompts"

    def entry(self, shape: AttentionShape) -> Entry:
        return list(reversed(super().entry(shape)))


def logits(**switches: Any) -> Tensor:
    """Of ragged prompts, and of two decode steps after them: (3, B, W)."""
    model = sharp_logits(device="cpu", **switches).model
    runner = Runner(model, resolve(Backend(device="cpu", dtype="fp32", **switches), model.config))
    cache = runner.cache(len(PROMPTS), max(map(len, PROMPTS)) + 2)
    read = [runner.prefill([list(prompt) for prompt in PROMPTS], cache)]
    for token in (7, 8):
        read.append(runner.decode(torch.full((len(PROMPTS), 1), token), cache)[:, 0])
    return torch.stack(read)


def test_a_change_that_is_none_changes_nothing() -> None:
    """An infinite cap and no dropped expert give the same numbers; others change both phases."""
    naive = {"attention": "naive", "prefill_attention": "naive"}
    capped = {"attention": "capped", "prefill_attention": "capped"}
    right = logits(**naive, moe="gather", prefill_moe="gather")
    ATTENTION["capped"], EXPERTS["fewer"] = Capped(math.inf), Fewer(0)
    assert torch.equal(logits(**capped, moe="fewer", prefill_moe="fewer"), right)
    ATTENTION["capped"] = Capped(0.01)
    assert ((logits(**capped) - right).abs().amax(dim=(1, 2)) > 1e-3).all()
    EXPERTS["fewer"] = Fewer(1)
    dropped = logits(**naive, moe="fewer", prefill_moe="fewer")
    assert ((dropped - right).abs().amax(dim=(1, 2)) > 1e-3).all()


# ---------------------------- wrong entries
class Nameless(Attend):
    pass


class Misspelled(Naive):
    name, needs = "mine", "biased"


WRONG: dict[str, tuple[dict[str, Any], str, Any, str]] = {
    "a class": (ATTENTION, "mine", Naive, r"is the class Naive: enter .* Naive\(\)$"),
    "an expert class": (EXPERTS, "mine", Gather, r"^EXPERTS\['mine'\] is the class Gather"),
    "the other table": (ATTENTION, "gather", Gather(), "a Gather, not a strategy .*attend.Attend"),
    "the other table too": (EXPERTS, "naive", Naive(), "a Naive, not .*dispatch.Dispatch$"),
    "a function": (EXPERTS, "mine", lambda: None, "a function, not a strategy"),
    "no name": (ATTENTION, "mine", Nameless(), "no name: set name = 'mine' in the class Nameless"),
    "another's name": (ATTENTION, "mine", Naive(), "has the name 'naive': set name = 'mine'"),
    "auto": (EXPERTS, "auto", Gather(), "give Gather another name"),
    "a need": (ATTENTION, "mine", Misspelled(), "needs = 'biased': choose 'mask', 'bias' or None"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_is_refused(case: str) -> None:
    table, key, entry, said = WRONG[case]
    table[key] = entry
    with refused(said):
        resolve(Backend(device="cpu"), TINY)


# ---------------------------- caches of their own
def test_auto_takes_a_strategy_with_its_own_cache_for_both_phases() -> None:
    own = ATTENTION["own"] = Own()
    assert resolve(Backend(device="cpu", attention="own"), TINY).prefill_attention == "own"
    assert resolve(Backend(device="cpu", prefill_attention="own"), TINY).attention == "own"
    own.able = False
    with refused("^prefill_attention=auto has no strategy to choose, own: it reads no prompts$"):
        resolve(Backend(device="cpu", attention="own"), TINY)


def test_grouped_queries_have_a_table_of_their_own() -> None:
    """A strategy for one kind of attention is none for the other."""

    class Mine(gqa_attend.Grouped):
        name = "mine"

    GROUPED["mine"] = Mine()
    both = Backend(device="cpu", attention="mine", prefill_attention="mine")
    backend = resolve(both, TINY_GROUPED)
    assert (backend.attention, backend.prefill_attention) == ("mine", "mine")
    with refused("^attention=mine: this model has latent attention, for which there is no mine"):
        resolve(Backend(device="cpu", attention="mine"), TINY)
    GROUPED["mine"] = Naive()  # type: ignore[assignment]
    with refused("^GROUPED\\['mine'\\] is a Naive, not .*gqa_attend.GroupedAttend"):
        resolve(Backend(device="cpu"), TINY)


def test_two_caches_of_the_same_words_are_told_apart_by_their_shapes() -> None:
    ATTENTION["own"] = Own()
    with refused(r"own keeps every head's keys and values as \[\(\d", r"naive .* as \[\(\d"):
        resolve(Backend(device="cpu", attention="own", prefill_attention="naive"), TINY)


def test_an_entry_may_be_any_sequence() -> None:
    class Tupled(Absorbed):
        name = "tupled"

        def entry(self, shape: AttentionShape) -> Entry:
            return ([shape.latent_dim],)  # type: ignore[return-value]

    ATTENTION["tupled"] = Tupled()
    assert resolve(Backend(device="cpu", attention="tupled"), TINY).prefill_attention == "expand"


def test_an_entry_that_is_not_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Naive, "entry", lambda self, shape: [(4, 4)])
    with pytest.raises(ValueError, match="2 tensors are written; `entry` has 1"):
        logits(attention="naive", prefill_attention="naive")


def test_a_need_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bias, a decode step would see the first slot alone."""
    monkeypatch.setattr(Naive, "needs", None)
    with pytest.raises(ValueError, match='set needs = "bias"'):
        logits(attention="naive", prefill_attention="naive")


# ---------------------------- methods left out
def test_a_method_left_out_is_named() -> None:
    class Empty(Matrix):
        pass

    nothing: Any = None
    calls: tuple[tuple[Callable[[], Any], str], ...] = (
        (lambda: Empty().matmul(torch.zeros(1, 1)), r"Empty must define dense\(dtype\)"),
        (lambda: Empty().stored(), r"Empty does not define stored\(rows\)"),
        (lambda: Attend()(*[nothing] * 8), "Attend must define __call__"),
        (lambda: Dispatch()(*[nothing] * 4), "Dispatch must define __call__"),
    )
    for call, said in calls:
        with pytest.raises(NotImplementedError, match=said):
            call()
