"""Speculation: a drafter drafts k tokens, one step of the model judges all of them.

The drafter is the MTP layer (V3 paper, sections 2.2 and 5.4.3), which the diagram shows, or a small
model (draft_model.py). A decode step reads about the same weights for k + 1 tokens as for one, so
tokens that are guessed right are nearly free. One turn, for a row whose cache holds L tokens; t is
the last chosen token, k = 2, and d_2 will be rejected:

    position       ...  L-1    L      L+1    L+2
    model reads                t      d_1    d_2   one decode step of S = k + 1 tokens, in any case
    hidden states       h      h      h      h
    model gives                p_0    p_1    p_2   the distribution of the token after each
    judgement                  d_1 +  d_2 -        accepted: a = 1
    new tokens                 d_1    n      .     n is drawn from what p_1 leaves; L grows by a + 1
    drafter reads              h,d_1  h,n    .     the MTP layer, S = k + 1, at the same positions
    first draft                       d'_1         the next turn's, from the place of n
    second draft                             d'_2  from the MTP layer's own output, k - 1 times

Two rules make it right:

- *Each row keeps the accepted tokens by its length alone.* Rejected ones stay after the length in
  every layer's cache, and the next tokens overwrite them. The drafter's entry i is made of the
  model's hidden state at i and the token at i + 1, and stands at position i. (V3's reference counts
  from i + 1. Rotation sees only distances, so that is the same layer.) Entries made of the
  drafter's own output, or of a rejected token, are made again in the next turn, from true hidden
  states.
- *Judging changes no distribution* (Leviathan et al., arXiv 2211.17192, section 2.3). A draft d was
  drawn from q; the model gives p. It is accepted with probability min(1, p(d) / q(d)). The first
  rejected one is replaced by a draw from max(p - q, 0), normed. If all are accepted, one more token
  is drawn from p itself. So each token is distributed as p, whatever the drafter is worth. p and q
  are *after* temperature and nucleus. In greedy decoding both have all weight on one token: a draft
  is accepted where it is the model's own choice.

How exact is it? The rule adds no error, but a step of k + 1 tokens may sum in another order than a
step of one. In fp32 logits differ by some 1e-6, so greedy text is the same unless two tokens are as
close as that. In bf16 they differ in the third digit, and text may part at near ties, as it does
between batch sizes or kernels. Each such text is as right as the other.

No value is read on the host: the number of accepted drafts is a tensor, so a turn can be captured
as a CUDA graph. Random numbers are drawn outside the graph; inside, a replay would reuse them.

Shapes: B rows of the cache, k drafts, W vocab_size, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from r1.model.cache import Cache
from r1.run.drafter import Drafter, Judged
from r1.run.runner import Runner
from r1.run.sampler import Sampler, draw


def speculate(
    drafter: Drafter,
    prompts: list[list[int]],
    sampler: Sampler,
    cache: Cache,
    depth: int = 0,
    assumed: float | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Continue `prompts` without end; yields int64 (prompts, k + 2) and fp32 (prompts, k + 1).

    The first are k + 1 tokens, and how many drafts were accepted: the first `accepted + 1` tokens
    are new. The second are the new tokens' scores, see sampler.py; 0 for the others. Both are on
    the device. The first yield is the prompt's, with one token. A row that fills the cache stays at
    its end, and its tokens are meaningless from there on. `assumed`: see Turn.
    """
    runner = drafter.runner
    turn = Turn(drafter, sampler, assumed)
    hidden = runner.read(prompts, cache, depth, drafter.along)  # (prompts, D)
    with runner.context():
        token, score = sampler(runner.lm_head(hidden, "prefill").float())  # (prompts,)
    yield F.pad(token[:, None], (0, drafter.count + 1)), F.pad(score[:, None], (0, drafter.count))
    tokens, q = turn.begin(prompts, hidden, token, cache)
    for other in [key for key in cache.graphs if key[0] == "turn" and key != turn.key]:
        del cache.graphs[other]  # of another distribution: there may be as many as questions
    while True:
        inputs = (tokens, q, *turn.random(cache))
        following, accepted, scores, tokens, q = runner.call(turn.key, turn, inputs, cache)
        new = torch.cat((following, accepted[:, None]), dim=1)
        yield new[: len(prompts)], scores[: len(prompts)]


@dataclass(frozen=True)
class Turn:
    """One turn as the diagram shows it: verify, judge, draft."""

    drafter: Drafter
    sampler: Sampler
    assumed: float | None = None
    """Accept drafts with this probability whatever the model says, to measure speed on weights that
    draft badly. The text is then meaningless."""

    @property
    def runner(self) -> Runner:
        return self.drafter.runner

    @property
    def key(self) -> tuple[object, ...]:
        """Tells captured turns on one cache apart."""
        return ("turn", self.sampler.temperature, self.sampler.top_p, self.assumed)

    def __call__(
        self, tokens: Tensor, q: Tensor, uniform: Tensor, exponential: Tensor, cache: Cache
    ) -> tuple[Tensor, ...]:
        """Read each row's last token and its drafts, int64 (B, k + 1), drawn from q (B, k, W).

        Returns `following` (B, k + 1), of which the first `accepted` + 1 are new, `accepted` (B,),
        the best logits where those were chosen (B, k + 1), and the next turn's tokens and q.
        """
        step = self.runner.next_step(cache, tokens.shape[1])
        blocks = self.runner.blocks["decode"]
        hidden = self.runner.model(tokens, step, cache.layers, blocks)  # (B, k + 1, D)
        logits = self.runner.lm_head(hidden).float()  # (B, k + 1, W)
        p = self.sampler.probabilities(logits)
        accepted, rest = judge(p, q, tokens[:, 1:], uniform, self.assumed)
        token = draw(rest, exponential[:, -1])[:, None]  # (B, 1)
        drafts = torch.cat((tokens[:, 1:], token), dim=1)  # (B, k + 1)
        following = drafts.scatter(1, accepted[:, None], token)
        unused = torch.arange(tokens.shape[1], device=tokens.device) > accepted[:, None]
        scores = logits.amax(dim=-1).masked_fill(unused, 0.0)  # (B, k + 1)
        # A row that has all its tokens goes on with the others: it must not leave the cache.
        most = cache.capacity - tokens.shape[1]
        cache.lengths.copy_((cache.lengths + accepted + 1).clamp(max=most))
        judged = Judged(tokens, hidden, following, accepted, step)
        drafts, q = self.draft(judged, cache, exponential)
        return following, accepted, scores, torch.cat((token, drafts), dim=1), q

    def draft(self, judged: Judged, cache: Cache, exponential: Tensor) -> tuple[Tensor, Tensor]:
        """The drafter reads what was judged. `cache` has its new lengths.

        Returns drafts (B, k) and the distributions that they were drawn from (B, k, W).
        """
        state = self.drafter.first(judged, cache)  # (B, 1, ...)
        drafts: list[Tensor] = []
        distributions: list[Tensor] = []
        for number in range(self.drafter.count):
            if number:
                state = self.drafter.again(drafts[-1], state, number, cache)
            logits = self.drafter.logits(state)
            distributions.append(self.sampler.probabilities(logits))  # (B, 1, W)
            drafts.append(draw(distributions[-1], exponential[:, number, None]))  # (B, 1)
        return torch.cat(drafts, dim=1), torch.cat(distributions, dim=1)

    def begin(
        self, prompts: list[list[int]], hidden: Tensor, token: Tensor, cache: Cache
    ) -> tuple[Tensor, Tensor]:
        """The first drafts, from each prompt's last hidden state (B, D) and its next token (B,).

        Rows that the cache has beyond the prompts (for a CUDA graph) run along.
        """
        count = self.drafter.count
        more, unknown = (0, cache.rows - len(token)), (0, count)
        token = F.pad(token, more)[:, None]  # (B, 1)
        with self.runner.context():
            offsets = torch.arange(count + 1, device=token.device)
            positions = (cache.lengths - 1).clamp(min=0)[:, None] + offsets  # (B, k + 1)
            step = self.runner.model.step("decode", positions, cache.capacity)
            read = torch.tensor([prompt[-1:] for prompt in prompts], device=token.device)  # (B, 1)
            judged = Judged(
                F.pad(read, (*unknown, *more)),  # (B, k + 1)
                F.pad(hidden[:, None], (0, 0, *unknown, *more)),  # (B, k + 1, D)
                F.pad(token, unknown),  # (B, k + 1)
                torch.zeros_like(cache.lengths),
                step,
            )
            _, exponential = self.random(cache)
            drafts, q = self.draft(judged, cache, exponential)
        return torch.cat((token, drafts), dim=1), q

    def random(self, cache: Cache) -> tuple[Tensor, Tensor]:
        """A turn's random numbers: uniform in [0, 1), (B, k), and Exp(1), (B, k + 1, W).

        The first judge, the second draw. When greedy: zeros (B, k) and ones (B, k + 1, 1), so draws
        become argmax.
        """
        device, k = cache.lengths.device, self.drafter.count
        fp32 = partial(torch.ones, dtype=torch.float32, device=device)
        with torch.inference_mode():
            uniform, exponential = fp32(cache.rows, k).zero_(), fp32(cache.rows, k + 1, 1)
            if self.sampler.temperature or self.assumed is not None:
                uniform.uniform_(generator=self.sampler.generator(device))
            if self.sampler.temperature:
                exponential = exponential.repeat(1, 1, self.runner.config.vocab_size)
                exponential.exponential_(generator=self.sampler.generator(device))
        return uniform, exponential


def judge(
    p: Tensor, q: Tensor, drafts: Tensor, uniform: Tensor, assumed: float | None = None
) -> tuple[Tensor, Tensor]:
    """The acceptance rule: the model's p (B, k + 1, W), the drafter's q (B, k, W), drafts (B, k).

    Returns how many drafts are accepted before the first rejected one, int64 (B,), and weights
    (B, W), not normed, to draw the token after them from.
    """
    p_draft, q_draft = (
        each.gather(2, drafts[..., None]).squeeze(2)  # (B, k)
        for each in (p[:, :-1], q)
    )
    agree = uniform * q_draft < p_draft if assumed is None else uniform < assumed
    accepted = agree.long().cumprod(dim=1).sum(dim=1)
    row = torch.arange(len(p), device=p.device)
    q = F.pad(q, (0, 0, 0, 1))  # after the last draft nothing was drafted
    p, q = p[row, accepted], q[row, accepted]  # (B, W)
    rest = (p - q).clamp(min=0)
    # Nothing is left only where p and q are equal, and a draft was rejected by rounding (or by an
    # assumed probability).
    return accepted, torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)
