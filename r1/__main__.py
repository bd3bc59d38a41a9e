"""`python -m r1 "question"`: ask the model and see its reasoning. Without a question: chat."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

import r1
from r1 import streams, threads
from r1.errors import hung_up
from r1.files.embedded import EMBEDDED
from r1.run.sampler import TEMPERATURE, TOP_P, Sampler
from r1.switches import flags

DIM, PLAIN = "\x1b[2m", "\x1b[0m"  # a terminal's codes for dimmed and for ordinary text


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: success. 1: the reader of stdout closed it. 2: unusable input. 130: interrupted by Ctrl-C.
    """
    streams.prepare()
    arguments = parser().parse_args(argv)
    try:
        return talk(arguments)
    except r1.InputError as error:
        streams.complain(f"r1: {error}")
        return 2
    except BrokenPipeError:
        return hung_up()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError, r1.InputError):  # the terminal may be gone
            streams.write(PLAIN if sys.stdout.isatty() else "")
        return 130


def parser() -> argparse.ArgumentParser:
    """The command's arguments: its own, and a flag for each switch."""
    p = argparse.ArgumentParser(
        prog="python -m r1",
        description="Ask the model a question, or chat with it if none is given.",
    )
    p.add_argument(
        "question", nargs="?", help="what to ask; without it, a chat (end it with Ctrl-D)"
    )
    p.add_argument(
        "--model",
        type=Path,
        default=EMBEDDED,
        metavar="DIR",
        help="a checkpoint's folder (default: tiny-r1)",
    )
    p.add_argument("--system", metavar="TEXT", help="a system prompt")
    p.add_argument(
        "--new", type=int, default=1024, metavar="N", help="new tokens at most (default 1024)"
    )
    p.add_argument(
        "--temperature",
        type=float,
        default=TEMPERATURE,
        metavar="T",
        help=f"default {TEMPERATURE}; 0 is greedy",
    )
    p.add_argument("--top-p", type=float, default=TOP_P, metavar="P", help=f"default {TOP_P}")
    p.add_argument("--seed", type=flags.seed, metavar="N", help="makes the same choices again")
    p.add_argument(
        "--no-think", dest="think", action="store_false", help="answer without reasoning first"
    )
    threads.add_flag(p)
    flags.add_flags(p)
    return p


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for arguments that no model can use.

    This comes before the model is loaded, because loading can take minutes.
    """
    Sampler(arguments.temperature, arguments.top_p, arguments.seed)
    if arguments.new < 1:
        raise r1.InputError(f"--new {arguments.new}: give a whole number of at least 1")
    if arguments.question is not None and not arguments.question.strip():
        raise r1.InputError(
            "the question is empty: ask something, or give no question at all to chat"
        )


def talk(arguments: argparse.Namespace) -> int:
    """Load the model, then answer the question, or chat on stdin. Returns the exit status."""
    check(arguments)
    engine = r1.load(arguments.model, r1.Backend(**flags.given(arguments)))
    backend = engine.backend
    count = threads.choose(arguments.threads, backend.device, engine.config, backend.dtype)
    if count is not None:
        torch.set_num_threads(count)
    for caution in engine.cautions:
        streams.complain(f"r1: {caution}")
    messages: list[dict[str, Any]] = (
        [{"role": "system", "content": arguments.system}] if arguments.system else []
    )
    if arguments.question is not None:
        answer(engine, [*messages, {"role": "user", "content": arguments.question}], arguments)
        return 0
    streams.complain("Ask something; Ctrl-D ends.")
    while True:
        try:
            question = input("> ")
        except EOFError:
            streams.write("")
            return 0
        if question.strip():
            turn = [*messages, {"role": "user", "content": question}]
            try:
                reply = answer(engine, turn, arguments)
            except r1.InputError as error:  # the conversation continues without this turn
                streams.complain(f"r1: {error}")
            else:
                messages = [*turn, {"role": "assistant", "content": reply}]


def answer(engine: r1.Engine, messages: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Print one answer as it is generated, and return it without its reasoning.

    On a terminal the reasoning is dimmed. A line of timings follows on stderr.
    """
    color = sys.stdout.isatty()
    dimmed = False

    def show(reasoning_text: str, answer_text: str) -> None:
        nonlocal dimmed
        for text, dim in ((reasoning_text, True), (answer_text, False)):
            if text and color and dim != dimmed:
                streams.write(DIM if dim else PLAIN, end="")
                dimmed = dim
            streams.write(text, end="")

    completion = engine.chat(
        messages,
        arguments.new,
        arguments.temperature,
        arguments.top_p,
        arguments.seed,
        arguments.think,
        on_text=show,
    )
    streams.write(PLAIN if dimmed else "")
    streams.complain(timings(completion))
    return completion.answer


def timings(completion: r1.Completion) -> str:
    """One line about the time and the tokens of a completion."""
    line = (
        f"{completion.prompt_tokens} tokens read, first of {len(completion.tokens)} new after "
        f"{completion.ttft * 1e3:.0f} ms"
    )
    if completion.tpot:
        line += f", then {1 / completion.tpot:.1f} tokens/s ({completion.tpot * 1e3:.2f} ms each)"
    if completion.drafted:
        line += (
            f", {completion.acceptance:.0%} of drafts accepted: "
            f"{completion.tokens_per_step:.2f} tokens a step"
        )
    if completion.finish != "stop":
        line += "; cut off at --new or the context's end"
    return f"[{line}]"


if __name__ == "__main__":
    sys.exit(main())
