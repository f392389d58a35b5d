"""Mutated kernels: a text in a kernel's source is replaced, in memory only."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest


class Mutation(NamedTuple):
    """The jitted ``function`` with every ``text`` in its source replaced by ``by``."""

    function: Any
    text: str
    by: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Triton's interpreter runs the mutated function, whoever calls it."""
        function, text = self.function, self.text
        # This sets the rewriter's file name and line.
        function.rewrite()
        rewriter = function.rewriter
        source = rewriter._prepare_source(inspect.getsourcelines(function.fn)[0])
        assert text in source, f"{function.__name__} has no {text!r}"
        made = rewriter._compile_and_exec(rewriter._transform_ast(source.replace(text, self.by)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(type(function).rewritten_fn, function.fn, made)
            yield
