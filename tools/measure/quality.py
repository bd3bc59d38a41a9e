"""Measure what quantizing costs tiny-r1: right answers, tokens per answer, KL and top-1.

    python tools/measure/quality.py -o tools/measure/results/quality/tiny-r1.json
    python tools/measure/quality.py -n 100 --arms fp8,int4-32-rtn

An arm is `fp32`, `fp8`, `int8` (as `--quant` makes them), or `int{bits}-{group}-{method}`, which
tools/quantize.py makes. All arms answer the same held-out problems, greedily, in fp32 arithmetic:
only the weights differ. KL and top-1 compare the next token's probabilities with those of the fp32
weights, at every token that the fp32 weights answer with. An arm that the output file has already
is not measured again.

Shapes: B rows, S tokens, M tokens of answers, W vocab_size.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
from eval import Pair, padded
from packing import encode
from quantizing import calibration, job
from quantizing.layer import METHODS
from quantizing.rounding import Grid
from quantizing.source import Source
from tasks import exam, phrased

import r1
from r1 import Backend, Engine, InputError
from r1.__main__ import EMBEDDED
from r1.bench.exam import right
from r1.model.layers import Linear
from r1.model.moe import EXPERT_MATRICES, Experts
from r1.reading import read_json
from r1.storage.dense import Dense
from r1.storage.quantized import Quantized
from r1.writing import new_file

PLAIN = Backend(device="cpu", dtype="fp32", join="off", quant="none")
GRIDS = ("4-128", "4-32", "3-128", "3-32", "2-32")
ARMS = ["fp32", "fp8", "int8", *(f"int{grid}-{each}" for grid in GRIDS for each in METHODS)]
SPELLED = re.compile(rf"int(2|3|4|8)-(\d{{1,4}})-({'|'.join(METHODS)})")
READ = 10
"""Answers that are read together. More are no faster on a CPU."""
SLACK = 64
"""An answer is cut off when it has so many tokens more than that of the fp32 weights."""
ROWS, LENGTH = 256, 512
"""The calibration: so many answers of tiny-r1's own, of at most so many tokens."""


@cache
def calibration_rows() -> list[list[int]]:
    questions = calibration.training_questions(EMBEDDED, ROWS, 0)
    return calibration.own_answers(EMBEDDED, PLAIN, questions or [], LENGTH, print)


def engine_of(arm: str, folder: Path) -> Engine:
    """The model with the weights of an arm, as plain fp32 numbers. `folder` is for its files."""
    found = SPELLED.fullmatch(arm)
    if not found:
        quant = "none" if arm == "fp32" else arm
        return unpacked(
            r1.load(EMBEDDED, Backend(device="cpu", dtype="fp32", join="off", quant=quant))
        )
    bits, group, method = int(found[1]), int(found[2]), found[3]
    plan = job.Plan(method, Grid(bits, group), text=f"own {ROWS} of {LENGTH}")
    job.run(Source(EMBEDDED), folder / arm, plan, calibration_rows, lambda line: None)
    return unpacked(r1.load(folder / arm, PLAIN))


def unpacked(engine: Engine) -> Engine:
    """Put plain numbers in the place of packed ones: the same weights, and faster on a CPU."""
    for module in list(engine.model.modules()):
        names = EXPERT_MATRICES if isinstance(module, Experts) else ("matrix",)
        for name in names if isinstance(module, Experts | Linear) else ():
            matrix = getattr(module, name)
            if isinstance(matrix, Quantized):
                setattr(module, name, Dense(matrix.dense(torch.float32)).requires_grad_(False))
    return engine


@torch.inference_mode()
def read(engine: Engine, pairs: Sequence[Pair]) -> list[Tensor]:
    """What the model thinks of each token of given answers: log-probabilities, fp32 (M, W) each."""
    out: list[Tensor] = [torch.empty(0)] * len(pairs)
    # Rows of one length go together, so little is computed for padding.
    order = sorted(range(len(pairs)), key=lambda row: len(pairs[row][0]) + len(pairs[row][1]))
    for start in range(0, len(pairs), READ):
        rows = order[start : start + READ]
        tokens, _, learned = padded([pairs[row] for row in rows], engine.runner.device)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        hidden = engine.model(tokens, engine.model.step("prefill", positions, 0))[:, :-1]
        logits = engine.model.lm_head(hidden[learned[:, 1:]])  # (M of all rows, W)
        each = F.log_softmax(logits.float(), dim=-1).split([len(pairs[row][1]) for row in rows])
        for row, thought in zip(rows, each, strict=True):
            out[row] = thought
    return out


def greedy(
    engine: Engine, pairs: Sequence[Pair], thought: Sequence[Tensor], batch: int
) -> list[Pair]:
    """The model's own greedy answers, given what it thinks of other answers to the same prompts.

    As long as its first choice is the given token, its own answer is the given one. So only what
    follows the first other choice is generated: the same answer, in less time.
    """
    out, pending = list(pairs), []
    for row, ((prompt, answer), each) in enumerate(zip(pairs, thought, strict=True)):
        mine = each.argmax(-1)
        other = (mine != torch.tensor(answer)).nonzero()
        if not len(other):
            continue
        at = int(other[0])
        start = [*answer[:at], int(mine[at])]
        out[row] = (prompt, start)
        if start[-1] not in engine.stop_ids:
            pending.append((row, len(answer) + SLACK - len(start)))
    pending.sort(key=lambda pair: pair[1])  # rows of a batch wait for the longest one
    for first in range(0, len(pending), batch):
        rows = [row for row, _ in pending[first : first + batch]]
        most = max(left for _, left in pending[first : first + batch])
        asked = [[*out[row][0], *out[row][1]] for row in rows]
        for row, done in zip(rows, engine.generate(asked, most, temperature=0.0), strict=True):
            out[row][1].extend(done.tokens)
    return out


def compare(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, float]:
    """Mean KL(theirs || ours) in nats, and the share of tokens with the same first choice."""
    nats = agreed = count = 0.0
    for a, b in zip(ours, theirs, strict=True):
        nats += float((b.exp() * (b - a)).sum())
        agreed += float((a.argmax(-1) == b.argmax(-1)).sum())
        count += len(a)
    return {"kl": nats / count, "top1": agreed / count}


class Measure:
    """The problems, and what the fp32 weights make of them."""

    def __init__(self, count: int, batch: int) -> None:
        engine, self.batch = engine_of("fp32", Path()), batch
        assert engine.tokenizer is not None
        self.problems = exam(count)
        taught = [encode(engine.tokenizer, example) for example in phrased(self.problems)]
        self.pairs = greedy(engine, taught, read(engine, taught), batch)
        self.theirs = read(engine, self.pairs)

    def arm(self, engine: Engine) -> dict[str, float]:
        """The figures of one model."""
        thought = read(engine, self.pairs)
        written = greedy(engine, self.pairs, thought, self.batch)
        good = [
            right(engine, answer, problem.answer)
            for problem, (_, answer) in zip(self.problems, written, strict=True)
        ]
        tokens = sum(len(answer) for _, answer in written)
        figures = {"right": sum(good), "tokens_per_answer": tokens / len(written)}
        return figures | compare(thought, self.theirs)


def lines(found: dict[str, Any]) -> list[str]:
    """A result file as Markdown: the command, and the table."""
    return [f"`{found['command']}` (torch {found['torch']})", "", *table(found)]


def table(found: dict[str, Any]) -> list[str]:
    """The figures as Markdown."""
    rows = [
        f"| weights | right of {found['problems']:,} | tokens per answer | KL, nats | top-1 |",
        "|---|---:|---:|---:|---:|",
    ]
    for arm, f in found["arms"].items():
        spelled = SPELLED.fullmatch(arm)
        told = f"{spelled[1]} bits, groups of {spelled[2]}, {spelled[3]}" if spelled else arm
        kl = f"{f['kl']:.1e}" if f["kl"] else "0"
        rows.append(
            f"| {told} | {f['right']:,} | {f['tokens_per_answer']:.1f} | {kl} | {f['top1']:.2%} |"
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for input that can't be used."""
    parser = shared.parser(__doc__)
    parser.add_argument("-n", type=int, default=1000, metavar="N", help="problems (default 1000)")
    parser.add_argument("--arms", default=",".join(ARMS), metavar="ARM,..", help="default: all")
    parser.add_argument(
        "--batch", type=int, default=100, metavar="N", help="problems together (default 100)"
    )
    shared.add_output(parser, "write the figures as JSON, and keep those that it has")
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    arms, out = arguments.arms.split(","), arguments.output
    if arguments.n < 1 or arguments.batch < 1:
        raise InputError(f"-n {arguments.n} --batch {arguments.batch}: give at least 1 of each")
    for arm in arms:
        if arm not in ARMS[:3] and not SPELLED.fullmatch(arm):
            raise InputError(f"--arms {arm}: give names such as {', '.join(ARMS[:4])}")
    shared.check_output(out)
    kept = measured(out, arguments.n) if out and out.exists() else {}
    measure = Measure(arguments.n, arguments.batch)
    how = {
        "command": f"python tools/measure/quality.py -n {arguments.n}",
        "torch": torch.__version__,
    }
    result: dict[str, Any] = {**how, "problems": arguments.n, "arms": kept}
    with tempfile.TemporaryDirectory() as folder:
        for arm in arms:
            if arm in kept:
                continue
            start = time.monotonic()
            kept[arm] = measure.arm(engine_of(arm, Path(folder)))
            print(f"{arm}: {kept[arm]}, {time.monotonic() - start:.0f} s", flush=True)
            if out:
                with new_file(out) as partial:
                    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(result)))
    return 0


def measured(path: Path, problems: int) -> dict[str, Any]:
    """The arms of an earlier run with as many problems. Raises InputError for another file."""
    try:
        found = read_json(path)
        arms: dict[str, Any] = found["arms"]
        if found["problems"] == problems:
            return arms
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"-o {path} is no result of {problems} problems: name another file")


if __name__ == "__main__":
    sys.exit(main())
