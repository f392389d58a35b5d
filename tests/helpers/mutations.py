"""Kernels with a text of their source replaced, in memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest


class Mutation(NamedTuple):
    """``function``, jitted, as if its source had ``by`` wherever it has ``text``."""

    function: Any
    text: str
    by: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        """In Triton's interpreter, whoever calls the function."""
        function, text = self.function, self.text
        # Fills what the rewriter needs.
        function.rewrite()
        rewriter = function.rewriter
        source = rewriter._prepare_source(inspect.getsourcelines(function.fn)[0])
        assert text in source, f"{function.__name__} has no {text!r}"
        made = rewriter._compile_and_exec(rewriter._transform_ast(source.replace(text, self.by)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(type(function).rewritten_fn, function.fn, made)
            yield
