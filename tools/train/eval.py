"""Examine a trained tiny-r1 on held-out problems, under any switches.

    # 1000 problems, with thinking and without
    python tools/train/eval.py
    python tools/train/eval.py -n 200 --dtype bf16 --compile -o bf16.json

It reports accuracy, perplexity, the experts' load, and how often the MTP layer predicts the model's
own token. Training never saw these problems (tools/train/tasks.py). Answers are greedy.

Shapes: B rows, S tokens, K experts per token, E experts, W vocab_size.
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

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
from packing import encode
from tasks import TESTED, Example, Problem, add_kinds, exam, phrased

import r1
from r1 import Backend, Engine, InputError
from r1.__main__ import EMBEDDED
from r1.bench.exam import right
from r1.model.router import Router
from r1.run.completion import Completion
from r1.switches import flags

Pair = tuple[list[int], list[int]]
"""A prompt, and the tokens after it."""
NEW_TOKENS = 320
"""Longer than any reasoning and answer that the problems ask for."""


@dataclass
class Reading:
    """How well the model predicts whole texts that it is given."""

    nats: float = 0.0
    """The loss, summed over `tokens`."""
    tokens: int = 0
    """Tokens that the model would have to write: all but the prompts'."""
    agreed: int = 0
    """Drafts that are the model's own first choice. `agreed / drafts` is the acceptance of greedy
    drafts."""
    drafts: int = 0
    """First choices of the MTP layer: one for each of `tokens`."""
    loads: Tensor = field(default_factory=lambda: torch.zeros(0))
    """How many tokens each expert was given, (layers, E). The MTP layer is the last one."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / max(1, self.tokens))


def answers(
    engine: Engine, examples: Sequence[Example], *, think: bool, batch: int
) -> tuple[list[Pair], list[Completion]]:
    """Ask each question. Returns each prompt with its answer's tokens, and the completions."""
    assert engine.tokenizer is not None
    prompts = [encode(engine.tokenizer, example, think)[0] for example in examples]
    completions: list[Completion] = []
    for start in range(0, len(prompts), batch):
        completions += engine.generate(
            prompts[start : start + batch], max_new_tokens=NEW_TOKENS, temperature=0.0
        )
    written = [done.tokens for done in completions]
    return list(zip(prompts, written, strict=True)), completions


def speculation(completions: Sequence[Completion]) -> dict[str, float] | None:
    """The share of accepted drafts in all answers together; None without drafts."""
    drafted = sum(done.drafted for done in completions)
    if not drafted:
        return None
    steps = sum(done.steps for done in completions)
    return {
        "acceptance": sum(done.accepted for done in completions) / drafted,
        "tokens_per_step": sum(len(done.tokens) - 1 for done in completions) / steps,
    }


@torch.inference_mode()
def read(engine: Engine, pairs: Sequence[Pair], batch: int) -> Reading:
    """Read prompts and the tokens after them, without a cache."""
    reading = Reading()
    with ExpertLoads(engine) as loads:
        for start in range(0, len(pairs), batch):
            tokens, real, learned = padded(pairs[start : start + batch], engine.runner.device)
            loads.real = real
            with engine.runner.context():
                read_batch(engine, tokens, learned, reading)
    reading.loads = loads.stacked()
    return reading


def padded(pairs: Sequence[Pair], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of one length, (B, S) each: tokens, masks of real tokens and of those to be written."""
    longest = max(len(prompt) + len(rest) for prompt, rest in pairs)
    tokens = torch.zeros(len(pairs), longest, dtype=torch.int64)
    real, learned = torch.zeros(2, len(pairs), longest, dtype=torch.bool).unbind()
    for row, (prompt, rest) in enumerate(pairs):
        end = len(prompt) + len(rest)
        tokens[row, :end] = torch.tensor(prompt + rest)
        real[row, :end] = True
        learned[row, len(prompt) : end] = True
    return tokens.to(device), real.to(device), learned.to(device)


def read_batch(engine: Engine, tokens: Tensor, learned: Tensor, reading: Reading) -> None:
    """Add one batch to `reading`: the model's loss, and where the MTP layer agrees with it."""
    model = engine.model
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    step = model.step("prefill", positions, 0)
    hidden = model(tokens, step)
    logits = model.lm_head(hidden).float()  # (B, S, W)
    nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    reading.nats += float(nats[learned[:, 1:]].sum())
    reading.tokens += int(learned.sum())
    if not len(model.mtp):
        return
    following = F.pad(tokens[:, 1:], (0, 1))
    drafted = model.mtp[0](model.embed_tokens(following), hidden, step)
    draft = model.lm_head(drafted).argmax(dim=-1)  # (B, S)
    # The draft at i is of token i + 2. The model's own choice for i + 2 is made at i + 1.
    same = draft[:, :-2] == logits[:, 1:-1].argmax(dim=-1)
    reading.agreed += int((same & learned[:, 2:]).sum())
    reading.drafts += int(learned[:, 2:].sum())


class ExpertLoads:
    """Counts the tokens of each expert, by a hook on every router, for as long as it is open."""

    def __init__(self, engine: Engine) -> None:
        self.model = engine.model
        self.real = torch.zeros(0)
        """Which tokens of the batch are no padding, bool (B, S). Set it before each batch."""
        self.loads: dict[nn.Module, Tensor] = {}

    def __enter__(self) -> ExpertLoads:
        routers = [module for module in self.model.modules() if isinstance(module, Router)]
        self.hooks = [router.register_forward_hook(self.count) for router in routers]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def count(self, router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        chosen = F.one_hot(output[0], self.model.config.experts.n_routed_experts)  # (B S, K, E)
        load = (chosen * self.real.flatten()[:, None, None]).sum(dim=(0, 1))
        self.loads[router] = self.loads.get(router, 0) + load

    def stacked(self) -> Tensor:
        """fp32 (layers, E) on the CPU; empty for a model without experts."""
        return (
            torch.stack(list(self.loads.values())).float().cpu() if self.loads else torch.zeros(0)
        )


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
    """All figures, ready for JSON. Those of the MTP layer are there if `engine` has loaded it.

    Raises InputError for a checkpoint without a tokenizer.
    """
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
        accepted = f"{drafts['acceptance']:.1%} accepted"
        lines.append(
            f"speculation              {accepted}, {drafts['tokens_per_step']:.2f} tokens a step"
        )
    lines.append(f"tokens per answer        {figures['tokens_per_answer']:.0f}")
    lines.append(
        f"text                     {figures['text'][:16]} (the same wherever every token is)"
    )
    for number, layer in enumerate(figures["load"]):
        share = f"{layer['min']:.2f} to {layer['max']:.2f} of the mean"
        lines.append(f"experts, MoE layer {number}     {share}, {layer['dead']} dead")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for input that can't be used."""
    parser = shared.parser(__doc__)
    parser.add_argument(
        "--model",
        type=Path,
        default=EMBEDDED,
        metavar="DIR",
        help="a checkpoint's folder (default: the embedded tiny-r1)",
    )
    parser.add_argument("-n", type=int, default=1000, metavar="N", help="problems (default 1000)")
    add_kinds(parser, TESTED)
    parser.add_argument(
        "--seed", type=flags.seed, default=0, help="of the problems and their phrasings (default 0)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=250,
        metavar="N",
        help="problems answered together (default 250)",
    )
    shared.add_output(parser, "write the figures as JSON")
    flags.add_draft_model(parser)
    flags.add_flags(parser)
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    count, batch, directory = arguments.n, arguments.batch, arguments.model
    if count < 1 or batch < 1:
        raise InputError(f"-n {count} --batch {batch}: give at least 1 of each")
    shared.check_output(arguments.output)
    mtp = r1.load_config(directory).num_nextn_predict_layers > 0
    backend = Backend(**flags.given(arguments))
    rows, draft = min(count, batch), arguments.draft_model
    engine = r1.load(directory, backend, draft_model=draft, batch=rows, mtp=mtp)
    figures = examine(engine, count, seed=arguments.seed, kinds=arguments.kinds, batch=batch)
    print(report(figures))
    if arguments.output:
        record = {"model": directory.resolve().name, **figures}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
