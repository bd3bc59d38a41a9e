"""`python -m r1.guide`: which GPU holds a model, how fast it will be, and what a token costs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import r1
from r1 import starting, streams
from r1.bench.plot import figure
from r1.errors import InputError
from r1.footprint import Sizes
from r1.guide import calibrate, gpus, measured, page, picture, ranking
from r1.guide.answer import Answer, Question
from r1.guide.cost import Terms
from r1.guide.measured import Measured
from r1.guide.predict import Predictor
from r1.guide.setup import COUNTS, ON_DEVICE, QUANTS, Places, find_model
from r1.switches import flags

MOST = 10**9
PLACES = ("device", "host", "disk")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status (streams.ended)."""
    return streams.ended("r1.guide", lambda: run(parser().parse_args(argv)))


def parser() -> flags.Parser:
    """The command's arguments."""
    p = flags.Parser(
        "r1.guide",
        r1.__version__,
        prog="python -m r1.guide",
        usage="python -m r1.guide [flags]",
        description="Which GPU holds a model, how fast it will be, and what a token costs.",
        epilog="Example: python -m r1.guide --model moonlight-16b --gpu 4090",
    )
    text = "a named shape, or a folder with config.json; without it, --gpu ranks the family"
    p.add_argument("--model", metavar="M", help=text)
    text = f"all (default), or one of {', '.join(gpus.all_gpus())}"
    p.add_argument("--gpu", default="all", metavar="G", help=text)
    text = "how matrices are stored; none: bf16 (default: the most exact that fits)"
    p.add_argument("--quant", choices=QUANTS, help=text)
    text = "how many GPUs share the model (default: the fewest that hold it)"
    p.add_argument("--count", type=int, choices=COUNTS, metavar="N", help=text)
    for name, default, text in (
        ("--batch", 1, "rows decoded together"),
        ("--prompt", 1024, "tokens of each prompt"),
        ("--new", 1024, "new tokens of each row"),
    ):
        p.add_argument(
            name, type=_count, default=default, metavar="N", help=f"{text} (default {default})"
        )
    text = (
        "where routed experts lie (default: device; host where no number of GPUs is enough); "
        "--experts cpu, which bench.py has, is not predicted"
    )
    p.add_argument("--experts", choices=PLACES, help=text)
    text = "host memory for experts (default: with host what they need, with disk none)"
    p.add_argument("--ram-gb", type=_amount, metavar="GB", help=text)
    fast, origin = gpus.drive()
    text = f"what the drive reads, with --experts disk (default {fast:g}: {origin.note})"
    p.add_argument("--disk-gb-s", type=_amount, metavar="GB", help=text)
    _add_money(p)
    text = "results of bench.py on the machine of --gpu: their errors, and rows to predict from"
    p.add_argument("--calibrate", type=Path, nargs="+", metavar="JSON", help=text)
    text = "md, or json, which bench.py --compare reads where it is one answer (default md)"
    p.add_argument("-o", "--output", choices=("md", "json"), default="md", help=text)
    text = "draw a ranking: FILE.png, and the same as FILE.svg"
    p.add_argument("--plot", type=Path, metavar="FILE", help=text)
    return p


def _add_money(p: argparse.ArgumentParser) -> None:
    price, origin = gpus.electricity()
    text = f"price of electricity (default {price}: {origin.note}, {origin.date})"
    p.add_argument("--usd-per-kwh", type=_amount, default=price, metavar="P", help=text)
    text = "how many years a bought machine is used (default 3)"
    p.add_argument("--years", type=_amount, default=3.0, metavar="Y", help=text)
    text = "the share of these years in which it makes tokens (default 1: it never idles)"
    p.add_argument("--busy-share", type=_share, default=1.0, metavar="S", help=text)
    text = "only machines that cost no more, all together"
    p.add_argument("--budget", type=_amount, metavar="USD", help=text)
    text = "only machines that are expected to give one row so many"
    p.add_argument("--min-tokens-per-s", type=_amount, metavar="N", help=text)


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() and len(text) < 12 else 0
    if not 0 < value <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 to {MOST}")
    return value


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < MOST:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0 and below {MOST:,}")
    return value


def _share(text: str) -> float:
    value = _amount(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a share above 0, at most 1")
    return value


def run(arguments: argparse.Namespace) -> None:
    """Write what the arguments ask for. Raises InputError."""
    check(arguments)
    own = calibrate.read(arguments.calibrate) if arguments.calibrate else []
    rows = (*measured.committed(), *own)
    predictor = Predictor(rows, bool(own), arguments.disk_gb_s or gpus.drive()[0])
    terms = Terms(arguments.usd_per_kwh, arguments.years, arguments.busy_share)
    sizes = Sizes(arguments.batch, arguments.prompt, arguments.new)
    count = arguments.count or (1 if arguments.model is None else None)
    question = Question(sizes, arguments.quant, count, terms, predictor, places(arguments))
    if own:
        streams.write("\n".join([*calibrate.report(own), ""]))
        if arguments.model is None and arguments.gpu == "all":
            return
    answers = ask(arguments, question, own)
    if arguments.output == "json":
        streams.write(json.dumps(_results(answers), indent=1))
    elif len(answers) == 1:
        streams.write(page.one(answers[0], predictor, smaller(answers[0], question)))
    else:
        streams.write("\n".join([*heading(arguments, answers), "", *page.ranking(answers)]))
    if arguments.plot:
        title = arguments.model or gpus.gpu(arguments.gpu).title
        for file in picture.draw(answers, f"{title}: predicted", arguments.plot):
            streams.complain(f"r1.guide: wrote {file}")


def places(arguments: argparse.Namespace) -> tuple[Places, ...]:
    """Where experts may lie."""
    ram = arguments.ram_gb and arguments.ram_gb * 1e9
    if arguments.experts:
        return (Places(arguments.experts, ram),)
    return ON_DEVICE, Places("host", ram)


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for flags that would be ignored, before anything is counted."""
    single = arguments.model is not None and arguments.gpu != "all"
    filters = {"--budget": arguments.budget, "--min-tokens-per-s": arguments.min_tokens_per_s}
    for flag, value in {**filters, "--plot": arguments.plot}.items():
        if value is not None and single:
            raise InputError(f"{flag} goes with a ranking: leave --model or --gpu out")
    if arguments.model is None and arguments.gpu == "all" and not arguments.calibrate:
        raise InputError("give --model M, --gpu G or both: --help lists the flags")
    if arguments.calibrate and arguments.output == "json":
        raise InputError("--calibrate prints a table first: leave -o json out")
    if arguments.disk_gb_s and arguments.experts != "disk":
        raise InputError("--disk-gb-s is of use with --experts disk only: add that")
    if arguments.ram_gb and arguments.experts == "device":
        raise InputError("--ram-gb is for experts beside the device: leave --experts device out")
    if arguments.plot:
        figure.check(arguments.plot)


def ask(arguments: argparse.Namespace, question: Question, own: Sequence[Measured]) -> list[Answer]:
    """One answer, or a ranking's. `own`: the rows of --calibrate. Raises InputError."""
    gpu = None if arguments.gpu == "all" else gpus.gpu(arguments.gpu)
    if gpu and own:
        gpu = calibrate.machine_of(own, gpu)
    if arguments.model is None:
        assert gpu
        answers = ranking.models(gpu, question)
    else:
        name, config = find_model(arguments.model, arguments.quant)
        if gpu:
            return [question.ask(name, config, gpu)]
        answers = ranking.machines(name, config, question)
    kept = ranking.enough(answers, arguments.budget, arguments.min_tokens_per_s)
    if not kept:
        unknown = sum(not (a.purchase_usd and a.speeds and a.first.tokens_per_s) for a in answers)
        raise InputError(
            "nothing is cheap and fast enough: allow more, or ask for less "
            f"({unknown} of {len(answers)} answers lack a price or an expected time, or do not fit)"
        )
    return kept


def smaller(answer: Answer, question: Question) -> Answer | None:
    """One GPU with experts in RAM instead of several, if nobody said where they lie."""
    if answer.setup is None or answer.setup.count == 1 or len(question.places) == 1:
        return None
    less = replace(question, count=1, places=question.places[1:])
    return less.ask(answer.name, answer.setup.config, answer.gpu)


def heading(arguments: argparse.Namespace, answers: Sequence[Answer]) -> list[str]:
    """What a ranking is about, and what its prices mean."""
    cut = " (cut to a model's context where that is shorter)" * any(a.cut for a in answers)
    what = arguments.model or f"What {gpus.gpu(arguments.gpu).title} runs"
    return [
        f"# {what}",
        "",
        f"{arguments.prompt:,} tokens of prompt, {arguments.new:,} new ones{cut}; "
        f"{'one machine' if arguments.model is None else 'the fewest machines that hold it'}. "
        f"{page.PREDICTED} Rented or owned for {arguments.years:g} years, at "
        f"{arguments.usd_per_kwh:g} USD a kWh, at the best batch, and busy "
        f"{arguments.busy_share:.0%} of the time. ≤ and ≥ are "
        "bounds of the floor, where nothing is expected. Sources: r1/guide/gpus.json.",
    ]


def _results(answers: list[Answer]) -> object:
    """One result, or a list of those that fit."""
    found = [page.as_result(answer) for answer in answers if answer.setup]
    if not found:
        raise InputError("nothing fits, so there is no result: leave -o json out to see why")
    return found[0] if len(answers) == 1 else found


if __name__ == "__main__":
    starting.done()
    sys.exit(main())
