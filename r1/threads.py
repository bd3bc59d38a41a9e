"""How many CPU threads the commands use: `--threads`, and a default that fits the model's size.

Torch has one number of threads for the whole process. So this is no switch of `Backend`, and
`r1.load` does not set it: a library changes nothing around its user. The commands own their
processes, and set it there.
"""

from __future__ import annotations

import argparse
import os

import torch

from r1.build import count_parameters
from r1.device import DTYPES
from r1.model.config import Config

BYTES_PER_THREAD = 2**27
"""Weights in bytes for which the default takes one thread.

Every operation of a step ends when its slowest thread does. A second thread halves the work of each
operation at best, and waits if another program has its CPU. Milliseconds per token, fp32, on two
CPUs (AMD EPYC), with one and with two threads:

weights    nothing else runs    eight other programs run
 12 MB         3.6,  3.4               5.0, 130
117 MB        15.1, 13.0              33.6, 227
220 MB        24.1, 21.8              54.3, 496
524 MB        51.6, 34.9               127, 712
"""


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--threads`."""
    text = (
        f"CPU threads (default: OMP_NUM_THREADS if it is set, else one for each "
        f"{BYTES_PER_THREAD // 2**20} MiB of weights and at least one: on a busy machine more "
        "threads make a small model many times slower)"
    )
    parser.add_argument("--threads", type=_count, metavar="N", help=text)


def _count(text: str) -> int:
    """A number of threads, at most one for each CPU."""
    most = os.cpu_count() or 1
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= most:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a whole number from 1 to {most}, the number of CPUs here"
        )
    return int(text)


def choose(asked: int | None, device: str, config: Config, dtype: str) -> int | None:
    """The number of threads for a model with weights of this dtype; "auto" counts as fp32.

    None where a GPU does the work, unless a number is `asked` for: then torch's own is right.
    """
    if asked is not None or device != "cpu":
        return asked
    most = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        return most
    size = DTYPES["fp32" if dtype == "auto" else dtype].itemsize
    return max(1, min(most, count_parameters(config) * size // BYTES_PER_THREAD))
