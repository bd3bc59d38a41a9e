"""Makes Triton's interpreter quicker. What it computes, and how, stays the same."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


def replace_language_once() -> None:
    """Let the interpreter replace the functions of `triton.language` once per kernel launch.

    Triton does so again in each call of a function within the kernel, where nothing is left to be
    replaced, and looks at all 600 names of the language for it. This took 40% of the time of our
    kernel tests. Of a Triton that has no such step, nothing is changed.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope")):
        return
    replace = interpreter._patch_lang

    @cache
    def languages(fn: Any) -> list[Any]:
        """The modules of the language that a function sees."""
        modules = [each for each in fn.__globals__.values() if inspect.ismodule(each)]
        return [each for each in modules if each in (tl, tl.core)]

    def replace_what_is_left(fn: Any) -> Any:
        if not languages(fn) or any(tl.core.is_builtin(each.load) for each in languages(fn)):
            return replace(fn)
        return interpreter._LangPatchScope()  # nothing was replaced, so nothing is put back

    interpreter._patch_lang = replace_what_is_left
