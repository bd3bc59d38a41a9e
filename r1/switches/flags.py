"""The switches as command-line flags: one for each field of Backend, its name with dashes."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from r1.switches.backend import Backend, choices


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each switch. Those not given stay out of the namespace."""
    group = parser.add_argument_group(
        "switches (what each means: r1/switches/backend.py; one machine may not do all)"
    )
    values = choices()
    for field in dataclasses.fields(Backend):
        flag, absent = "--" + field.name.replace("_", "-"), argparse.SUPPRESS
        if field.name in values:
            text = f"default {field.default}"
            group.add_argument(flag, choices=values[field.name], default=absent, help=text)
        elif field.default is False:
            group.add_argument(flag, action="store_true", default=absent)
        else:
            group.add_argument(flag, type=int, metavar="N", default=absent, help="default 1")


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
