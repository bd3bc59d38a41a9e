"""Watches the model's own functions as they run: every tensor that they name, in order.

Python can call a function of ours before each line (sys.settrace). The statement that has just
ended tells which names it assigned, and the local variables tell what they hold. So what is shown
is what ran. There is no second copy of the model here, and a strategy of yours is shown as well.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from r1.model.attend import Attend, UpProjection
from r1.model.dispatch import Dispatch
from r1.model.gqa import GQA
from r1.model.gqa_attend import GroupedAttend
from r1.model.layers import MLP
from r1.model.mla import MLA
from r1.model.moe import MoE
from r1.model.mtp import MTPLayer
from r1.model.router import Router
from r1.model.transformer import Block, Transformer
from r1.tour.letters import Letters, Statement, assignments

WHOLE = (Transformer, MTPLayer)
"""Watched wherever they run."""
PARTS = (MLA, Attend, UpProjection, GQA, GroupedAttend, Router, MoE, Dispatch, MLP)
"""Watched inside the chosen block."""
METHODS = ("forward", "__call__", "keys_values", "by_head", "choose")


@dataclass(frozen=True)
class Made:
    """One tensor that a watched function named."""

    owner: Any  # the object whose method ran
    method: str
    call: int  # tells calls of one method apart
    depth: int  # of the call: how many watched calls it lies in
    file: str
    line: int
    name: str
    letters: Letters | None  # the shape, as the line's comment writes it
    tensor: Tensor

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class _Call:
    """A watched function that is running."""

    number: int
    owner: Any
    statement: Statement | None = None


class Watch:
    """Collects what one block of the model makes, and the model and the MTP layer around it."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.made: list[Made] = []
        self._calls: list[_Call] = []
        self._numbers = itertools.count()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Watch what runs inside the `with`. Another trace, such as a debugger's, pauses."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def take(self) -> list[Made]:
        """What was made since the last `take`, in order."""
        made, self.made = self.made, []
        return made

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        """At the start of any Python function: returns `_line` if it is to be watched."""
        if frame.f_code.co_name not in METHODS:
            return None
        owner = frame.f_locals.get("self")
        inside = any(call.owner is self.block for call in self._calls)
        part = inside and isinstance(owner, PARTS)
        if not (part or owner is self.block or isinstance(owner, WHOLE)):
            return None
        self._calls.append(_Call(next(self._numbers), owner))
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Before each line of a watched function, and at its end."""
        call = self._calls[-1]
        done = call.statement
        if done and (event == "return" or not done.first <= frame.f_lineno <= done.last):
            self._collect(frame, call, done)
            call.statement = None
        if event == "return":
            self._calls.pop()
        elif event == "line" and not call.statement:
            call.statement = _assignment(frame.f_code.co_filename, frame.f_lineno)
        return self._line

    def _collect(self, frame: FrameType, call: _Call, done: Statement) -> None:
        """Note the tensors that a statement has just named."""
        path, method = Path(frame.f_code.co_filename), frame.f_code.co_name
        depth = len(self._calls) - 1
        for name, letters in zip(done.names, done.shapes, strict=True):
            value = frame.f_locals.get(name)
            if isinstance(value, Tensor):
                self.made.append(
                    Made(
                        call.owner, method, call.number, depth, path.name, done.first, name,
                        letters, value,
                    )
                )  # fmt: skip


def _assignment(path: str, line: int) -> Statement | None:
    """The assignment that a line is part of."""
    return next((each for each in assignments(path) if each.first <= line <= each.last), None)


def named(made: list[Made], owner: type, name: str) -> Tensor | None:
    """The last tensor that a method of an `owner` gave this name; None if there is none."""
    return next(
        (m.tensor for m in reversed(made) if isinstance(m.owner, owner) and m.name == name), None
    )
