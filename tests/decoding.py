"""How tests read ragged prompts and decode a text step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from r1.run.runner import Runner

PROMPTS = [[5, 9, 200, 7], [11, 3], [40, 41, 42, 43, 44, 45, 46]]
STEPS = 6


def read(run: Runner, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prefill the ragged prompts and decode `text` (P, B), as many tokens at a time as a step of
    `run` has; or what is likeliest. Returns the text and the logits (P + 1, B, W).
    """
    cache = run.cache(len(PROMPTS), 64)
    logits, chosen = [run.prefill(PROMPTS, cache).clone()], []
    if text is None:
        for _ in range(STEPS):
            chosen.append(logits[-1].argmax(dim=-1))
            logits.append(run.decode(chosen[-1][:, None], cache)[:, -1].clone())
        return torch.stack(chosen), torch.stack(logits)
    for tokens in text.split(run.backend.step_tokens):
        logits += run.decode(tokens.T.contiguous(), cache).clone().unbind(1)
    return text, torch.stack(logits)
