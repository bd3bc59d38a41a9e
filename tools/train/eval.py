"""Examine tiny-r1 on held-out problems, under any switches: accuracy, perplexity, the experts'
load, the MTP layer's foresight.

    # 1000 problems, with thinking and without
    python tools/train/eval.py
    python tools/train/eval.py -n 200 --dtype bf16 --compile -o bf16.json

Every figure is of problems that training never saw (tools/train/tasks.py). Answers are greedy. Exit
status: 0, or 2 for input that can't be used.

Shapes: B rows, S tokens, K experts per token, E experts.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs from a checkout, without installing r1
sys.path.insert(0, str(Path(__file__).parent))

from packing import encode
from tasks import TESTED, Example, Problem, exam, kinds, phrased

import r1
from r1 import Backend, Engine, InputError
from r1.__main__ import EMBEDDED
from r1.bench.exam import right
from r1.model.router import Router
from r1.run.generate import Completion
from r1.switches import flags

Pair = tuple[list[int], list[int]]
"""A prompt, and what stands behind it."""
NEW_TOKENS = 320
"""Longer than any reasoning and answer that the problems ask for."""


@dataclass
class Reading:
    """What the model makes of whole texts that it is given."""

    nats: float = 0.0
    tokens: int = 0
    """The loss, summed over the tokens that the model would have to write."""
    agreed: int = 0
    drafts: int = 0
    """How often the MTP layer's first choice was the model's own, one token later; the acceptance
    of greedy drafts."""
    loads: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Tokens that each expert was given, (layers, E); the MTP layer last."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / max(1, self.tokens))


def answers(
    engine: Engine, examples: Sequence[Example], *, think: bool, batch: int
) -> tuple[list[Pair], list[Completion]]:
    """Each question's prompt and what the model writes behind it; how it went."""
    assert engine.tokenizer is not None
    prompts = [encode(engine.tokenizer, example, think)[0] for example in examples]
    completions: list[Completion] = []
    for start in range(0, len(prompts), batch):
        completions += engine.generate(
            prompts[start : start + batch], max_new_tokens=NEW_TOKENS, temperature=0.0
        )
    return [
        (prompt, done.tokens) for prompt, done in zip(prompts, completions, strict=True)
    ], completions


def speculation(completions: Sequence[Completion]) -> dict[str, float] | None:
    """How drafts fared in all answers together; None where none were made."""
    drafted, steps = (
        sum(getattr(done, name) for done in completions) for name in ("drafted", "steps")
    )
    if not drafted:
        return None
    return {
        "acceptance": sum(done.accepted for done in completions) / drafted,
        "tokens_per_step": sum(len(done.tokens) - 1 for done in completions) / steps,
    }


@torch.inference_mode()
def read(engine: Engine, pairs: Sequence[Pair], batch: int) -> Reading:
    """Read prompts and what stands behind them, without a cache."""
    model, device = engine.model, engine.runner.device
    reading = Reading()
    loads: dict[nn.Module, Tensor] = {}
    real = torch.zeros(0)

    def count(router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        chosen = (
            F.one_hot(output[0], model.config.experts.n_routed_experts)
            * real.flatten()[:, None, None]
        )  # (B S, K, E)
        loads[router] = loads.get(router, 0) + chosen.sum(dim=(0, 1))

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, Router)
    ]
    try:
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            longest = max(len(prompt) + len(rest) for prompt, rest in part)
            tokens = torch.zeros(len(part), longest, dtype=torch.int64)
            real, learned = torch.zeros(2, len(part), longest, dtype=torch.bool).unbind()
            for row, (prompt, rest) in enumerate(part):
                end = len(prompt) + len(rest)
                tokens[row, :end] = torch.tensor(prompt + rest)
                real[row, :end] = True
                learned[row, len(prompt) : end] = True
            tokens, real, learned = tokens.to(device), real.to(device), learned.to(device)
            with engine.runner.context():
                positions = torch.arange(longest, device=device).expand_as(tokens)
                step = model.step("prefill", positions, 0)
                hidden = model(tokens, step)
                logits = model.lm_head(hidden).float()  # (B, S, W)
                nats = F.cross_entropy(
                    logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
                )
                reading.nats += float(nats[learned[:, 1:]].sum())
                reading.tokens += int(learned.sum())
                if len(model.mtp):
                    following = F.pad(tokens[:, 1:], (0, 1))
                    draft = model.lm_head(
                        model.mtp[0](model.embed_tokens(following), hidden, step)
                    ).argmax(dim=-1)
                    # From place i the draft is of i + 2; the model's own choice for i + 2 is made
                    # at i + 1.
                    same = draft[:, :-2] == logits[:, 1:-1].argmax(dim=-1)
                    reading.agreed += int((same & learned[:, 2:]).sum())
                    reading.drafts += int(learned[:, 2:].sum())
    finally:
        for hook in hooks:
            hook.remove()
    reading.loads = torch.stack(list(loads.values())).float().cpu() if loads else reading.loads
    return reading


def accuracy(
    engine: Engine, problems: Sequence[Problem], pairs: Sequence[Pair], think: bool
) -> dict[str, float]:
    """The share of right answers, of all problems and of each kind."""
    found: dict[str, list[bool]] = {"all": []}
    for problem, (_, written) in zip(problems, pairs, strict=True):
        for kind in ("all", problem.kind):
            found.setdefault(kind, []).append(right(engine, written, problem.answer, think))
    return {kind: sum(verdicts) / len(verdicts) for kind, verdicts in found.items()}


def examine(
    engine: Engine,
    count: int = 1000,
    *,
    seed: int = 0,
    kinds: Sequence[str] = TESTED,
    batch: int = 250,
) -> dict[str, Any]:
    """All figures, ready for JSON; those of the MTP layer only where `engine` has it loaded."""
    if engine.tokenizer is None:
        raise InputError("this checkpoint has no tokenizer, so it can't be asked anything")
    problems = exam(count, seed, kinds)
    examples = phrased(problems, seed)
    thought, completions = answers(engine, examples, think=True, batch=batch)
    direct, _ = answers(engine, examples, think=False, batch=batch)
    taught = read(engine, [encode(engine.tokenizer, example) for example in examples], batch)
    own = read(engine, thought, batch)
    relative = taught.loads / taught.loads.mean(dim=-1, keepdim=True)
    return {
        "problems": count,
        "seed": seed,
        "backend": dataclasses.asdict(engine.backend),
        "accuracy": accuracy(engine, problems, thought, True),
        "accuracy_without_thinking": accuracy(engine, problems, direct, False),
        "perplexity": taught.perplexity,
        "mtp_agreement": own.agreed / own.drafts if own.drafts else None,
        "tokens_per_answer": sum(len(written) for _, written in thought) / count,
        "text": hashlib.sha256(json.dumps([thought, direct]).encode()).hexdigest(),
        "speculation": speculation(completions),
        "load": [
            {"max": float(layer.max()), "min": float(layer.min()),
            "dead": int((layer == 0).sum())} for layer in relative
        ],
    }  # fmt: skip


def report(figures: dict[str, Any]) -> str:
    """The figures as text."""
    lines = []
    for name, key in (("with thinking", "accuracy"), ("without", "accuracy_without_thinking")):
        each = "  ".join(f"{kind} {share:.1%}" for kind, share in figures[key].items())
        lines.append(f"accuracy, {name:13s}  {each}")
    lines.append(f"perplexity               {figures['perplexity']:.4f} a token")
    if figures["mtp_agreement"] is not None:
        lines.append(f"MTP agreement at k = 1   {figures['mtp_agreement']:.1%}")
    if drafts := figures["speculation"]:
        per_step = drafts["tokens_per_step"]
        lines.append(
            f"speculation              {drafts['acceptance']:.1%} accepted, {per_step:.2f} tokens a step"
        )
    lines.append(f"tokens per answer        {figures['tokens_per_answer']:.0f}")
    lines.append(
        f"text                     {figures['text'][:16]} (the same wherever every token is)"
    )
    for number, layer in enumerate(figures["load"]):
        lines.append(
            f"experts, MoE layer {number}     {layer['min']:.2f} to {layer['max']:.2f} of the mean, {layer['dead']} dead"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model",
        type=Path,
        default=EMBEDDED,
        metavar="DIR",
        help="a checkpoint's folder (default: tiny-r1)",
    )
    parser.add_argument("-n", type=int, default=1000, help="problems (default 1000)")
    parser.add_argument(
        "--kinds", type=kinds, default=list(TESTED), help=f"default {','.join(TESTED)}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the problems and their phrasings")
    parser.add_argument(
        "--batch", type=int, default=250, help="problems asked at a time (default 250)"
    )
    parser.add_argument("-o", type=Path, metavar="FILE", help="write the figures as JSON")
    flags.add_flags(parser)
    arguments = parser.parse_args(argv)
    try:
        if arguments.n < 1 or arguments.batch < 1:
            raise InputError(f"-n {arguments.n} --batch {arguments.batch}: give at least 1 of each")
        config = r1.load_config(arguments.model)
        backend = Backend(**flags.given(arguments))
        mtp = config.num_nextn_predict_layers > 0
        engine = r1.load(arguments.model, backend, batch=min(arguments.n, arguments.batch), mtp=mtp)
        figures = examine(
            engine, arguments.n, seed=arguments.seed, kinds=arguments.kinds, batch=arguments.batch
        )
    except InputError as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2
    print(report(figures))
    if arguments.o:
        arguments.o.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
