"""`python -m r1 "question"`: ask the model and see its reasoning. Without a question: chat."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import r1
from r1 import starting, streams, threads
from r1.conversation import Conversation, follow, read_question
from r1.device import torch_device
from r1.errors import flags_spelling, hung_up
from r1.files.embedded import EMBEDDED, domain_of
from r1.placement import ranks
from r1.run.sampler import TEMPERATURE, TOP_P, Sampler
from r1.switches import flags, own_files
from r1.switches.machine import Machine


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: success. 1: the reader of stdout closed it. 2: unusable input. 130: interrupted by Ctrl-C.
    """
    streams.prepare()
    crew = ranks.Crew()
    try:
        with flags_spelling():
            own_files.run_given(argv)
            arguments = parser().parse_args(argv)
            crew = ranks.crew()
            crew.ends_together("r1")
            return ranks.together(lambda: talk(arguments, crew), "r1")
    except r1.InputError as error:
        crew.complain("r1", error)
        return 2
    except BrokenPipeError:
        return hung_up()
    except KeyboardInterrupt:
        return 130


def parser() -> flags.Parser:
    """The command's arguments: its own, and a flag for each switch."""
    p = flags.Parser(
        "r1",
        r1.__version__,
        prog="python -m r1",
        usage="python -m r1 [flags] [question]",
        description="Ask the model a question, or chat with it if none is given.",
        epilog='Example: python -m r1 "What is 47 * 86?" --temperature 0',
    )
    text = "what to ask, in quotes; - reads it from stdin; without it, a chat"
    p.add_argument("question", nargs="*", help=text)
    text = "a checkpoint's folder (default: tiny-r1, which comes with r1)"
    p.add_argument("--model", type=Path, default=EMBEDDED, metavar="DIR", help=text)
    p.add_argument("--system", metavar="TEXT", help="a system prompt: what the model is told first")
    text = "stop after so many new tokens (default 1024)"
    p.add_argument("--new", type=int, default=1024, metavar="N", help=text)
    text = f"how freely tokens are drawn; 0: always the likeliest one (default {TEMPERATURE})"
    hot = sampling("temperature", "0 (greedy) or more")
    p.add_argument("--temperature", type=hot, default=TEMPERATURE, metavar="T", help=text)
    text = f"draw from the likeliest tokens that have this probability together (default {TOP_P})"
    nucleus = sampling("top_p", "more than 0 and at most 1")
    p.add_argument("--top-p", type=nucleus, default=TOP_P, metavar="P", help=text)
    text = "the same seed draws the same tokens again (default: another one each time)"
    p.add_argument("--seed", type=flags.seed, metavar="N", help=text)
    text = "answer without reasoning first"
    p.add_argument("--no-think", dest="think", action="store_false", help=text)
    flags.add_draft_model(p)
    threads.add_flag(p)
    own_files.add_flag(p)
    flags.add_flags(p)
    return p


def sampling(field: str, allowed: str) -> Callable[[str], float]:
    """The type of an argument: a number that a Sampler takes as its `field`."""

    def read(text: str) -> float:
        try:
            value = float(text)
            given: dict[str, Any] = {field: value}
            Sampler(**given)
        except ValueError:  # an InputError is one
            raise argparse.ArgumentTypeError(f"{text!r}: give {allowed}") from None
        return value

    return read


def talk(arguments: argparse.Namespace, crew: ranks.Crew) -> int:
    """Load the model, then answer the question, or chat on stdin. Returns the exit status.

    Of several processes that share the model, rank 0 talks and the others follow it.
    """
    question = check(arguments) if crew.leads else None
    domain = domain_of(arguments.model)
    asked = r1.Backend(**flags.given(arguments))
    crew.check(asked.tp, asked.ep, asked.pp)
    kind = Machine.here().device if asked.device == "auto" else asked.device
    with crew.connected(torch_device(kind).type):
        engine = r1.load(arguments.model, asked, draft_model=arguments.draft_model)
        backend = engine.backend
        count = threads.choose(arguments.threads, backend.device, engine.config, backend.dtype)
        if count is not None:
            torch.set_num_threads(count)
        if not crew.leads:
            follow(engine, ranks.Line(crew))
            return 0
        for caution in engine.cautions:
            streams.complain(f"r1: {caution}")
        line = ranks.Line(crew) if crew.count > 1 else None
        conversation = Conversation(engine, arguments, domain, line)
        try:
            if question is None:
                return conversation.chat()
            conversation.ask(question)
            return 0
        finally:
            if line:
                line.end()


def check(arguments: argparse.Namespace) -> str | None:
    """The question, if there is one. Raises InputError for arguments that no model can use.

    This comes before the model is loaded, because loading can take minutes.
    """
    if arguments.new < 1:
        raise r1.InputError(f"--new {arguments.new}: give a whole number of at least 1")
    if len(arguments.question) > 1:
        words = f"the question has {len(arguments.question)} parts"
        raise r1.InputError(f'{words}: put quotes around it, as in python -m r1 "What is 2 + 2?"')
    return read_question(arguments.question[0]) if arguments.question else None


if __name__ == "__main__":
    starting.done()
    sys.exit(main())
