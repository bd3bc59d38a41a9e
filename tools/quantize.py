"""Quantize a checkpoint: to 4 or 8 bits, by rounding, GPTQ or AWQ, in formats that others read.

    # tiny-r1 in 4 bits, calibrated on answers that it writes itself
    python tools/quantize.py --method gptq --bits 4 --group 32 weights/tiny-r1 /tmp/tiny-gptq
    python tools/quantize.py --method awq --text book.txt --format awq MODEL OUT
    python tools/quantize.py --method rtn --experts-only MODEL OUT

`rtn` rounds to nearest and needs no text. `gptq` and `awq` look at what each layer reads. One layer
is in memory at a time, and reads what the quantized layers before it make. A run that was killed
goes on with the layer that it was at: give the same command. OUT appears when it is complete.

The router, the norms, the embedding, the output head and kv_b_proj are not quantized
(r1/switches/precision.py says why).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # tools/, where shared.py is

import shared
from quantizing import calibration, job
from quantizing.formats import FORMATS
from quantizing.layer import METHODS
from quantizing.rounding import BITS, Grid
from quantizing.source import Source

from r1 import Backend, InputError, Tokenizer
from r1.files.embedded import domain_of
from r1.switches import flags
from r1.switches.backend import choices
from r1.writing import check_new

MOST_ROWS, MOST_LENGTH = 10**6, 10**6


def parser() -> argparse.ArgumentParser:
    out = shared.parser(__doc__)
    out.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint's folder")
    out.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    out.add_argument("--method", choices=METHODS, required=True, help="how numbers are rounded")
    out.add_argument(
        "--bits", type=int, choices=BITS, default=4,
        help="of a number (default 4); 2 and 3 are for studies: they are stored in 4",
    )  # fmt: skip
    out.add_argument(
        "--group", type=int, default=128, metavar="N",
        help="columns that share a scale (default 128; 0: a whole row). Where N does not divide a "
        "matrix, its groups are smaller",
    )  # fmt: skip
    out.add_argument("--experts-only", action="store_true", help="quantize only routed experts")
    out.add_argument(
        "--format", choices=FORMATS, default="compressed-tensors",
        help="of the files: compressed-tensors (default), its pack-quantized, symmetric; or awq, "
        "AutoAWQ's gemm, with zero points",
    )  # fmt: skip
    text = out.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, metavar="FILE", help="calibrate on this text")
    text.add_argument(
        "--questions", type=Path, metavar="FILE",
        help="calibrate on the model's answers to these questions, one a line (the embedded "
        "tiny-r1 has its own)",
    )  # fmt: skip
    out.add_argument(
        "-n", type=int, default=256, metavar="N", help="rows of text, or questions (default 256)"
    )
    out.add_argument("--length", type=int, default=512, metavar="N", help="tokens (default 512)")
    out.add_argument(
        "--seed", type=flags.seed, default=0, help="of tiny-r1's questions (default 0)"
    )
    out.add_argument("--device", choices=choices()["device"], default="auto", help="default auto")
    out.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of a layer in memory (fp32)"
    )
    shared.add_output(out, "write what was seen of each layer as JSON, with each expert's tokens")
    return out


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for input that can't be used."""
    return shared.run(__file__, work, parser().parse_args(argv))


def work(arguments: argparse.Namespace) -> int:
    a = arguments
    _check(a)
    check_new(a.out)
    shared.check_output(a.output)
    form = FORMATS[a.format]
    grid = Grid(a.bits, a.group, form.zeros, form.scale)
    text = _text(a)
    plan = job.Plan(a.method, grid, a.format, a.experts_only, text)
    source = Source(a.model, a.device, a.dtype)
    rows = _rows(a, source) if a.method != "rtn" else list
    reports = job.run(source, a.out, plan, rows, lambda line: print(line, flush=True))
    if a.output:
        record = {"command": shared.command(__file__), "layers": reports}
        a.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _check(a: argparse.Namespace) -> None:
    """Raises InputError for flags that don't go together, before anything is read."""
    form = FORMATS[a.format]
    if a.bits not in form.bits:
        raise InputError(f"--bits {a.bits}: {a.format} has no numbers of {a.bits} bits")
    if not 0 <= a.group < 2**31:
        raise InputError(f"--group {a.group}: give columns, such as 128, or 0 for a whole row")
    for flag, value, most in (("-n", a.n, MOST_ROWS), ("--length", a.length, MOST_LENGTH)):
        if not 2 <= value <= most:
            raise InputError(f"{flag} {value}: give 2 to {most}")
    given = "--text" if a.text else "--questions" if a.questions else None
    if a.method == "rtn" and given:
        raise InputError(f"{given}: rtn looks at no text, so leave it out, or use gptq or awq")
    if a.method != "rtn" and not given and domain_of(a.model) is None:
        raise InputError(
            f"--method {a.method} looks at what the layers read: give --text FILE, or --questions "
            "FILE for the model to answer"
        )


def _text(a: argparse.Namespace) -> str:
    """What the calibration reads, in a few words: a killed run goes on with the same only."""
    if a.method == "rtn":
        return ""
    path = a.text or a.questions
    kind = "text" if a.text else "questions"
    try:
        told = hashlib.sha256(path.read_bytes()).hexdigest() if path else f"own {a.seed}"
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): give a text file") from None
    return f"{kind} {told}, {a.n} of {a.length}"


def _rows(a: argparse.Namespace, source: Source) -> Callable[[], list[list[int]]]:
    """The function that makes the calibration's rows of tokens."""
    length = min(a.length, source.config.max_position_embeddings)

    def rows() -> list[list[int]]:
        if a.text:
            tokenizer = Tokenizer.load(a.model, bos_id=source.config.bos_token_id)
            tokenizer.check(source.config.vocab_size)
            return calibration.from_text(tokenizer, a.text, a.n, length)
        questions = (
            calibration.questions_in(a.questions)[: a.n]
            if a.questions
            else calibration.training_questions(a.model, a.n, a.seed)
        )
        backend = Backend(device=a.device, dtype=a.dtype, quant="none")
        return calibration.own_answers(a.model, backend, questions or [], length, print)

    return rows


if __name__ == "__main__":
    sys.exit(main())
