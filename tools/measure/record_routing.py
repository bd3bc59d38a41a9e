"""Record how often each expert of each layer is chosen, while a checkpoint answers questions.

    python tools/measure/record_routing.py -o routing.json
    python tools/measure/record_routing.py --model DIR --text questions.txt -o routing.json

The file is small JSON (r1/placement/profile.py). bench.py replays it (`--routing FILE`), and
`--expert-policy pinned --expert-profile FILE` keeps on the device what was chosen most. Questions
are those of the checkpoint's exam.json, or the lines of a text. Each is answered by itself,
greedily; its tokens and those of the answer are counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where shared.py is

import shared
import torch
from torch import Tensor, nn

import r1
from r1.bench import exam
from r1.files.embedded import EMBEDDED
from r1.model.moe import MoE
from r1.placement.profile import Profile
from r1.reading import read_text
from r1.run.engine import Engine


@contextmanager
def counted(engine: Engine) -> Iterator[dict[int, Tensor]]:
    """Counts, int64 (E,), by layer: how many tokens chose each expert meanwhile."""
    experts, hooks = engine.config.experts.n_routed_experts, []
    counts: dict[int, Tensor] = {}

    def watch(gate: nn.Module, layer: int) -> None:
        def note(_gate: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            counts[layer] += output[0].flatten().bincount(minlength=experts).cpu()

        counts[layer] = torch.zeros(experts, dtype=torch.int64)
        hooks.append(gate.register_forward_hook(note))

    for layer, block in enumerate(engine.model.layers):
        if isinstance(block.mlp, MoE):
            watch(block.mlp.gate, layer)
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def record(engine: Engine, questions: list[str], new: int, name: str) -> Profile:
    """Answer each question with at most `new` tokens. Raises InputError without experts."""
    if not engine.config.experts.n_routed_experts:
        raise r1.InputError(f"{name} has no experts, so there is no routing to record")
    with counted(engine) as counts:
        for question in questions:
            engine.generate([engine.encode(question)], new, temperature=0.0)
    chosen = engine.config.experts.num_experts_per_tok
    tokens = int(next(iter(counts.values())).sum()) // chosen
    return Profile(tokens, chosen, {layer: each.tolist() for layer, each in counts.items()}, name)


def questions_of(arguments: argparse.Namespace) -> list[str]:
    """The lines of the text, or the checkpoint's problems. Raises InputError for none."""
    if not arguments.model.is_dir():
        raise r1.InputError(f"--model {arguments.model} is no folder: give a checkpoint's")
    if arguments.text is None:
        asked = [each.question for each in exam.load(arguments.model)]
    else:
        try:
            asked = [line for line in read_text(arguments.text).splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise r1.InputError(f"--text {arguments.text} can't be read ({error})") from None
    if not asked:
        raise r1.InputError("there is no question: give --text FILE, with one in each line")
    return asked[: arguments.n]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for input that can't be used."""
    parser = shared.parser(__doc__)
    text = "the checkpoint's folder (default: the embedded tiny-r1)"
    parser.add_argument("--model", type=Path, default=EMBEDDED, metavar="DIR", help=text)
    text = "a question in each line (default: the checkpoint's exam.json)"
    parser.add_argument("--text", type=Path, metavar="FILE", help=text)
    parser.add_argument("-n", type=int, default=32, metavar="N", help="questions (default 32)")
    text = "the most new tokens of an answer (default 128)"
    parser.add_argument("--new", type=int, default=128, metavar="N", help=text)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or rocm (default auto)")
    shared.add_output(parser, "the recording (default: routing.json)")
    return shared.run(__file__, work, parser.parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    output = arguments.output or Path("routing.json")
    shared.check_output(output)
    for flag, value in (("-n", arguments.n), ("--new", arguments.new)):
        if value < 1:
            raise r1.InputError(f"{flag} {value}: give a whole number above 0")
    asked = questions_of(arguments)
    engine = r1.load(arguments.model, r1.Backend(device=arguments.device))
    profile = record(engine, asked, arguments.new, arguments.model.resolve().name)
    profile.write(output)
    experts = engine.config.experts.n_routed_experts
    print(f"{output}: {profile.tokens} tokens of {len(asked)} questions")
    for part in (2, 4, 8):
        slots = max(1, experts // part)
        print(f"the {slots} most chosen experts of a layer have {profile.found(slots):.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
