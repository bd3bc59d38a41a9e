"""`python -m r1.tour ["text"]`: one prompt through the model, every shape by name and number."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import r1
from r1 import streams
from r1.errors import hung_up
from r1.files.embedded import EMBEDDED
from r1.switches.backend import choices
from r1.tour.pages import Pages
from r1.tour.run import Prompt, follow, load, prompt_of

TEXT = "12+30=?"
"""The default question: tiny-r1 answers it rightly, in few tokens."""
SWITCHES = ("device", "dtype", "attention", "prefill_attention", "moe", "prefill_moe")
"""The switches of r1.Backend that a tour takes: those under which the model's own code runs."""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: success. 1: the reader of stdout closed it. 2: unusable input. 130: interrupted by Ctrl-C.
    """
    streams.prepare()
    arguments = parser().parse_args(argv)
    try:
        for line in lines(arguments):
            streams.write(line)
    except r1.InputError as error:
        streams.complain(f"r1.tour: {error}")
        return 2
    except BrokenPipeError:
        return hung_up()
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="python -m r1.tour",
        description="Follow one prompt through the model: tokens, shapes, experts, cache, drafts.",
    )
    p.add_argument("text", nargs="?", help=f"what the user asks (default {TEXT!r})")
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
    p.add_argument("--new", type=int, default=24, metavar="N", help="new tokens (default 24)")
    p.add_argument(
        "--draft-tokens", type=int, default=2, metavar="K", help="drafts of a step (default 2)"
    )
    values, defaults = choices(), {"device": "cpu", "dtype": "fp32", "moe": "gather"}
    for name in SWITCHES:
        default = defaults.get(name, "auto")
        p.add_argument(
            f"--{name.replace('_', '-')}", choices=values[name], default=default,
            help=f"default {default}",
        )  # fmt: skip
    return p


def lines(arguments: argparse.Namespace) -> list[str]:
    """The tour's text. Raises InputError."""
    if arguments.new < 1:
        raise r1.InputError(f"--new {arguments.new}: give a whole number of at least 1")
    if arguments.text is not None and not arguments.text.strip():
        raise r1.InputError("the text is empty: give some, or none for a prompt of the tour's own")
    ids = None if arguments.tokens is None else token_ids(arguments.tokens)
    if ids and arguments.text is not None:
        raise r1.InputError("--tokens stands in place of the text: give one of the two")
    switches = {name: getattr(arguments, name) for name in SWITCHES}
    engine = load(arguments.model, switches, arguments.draft_tokens)
    for caution in engine.cautions:
        streams.complain(f"r1.tour: {caution}")
    layer = layer_of(engine.config, arguments.layer)
    prompt = Prompt(ids) if ids else prompt_of(engine, arguments.text or TEXT)
    last, place = len(prompt.tokens) - 1, arguments.place
    if place is not None and not 0 <= place <= last:
        raise r1.InputError(f"--place {place}: the prompt has tokens 0 to {last}")
    tour = follow(engine, prompt, layer, arguments.new)
    name = arguments.model.resolve().name
    return Pages(engine, tour, name, last if place is None else place).lines()


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
    sys.exit(main())
