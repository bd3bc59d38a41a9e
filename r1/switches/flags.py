"""The switches as command-line flags: one flag for each field of Backend, under the same name with
dashes."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from r1.switches.backend import CHOICES, NOT_YET, PARALLEL, Backend


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each switch; those not given stay out of the namespace, so that "given" can be
    told from "default"."""
    group = parser.add_argument_group(
        "switches (what each means: r1/switches/backend.py; one machine may not do all)"
    )
    for field in dataclasses.fields(Backend):
        flag = "--" + field.name.replace("_", "-")
        if field.name in CHOICES:
            text = f"default {field.default}"
            text += (
                f"; not built yet: {', '.join(NOT_YET[field.name])}"
                if field.name in NOT_YET
                else ""
            )
            group.add_argument(
                flag, choices=CHOICES[field.name], default=argparse.SUPPRESS, help=text
            )
        elif field.default is False:
            group.add_argument(flag, action="store_true", default=argparse.SUPPRESS)
        else:
            text = "default 1" + ("; not built yet" if field.name in PARALLEL else "")
            group.add_argument(flag, type=int, metavar="N", default=argparse.SUPPRESS, help=text)


def seed(text: str) -> int:
    """A seed as torch's generators take it."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 0 to 2^63 - 1")
    return value


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The switches that the command line names."""
    names = {field.name for field in dataclasses.fields(Backend)}
    return {name: value for name, value in vars(arguments).items() if name in names}
