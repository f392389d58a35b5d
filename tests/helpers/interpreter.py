"""Triton's interpreter, without work that it does again and again."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any


def patch_language_once_a_launch() -> None:
    """A quarter of our tests' time under the interpreter, saved.

    Triton's interpreter puts its own functions into ``triton.language`` as a kernel starts, and takes them out as it ends. It
    does so anew, in a millisecond, for every call of a function *within* a kernel, where all of it is in place already.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # Another Triton's.
    original = interpreter._patch_lang
    # What is patched at present: of which modules a function sees.
    seen: set[frozenset[str]] = set()

    def patch(fn: Any) -> Any:
        languages = frozenset(
            value.__name__ for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)
        )
        if languages in seen:
            # That of a call within a kernel, whose scope nobody restores.
            return interpreter._LangPatchScope()
        scope, outermost = original(fn), not seen
        seen.add(languages)
        if outermost:
            restore = scope.restore

            def restore_all() -> None:
                seen.clear()
                restore()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch
