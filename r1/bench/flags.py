"""The command line of bench.py: its parser, and the types of its arguments."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

import r1
from r1 import threads
from r1.bench import arms, exam
from r1.bench.plan import PROBLEMS
from r1.bench.report.render import FORMS, ISSUE
from r1.bench.routing import ROUTINGS
from r1.model.shapes import SHAPES
from r1.switches import flags, own_files
from r1.switches.backend import Backend

MOST = 10**12
"""The largest size that is read. What fits the context and the memory is checked later."""


def parser(embedded: Path) -> argparse.ArgumentParser:
    """All arguments of bench.py. `embedded` is the checkpoint that is measured by default."""
    p = flags.Parser(
        "bench",
        r1.__version__,
        prog="bench.py",
        usage="python bench.py [flags]",
        description="Measure what each optimization buys on this machine.",
        epilog="Example: python bench.py --compile --amp bf16",
    )
    _add_workload(p, embedded)
    _add_measurement(p)
    _add_output(p)
    threads.add_flag(p)
    own_files.add_flag(p)
    flags.add_flags(p)
    return p


def _add_workload(p: argparse.ArgumentParser, embedded: Path) -> None:
    """The model, the sizes, and how often."""
    model = p.add_mutually_exclusive_group()
    text = "a checkpoint's folder (default: the embedded tiny-r1)"
    model.add_argument("--model", type=Path, default=embedded, metavar="DIR", help=text)
    flags.add_draft_model(p)
    text = "random weights of a published shape, made on the device"
    model.add_argument("--shape", choices=SHAPES, help=text)
    p.add_argument("--layers", type=int, metavar="N", help="only the first N layers of --shape")
    for name, default, least, text in (
        ("--batch", 1, 1, "rows decoded together (default 1)"),
        ("--prompt", 128, 1, "tokens of each prompt (default 128)"),
        ("--new", 128, 1, "new tokens of each row (default 128)"),
        ("--depth", 0, 0, "tokens in the cache before (default 0)"),
    ):
        numbers_from = partial(numbers, least=least)
        p.add_argument(name, type=numbers_from, default=[default], metavar="N,..", help=text)
    text = "repetitions of each arm (default 5)"
    p.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help=text)
    text = "the seed of random weights and prompts (default 0)"
    p.add_argument("--seed", type=flags.seed, default=0, metavar="N", help=text)
    text = (
        f"how many problems of the checkpoint's {exam.FILE}, if it has one, each arm is asked "
        f"(default {PROBLEMS}; 0: none)"
    )
    p.add_argument("--problems", type=int, metavar="N", help=text)


def _add_measurement(p: argparse.ArgumentParser) -> None:
    """The arms, and how they are run."""
    text = "every switch this machine can run: ladder, alone, all but one, pairs"
    p.add_argument("--ablate", action="store_true", help=text)
    text = (
        f"kinds of arms beside the baseline: {', '.join(arms.KINDS)}, or {arms.ALL_BUT}SWITCH for "
        f"one of all-but-one (default {','.join(arms.USUAL)}; all for --ablate)"
    )
    p.add_argument("--only", type=kinds, metavar="KIND,..", help=text)
    text = (
        "only all switches together, and parity with their own numbers in fp32 in place of the "
        "original's: for a model whose plain numbers fit nowhere; random packed weights are drawn "
        "packed, in a minute"
    )
    p.add_argument("--no-baseline", action="store_true", help=text)
    text = (
        "model (default): by scores, where random weights crowd on a few; uniform: experts drawn "
        "for each row; fresh: anew for each token, as --experts host needs; FILE: as often as "
        "in a recording (tools/measure/record_routing.py)"
    )
    p.add_argument("--routing", type=routing, default="model", metavar="HOW", help=text)
    text = (
        "with --speculate: accept each draft with this probability whatever the model says "
        "(random weights draft badly; a shape without an MTP layer gets one): "
        "tells a speed, and writes no meaningful text"
    )
    p.add_argument("--assume-acceptance", type=float, metavar="A", help=text)
    text = "start compiled arms a second time too, with a warm cache"
    p.add_argument("--warm-start", action="store_true", help=text)
    text = "a Chrome trace of each arm's decode step, and its top kernels"
    p.add_argument("--profile", type=Path, metavar="DIR", help=text)


def _add_output(p: argparse.ArgumentParser) -> None:
    """What is done with a result, and the commands that measure nothing."""
    text = "draw the result: FILE.png, and the same as FILE.svg"
    p.add_argument("--plot", type=Path, metavar="FILE", help=text)
    text = "merge results of several machines, and end"
    p.add_argument("--compare", type=Path, nargs="+", metavar="JSON", help=text)
    text = "--compare: what each machine costs an hour (one for all, or each)"
    p.add_argument("--price", type=prices, metavar="P,..", help=text)
    text = "print, and with --plot draw, a result kept by --output-file FILE.json, and end"
    p.add_argument("--show", type=Path, metavar="JSON", help=text)
    text = (
        "print what this machine can do, and why not, and end; columns: what the table's columns "
        "mean"
    )
    choices = ("machine", "columns")
    p.add_argument("--explain", nargs="?", choices=choices, const="machine", help=text)
    text = "print all columns of the table; with --compare, all arms"
    p.add_argument("--wide", action="store_true", help=text)
    text = "the form of the result (default md); issue: a block to paste into a bug report"
    p.add_argument("-o", "--output", choices=(*FORMS, ISSUE), help=text)
    text = (
        "write the result to FILE too, in the form that its ending says "
        f"({', '.join('.' + form for form in FORMS)}), or -o; the table is printed"
    )
    p.add_argument("--output-file", type=Path, metavar="FILE", help=text)


def routing(text: str) -> str | Path:
    """The name of a routing, or else the path of a recording."""
    if text in ("model", *ROUTINGS):
        return text
    if not os.path.exists(text):
        names = ", ".join(("model", *ROUTINGS))
        choices = f"choose {names}, or give a recording's file"
        raise argparse.ArgumentTypeError(f"{text!r} is no file: {choices}")
    return Path(text)


def prices(text: str) -> list[float]:
    """A comma list of amounts of money."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give amounts of money, with commas between"
        ) from None


def kinds(text: str) -> tuple[str, ...]:
    """A comma list of kinds of arms. In all-but-SWITCH the switch is written as its flag is."""
    chosen = []
    for kind in text.split(","):
        switch = kind.removeprefix(arms.ALL_BUT).replace("-", "_")
        if kind not in arms.KINDS and (
            not kind.startswith(arms.ALL_BUT) or switch not in vars(Backend())
        ):
            raise argparse.ArgumentTypeError(
                f"{kind!r}: give {', '.join(arms.KINDS)} or {arms.ALL_BUT}SWITCH "
                f"(as in {arms.ALL_BUT}moe), with commas between"
            )
        chosen.append(kind if kind in arms.KINDS else arms.ALL_BUT + switch)
    return tuple(chosen)


def numbers(text: str, least: int = 1) -> list[int]:
    """A comma list of whole numbers of at least `least`, 0 or 1."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [-1]
    if min(values) < least or max(values) > MOST:
        allowed = "above 0" if least else "of 0 or more"
        allowed += f" and at most {MOST}" if max(values) > MOST else ""
        raise argparse.ArgumentTypeError(
            f"{text!r}: give whole numbers {allowed}, with commas between"
        )
    return values
