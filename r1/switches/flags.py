"""The switches as command-line flags: one for each field of Backend, its name with dashes."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import platform
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch

from r1.errors import flags_spelling, setting
from r1.placement.ranks import first_to_speak
from r1.switches.backend import Backend, choices


class Parser(argparse.ArgumentParser):
    """A command's parser: what is wrong is one sentence, without a page of usage before it."""

    def __init__(self, speaker: str, version: str, **options: Any) -> None:
        """`speaker` begins the command's messages, as in "r1: ...". `version` is r1's."""
        super().__init__(**options)
        self.speaker = speaker
        line = f"r1 {version}, torch {torch.__version__}, Python {platform.python_version()}"
        text = "print the versions of r1, torch and Python, and end"
        self.add_argument("--version", action="version", version=line, help=text)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Of several processes with the same command line, one prints."""
        if first_to_speak():
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        sentence = message.removeprefix("argument ")
        takes_text = any(not action.option_strings for action in self._actions)
        if takes_text and re.match(r"unrecognized arguments: -[^a-z-]", sentence):  # as in -5+3
            sentence += ": put -- before a text that begins with a dash"
        sentence = re.sub(r"invalid int value: ('.*')", r"\1: give a whole number", sentence)
        sentence = re.sub(r"invalid float value: ('.*')", r"\1: give a number", sentence)
        self.exit(2, f"{self.speaker}: {sentence}; --help lists the flags\n")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each switch. Those not given stay out of the namespace."""
    group = parser.add_argument_group(
        "switches", "What this machine can do of them: python bench.py --explain."
    )
    values, texts = choices(), explanations()
    for field in dataclasses.fields(Backend):
        flag, absent = "--" + field.name.replace("_", "-"), argparse.SUPPRESS
        text = texts[field.name]
        if field.default is False:
            group.add_argument(flag, action="store_true", default=absent, help=text)
            continue
        text += f" (default: {field.default})" if field.default != "" else ""
        if field.name in values:
            group.add_argument(flag, choices=values[field.name], default=absent, help=text)
        else:
            kind, name = type(field.default), "FILE" if field.default == "" else "N"
            group.add_argument(flag, type=kind, metavar=name, default=absent, help=text)


def add_draft_model(parser: argparse.ArgumentParser) -> None:
    """Add the flag of the folder that `speculate=draft` needs."""
    text = "the folder of the small model of --speculate draft: it has the model's vocabulary"
    parser.add_argument("--draft-model", type=Path, metavar="DIR", help=text)


def explanations() -> dict[str, str]:
    """What each switch does, by its name: the texts below Backend's fields, with flags in them."""
    (backend,) = ast.parse(inspect.getsource(Backend)).body
    assert isinstance(backend, ast.ClassDef)
    found = {}
    for field, text in pairwise(backend.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=words)):
                found[name] = " ".join(str(words).split())
    with flags_spelling():
        return {
            name: re.sub(r"`(\w+)=?([\w-]*)`", lambda m: setting(m[1], m[2] or None), text)
            for name, text in found.items()
        }


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
