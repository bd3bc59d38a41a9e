"""MTP self-speculation: the MTP layer drafts k tokens, one step of the model judges them all (V3
paper, sections 2.2, 5.4.3).

A decode step reads the same weights for k + 1 tokens as for one, or few more, so tokens that were
guessed right are nearly free. One turn, for a row whose cache holds L tokens; t is the token that
was chosen last, k = 2, and d_2 will be refused:

    position          ...  L-1    L      L+1    L+2
    model reads                   t      d_1    d_2     one decode step of S = k + 1 tokens, also where all are refused
    hidden states          h      h      h      h
    model says                    p_0    p_1    p_2     distributions of the token behind each
    judged                        d_1 +  d_2 -          accepted: a = 1
    follows                       d_1    n      .       n is drawn from what p_1 leaves: a + 1 = 2 new tokens. L grows by 2
    drafter reads                 h,d_1  h,n    .       the MTP layer, S = k + 1, at the same positions
    drafter says                         d'_1           from where n came in: the next turn's first draft
    again                                       d'_2    the MTP layer's output is its next hidden state, S = 1: k - 1 times

Two rules make it right:

- *Each row keeps what was accepted, by its length alone.* What was refused stays behind the length in every layer's cache
  and is overwritten by the tokens that come to stand there. The drafter's entry i is made of the model's hidden state at i
  and the token at i + 1, and stands at position i. (V3's reference counts from i + 1; rope sees only distances, so that is
  the same layer.) Entries that were made of the drafter's own output, or of a refused token, are made anew from true
  hidden states in the next turn, which starts at the first of them.
- *Judging changes no distribution* (Leviathan et al., arXiv 2211.17192, section 2.3). A draft d was drawn from q; the model
  says p. It is accepted with probability min(1, p(d) / q(d)); the first that is refused is replaced by a draw from
  max(p - q, 0), normed, and behind the last a token is drawn from p itself. So each token is distributed by p, whatever
  the drafter is worth. p and q are *after* temperature and nucleus. Greedy is the case where both have all on one token:
  a draft is accepted where it is the model's own choice.

How exact is that? The rule adds nothing, but a step of k + 1 tokens may sum in another order than
one of a single token. In fp32 the logits differ by some 1e-6, so greedy text is the same unless two
tokens are as close as that. In bf16 they differ in the third digit: text may part at near ties, as
it does between batch sizes or kernels, and each is as right as the other.

No value is read on the host: how many drafts a row accepts is a tensor, so a turn can be captured
as a CUDA graph. Its random numbers are drawn outside of that, which is all the capture would not
repeat.

Shapes: B rows of the cache, k drafts, W vocab_size, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.model.cache import Cache
from r1.model.transformer import Step
from r1.run.runner import Runner
from r1.run.sampler import Sampler, draw


def launch(
    runner: Runner,
    prompts: list[list[int]],
    sampler: Sampler,
    cache: Cache,
    depth: int = 0,
    assumed: float | None = None,
) -> Iterator[Tensor]:
    """Continue `prompts` without end; yields int64 (prompts, k + 2) on the device: tokens, and how
    many drafts were accepted.

    The first `accepted + 1` tokens of a row are new. The first turn is the prompt's, and gives one
    token. A row that fills the cache stays at its end, and what it gives there means nothing.
    `assumed`: see Turn."""
    rows = len(prompts)
    turn = Turn(runner, sampler, assumed)
    hidden = runner.read(prompts, cache, depth)  # (prompts, D)
    with runner.context():
        token = sampler(runner.model.lm_head(hidden).float())  # (prompts,)
    yield F.pad(token[:, None], (0, runner.drafts + 1))
    tokens, q = turn.begin(hidden, token, cache)
    for other in [key for key in cache.graphs if key[0] == "turn" and key != turn.key]:
        del cache.graphs[
            other
        ]  # of another distribution: there may be as many as there are questions
    while True:
        inputs = (tokens, q, *turn.chance(cache))
        following, accepted, tokens, q = runner.call(
            turn.key, turn, inputs, cache, runner.backend.cuda_graphs
        )
        yield torch.cat((following, accepted[:, None]), dim=1)[:rows]


@dataclass(frozen=True)
class Turn:
    """One turn as the diagram has it: verify, judge, draft."""

    runner: Runner
    sampler: Sampler
    assumed: float | None = None
    """Accept drafts with this probability, whatever the model says: to measure speed on weights
    whose drafts are worth nothing. The text is then worth nothing either."""

    @property
    def key(self) -> tuple[object, ...]:
        """What tells captured turns on one cache apart."""
        return ("turn", self.sampler.temperature, self.sampler.top_p, self.assumed)

    def __call__(
        self, tokens: Tensor, q: Tensor, coins: Tensor, races: Tensor, cache: Cache
    ) -> tuple[Tensor, ...]:
        """Read a row's last token and its drafts, int64 (B, k + 1), which were drawn from q, fp32
        (B, k, W).

        Returns `following` (B, k + 1), of which the first `accepted` + 1 (B,) are new; and the next
        turn's tokens and q."""
        step = self.runner.behind(cache, tokens.shape[1])
        hidden = self.runner.model(
            tokens, step, cache.layers, self.runner.blocks["decode"]
        )  # (B, k + 1, D)
        p = self.sampler.probabilities(self.runner.lm_head(hidden).float())  # (B, k + 1, W)
        accepted, rest = judge(p, q, tokens[:, 1:], coins, self.assumed)
        token = draw(rest, races[:, -1])[:, None]  # (B, 1)
        following = torch.cat((tokens[:, 1:], token), dim=1).scatter(1, accepted[:, None], token)
        # A row that has its tokens goes on with the others: it must not leave the cache.
        cache.lengths.copy_(
            (cache.lengths + accepted + 1).clamp(max=cache.capacity - tokens.shape[1])
        )
        drafts, q = self.draft(hidden, following, accepted, step, cache, races)
        return following, accepted, torch.cat((token, drafts), dim=1), q

    def draft(
        self,
        hidden: Tensor,
        following: Tensor,
        last: Tensor,
        step: Step,
        cache: Cache,
        races: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The drafter reads hidden states (B, k + 1, D), each with the token following it, up to
        the `last` (B,) true one.

        Returns drafts (B, k) and the distributions (B, k, W) that they were drawn from. `cache` has
        its new lengths."""
        x = self.runner.foresee(following, hidden, step, cache.layers)  # (B, k + 1, D)
        x = x.gather(1, last[:, None, None].expand(-1, 1, x.shape[2]))  # (B, 1, D)
        drafts: list[Tensor] = []
        distributions: list[Tensor] = []
        for number in range(self.runner.drafts):
            if number:
                positions = cache.lengths[:, None] + number - 1  # (B, 1)
                again = self.runner.step(positions, cache)
                x = self.runner.foresee(drafts[-1], x, again, cache.layers)
            distributions.append(
                self.sampler.probabilities(self.runner.lm_head(x).float())
            )  # (B, 1, W)
            drafts.append(draw(distributions[-1], races[:, number, None]))  # (B, 1)
        return torch.cat(drafts, dim=1), torch.cat(distributions, dim=1)

    def begin(self, hidden: Tensor, token: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """The first drafts, from each prompt's last hidden state (B, D) and the token (B,) behind
        it: as if a turn had been.

        Rows that the cache has beyond the prompts (for a CUDA graph) run along.
        """
        more = (0, cache.rows - len(token))
        token = F.pad(token, more)[:, None]  # (B, 1)
        unknown = (0, self.runner.drafts)
        with self.runner.context():
            positions = (cache.lengths - 1).clamp(min=0)[:, None] + torch.arange(
                self.runner.drafts + 1, device=token.device
            )
            step = self.runner.step(positions, cache)
            states, following = (
                F.pad(hidden[:, None], (0, 0, *unknown, *more)),
                F.pad(token, unknown),
            )  # (B, k + 1, ...)
            _, races = self.chance(cache)
            drafts, q = self.draft(
                states, following, torch.zeros_like(cache.lengths), step, cache, races
            )
        return torch.cat((token, drafts), dim=1), q

    def chance(self, cache: Cache) -> tuple[Tensor, Tensor]:
        """A turn's random numbers: coins in [0, 1), (B, k), for judging, and Exp(1) for draws: (B,
        k + 1, W).

        Greedy draws leave nothing to chance: (B, k + 1, 1) of ones, and coins of 0.
        """
        device, k = cache.lengths.device, self.runner.drafts
        with torch.inference_mode():
            coins, races = (
                torch.zeros(cache.rows, k, device=device),
                torch.ones(cache.rows, k + 1, 1, device=device),
            )
            if self.sampler.temperature or self.assumed is not None:
                coins.uniform_(generator=self.sampler.generator(device))
            if self.sampler.temperature:
                races = races.repeat(1, 1, self.runner.config.vocab_size)
                races.exponential_(generator=self.sampler.generator(device))
        return coins, races


def judge(
    p: Tensor, q: Tensor, drafts: Tensor, coins: Tensor, assumed: float | None = None
) -> tuple[Tensor, Tensor]:
    """The acceptance rule. The model's p (B, k + 1, W), the drafter's q (B, k, W), drafts and coins
    (B, k).

    Returns how many drafts are accepted before the first that isn't, int64 (B,), and weights (B,
    W), not normed, to draw the token that follows those from."""
    said, offered = (
        each.gather(2, drafts[..., None]).squeeze(2) for each in (p[:, :-1], q)
    )  # (B, k)
    agree = coins * offered < said if assumed is None else coins < assumed
    accepted = agree.long().cumprod(dim=1).sum(dim=1)
    row = torch.arange(len(p), device=p.device)
    p, q = (
        p[row, accepted],
        F.pad(q, (0, 0, 0, 1))[row, accepted],
    )  # (B, W); behind the last draft nothing was offered
    rest = (p - q).clamp(min=0)
    # Nothing is left only where p and q are equal, and a draft was refused by rounding (or by an
    # assumed coin).
    return accepted, torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)
