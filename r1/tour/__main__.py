"""`python -m r1.tour ["text"]`: one prompt through the model, every shape by name and number."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import r1
from r1 import starting, streams, threads
from r1.files.config_json import load_config
from r1.files.embedded import EMBEDDED
from r1.run.prompts import check_conversation
from r1.switches import flags, own_files
from r1.switches.backend import choices
from r1.tour.pages import Pages
from r1.tour.run import Prompt, follow, load, prompt_of

TEXT = "12+30=?"
"""The default question: tiny-r1 answers it rightly, in few tokens."""
SWITCHES = ("device", "dtype", "attention", "prefill_attention", "moe", "prefill_moe")
"""The switches of r1.Backend that a tour takes: those under which the model's own code runs."""
DEFAULTS = {"device": "cpu", "dtype": "fp32", "moe": "gather"}
"""The tour's defaults where they differ from Backend's; "moe" only for a model with experts."""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status (streams.ended)."""

    def tour() -> None:
        own_files.run_given(argv)
        for line in lines(parser().parse_args(argv)):
            streams.write(line)

    return streams.ended("r1.tour", tour)


def parser() -> flags.Parser:
    """The command's arguments."""
    p = flags.Parser(
        "r1.tour",
        r1.__version__,
        prog="python -m r1.tour",
        usage="python -m r1.tour [flags] [text]",
        description="Follow one prompt through the model: tokens, shapes, experts, cache, drafts.",
    )
    text = f"what the user asks, in quotes (default {TEXT!r})"
    p.add_argument("text", nargs="*", metavar="text", help=text)
    p.add_argument("--tokens", metavar="ID,..", help="token ids in place of the text")
    p.add_argument(
        "--layer", type=int, metavar="N", help="the layer to look into (default: the first sparse)"
    )
    p.add_argument(
        "--model", type=Path, default=EMBEDDED, metavar="DIR", help="a checkpoint's folder"
    )
    p.add_argument(
        "--place",
        type=int,
        metavar="N",
        help="the token whose experts are explained (default: last)",
    )
    text = "stop after so many new tokens (default 24)"
    p.add_argument("--new", type=int, default=24, metavar="N", help=text)
    text = "tokens that are drafted for a step (default 2)"
    p.add_argument("--draft-tokens", type=int, default=2, metavar="N", help=text)
    threads.add_flag(p)
    own_files.add_flag(p)
    values = choices()
    for name in SWITCHES:
        default = DEFAULTS.get(name, "auto")
        what = flags.explanations()[name].partition(";")[0]
        text = f"{what} (default: {default})"
        p.add_argument(f"--{name.replace('_', '-')}", choices=values[name], help=text)
    return p


def lines(arguments: argparse.Namespace) -> list[str]:
    """The tour's text. Raises InputError."""
    if arguments.new < 1:
        raise r1.InputError(f"--new {arguments.new}: give a whole number of at least 1")
    text = text_of(arguments.text)
    ids = None if arguments.tokens is None else token_ids(arguments.tokens)
    if ids and text is not None:
        raise r1.InputError("--tokens stands in place of the text: give one of the two")
    config = load_config(arguments.model)
    asked = {name: getattr(arguments, name) for name in SWITCHES}
    switches = {name: value for name, value in asked.items() if value is not None}
    sparse = config.experts.n_routed_experts > 0
    defaults = {name: value for name, value in DEFAULTS.items() if sparse or name != "moe"}
    switches = {**defaults, **switches}
    layer = layer_of(config, arguments.layer)  # loading can take minutes
    if ids and max(ids) >= config.vocab_size:
        outside = f"{max(ids)} is outside the vocabulary of {config.vocab_size}"
        raise r1.InputError(f"--tokens {arguments.tokens}: {outside}: give smaller ids")
    engine = load(arguments.model, switches, arguments.draft_tokens)
    backend = engine.backend
    count = threads.choose(arguments.threads, backend.device, engine.config, backend.dtype)
    if count is not None:
        torch.set_num_threads(count)
    for caution in engine.cautions:
        streams.complain(f"r1.tour: {caution}")
    prompt = Prompt(ids) if ids else prompt_of(engine, text or TEXT)
    check_conversation(len(prompt.tokens), 1, config)
    last, place = len(prompt.tokens) - 1, arguments.place
    if place is not None and not 0 <= place <= last:
        raise r1.InputError(f"--place {place}: the prompt has tokens 0 to {last}")
    tour = follow(engine, prompt, layer, arguments.new)
    name = arguments.model.resolve().name
    return Pages(engine, tour, name, last if place is None else place).lines()


def text_of(words: list[str]) -> str | None:
    """The text as the command line gives it; None for none. Raises InputError."""
    if len(words) > 1:
        parts = f"the text has {len(words)} parts"
        raise r1.InputError(f'{parts}: put quotes around it, as in python -m r1.tour "12 + 30"')
    if words and not words[0].strip():
        raise r1.InputError("the text is empty: give some, or none for a prompt of the tour's own")
    return words[0] if words else None


def token_ids(text: str) -> list[int]:
    """The ids of a comma list. Raises InputError."""
    words = text.split(",")
    if not all(word.isdecimal() and len(word) < 10 for word in words):
        raise r1.InputError(f"--tokens {text}: give token ids, such as 0,5,7")
    return list(map(int, words))


def layer_of(config: r1.Config, asked: int | None) -> int:
    """The layer to look into. Raises InputError for one that the model lacks."""
    layers = config.num_hidden_layers
    if asked is None:
        return next((layer for layer in range(layers) if config.is_moe(layer)), 0)
    if not 0 <= asked < layers:
        raise r1.InputError(f"--layer {asked}: the model has layers 0 to {layers - 1}")
    return asked


if __name__ == "__main__":
    starting.done()
    sys.exit(main())
