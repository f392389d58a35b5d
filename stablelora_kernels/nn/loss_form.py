"""What the forward of a causal language model computes between its head and its loss, read from its
source.

Known are forwards of this form, as most of transformers' are::

    logits = self.HEAD(...)
    TRANSFORM                     # nothing, a scale or a soft cap
    loss = None
    if labels is not None:
        loss = self.loss_function(logits, labels, ...)
    ...
    return OUTPUT(loss=loss, logits=logits, ...)

whose other statements read no logits, and which use ``self`` only to read its attributes.

A trial run in place of the source was tried: a shallow copy of the model with stand-ins for its
modules, whose head returns logits that note a scale or a soft cap. A trial sees one branch: it
accepts ``if h.shape[1] > 5: logits = logits.clamp(max=0.05)``, which the source refuses. It is safe
only if the logits of each later call can still be computed, and that takes 1,500 tokens more.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from stablelora_kernels.utils.refusal import Refusal


class Transform(NamedTuple):
    """``softcap · tanh(logit_scale · z / softcap)`` of a head's outputs z."""

    softcap: float | None = None
    logit_scale: float = 1.0


def _unchanged(model: Any) -> Transform:
    return Transform()


def _capped(model: Any) -> Transform:
    # Gemma's
    return Transform(softcap=model.config.final_logit_softcapping)


def _scaled(model: Any) -> Transform:
    # Cohere's
    return Transform(logit_scale=model.logit_scale)


def _divided(model: Any) -> Transform:
    # Granite's
    return Transform(logit_scale=1.0 / model.config.logits_scaling)


# By the statements between the head and the loss, as ast.unparse writes them.
TRANSFORMS: dict[str, Callable[[Any], Transform]] = {
    "": _unchanged,
    "logits = logits * self.logit_scale": _scaled,
    "logits = logits / self.config.logits_scaling": _divided,
    "if self.config.final_logit_softcapping is not None:\n"
    "    logits = logits / self.config.final_logit_softcapping\n"
    "    logits = torch.tanh(logits)\n"
    "    logits = logits * self.config.final_logit_softcapping": _capped,
}


class LossForm(NamedTuple):
    """A forward that is known."""

    # The attribute that holds the head.
    head: str
    # Reads the transform of a model.
    transform: Callable[[Any], Transform]


@functools.cache
def loss_form_of(kind: type) -> LossForm | Refusal:
    """The form of the forward of a model's class, or why it is not known."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))  # type: ignore[attr-defined]
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return Refusal(f"the source of {kind.__name__}.forward can't be read")
    assert isinstance(function, ast.FunctionDef)
    unknown = Refusal(f"{kind.__name__}.forward computes its loss in a way that is not known")
    if _needs_the_model(function):
        return unknown
    statements = function.body
    heads = [place for place, statement in enumerate(statements) if _head_of(statement)]
    losses = [place for place, statement in enumerate(statements) if _is_loss(statement)]
    if len(heads) != 1 or len(losses) != 1:
        return unknown
    head = _head_of(statements[heads[0]])
    between = statements[heads[0] + 1 : losses[0]]
    text = "\n".join(map(ast.unparse, between)).replace("loss = None", "").strip()
    transform = TRANSFORMS.get(text)
    if transform is None or head is None or _count(function, head) != 1:
        return unknown
    rest = statements[losses[0] :]
    # The loss's argument, and that of the returned output.
    if _reads_logits(rest) != 2 or not _returns_logits(statements[-1]):
        return unknown
    return LossForm(head, transform)


def _needs_the_model(function: ast.FunctionDef) -> bool:
    """Whether a forward does more with ``self`` than to read its attributes, so that nothing may
    stand for it: it passes it on, sets an attribute, calls ``super()``, or records outputs.
    """
    if any("capture_outputs" in ast.unparse(decorator) for decorator in function.decorator_list):
        return True
    names = [node for node in _nodes(function.body) if isinstance(node, ast.Name)]
    attributes = [node for node in _nodes(function.body) if isinstance(node, ast.Attribute)]
    read = sum(
        isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and isinstance(node.ctx, ast.Load)
        for node in attributes
    )
    return read != sum(node.id == "self" for node in names) or any(
        node.id == "super" for node in names
    )


def _head_of(statement: ast.stmt) -> str | None:
    """HEAD of ``logits = self.HEAD(...)``; None for another statement. Of another module's HEAD,
    :func:`_count` finds none.
    """
    if not isinstance(statement, ast.Assign) or ast.unparse(statement.targets[0]) != "logits":
        return None
    call = statement.value
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return None
    return call.func.attr


def _is_loss(statement: ast.stmt) -> bool:
    """Whether it is ``if labels is not None: loss = self.loss_function(logits, labels, ...)``."""
    if not isinstance(statement, ast.If) or ast.unparse(statement.test) != "labels is not None":
        return False
    if len(statement.body) != 1:
        return False
    text = ast.unparse(statement.body[0])
    starts = (
        "loss = self.loss_function(logits, labels, ",
        "loss = self.loss_function(logits=logits, labels=labels, ",
    )
    return text.startswith(starts)


def _count(function: ast.FunctionDef, name: str) -> int:
    """How often a function's body names ``self.NAME``."""
    return sum(
        isinstance(node, ast.Attribute) and ast.unparse(node) == f"self.{name}"
        for node in _nodes(function.body)
    )


def _reads_logits(statements: list[ast.stmt]) -> int:
    """How often the statements name the logits."""
    return sum(isinstance(node, ast.Name) and node.id == "logits" for node in _nodes(statements))


def _returns_logits(statement: ast.stmt) -> bool:
    """Whether it is ``return OUTPUT(..., logits=logits, ...)``."""
    if not isinstance(statement, ast.Return) or not isinstance(statement.value, ast.Call):
        return False
    return any(
        keyword.arg == "logits" and ast.unparse(keyword.value) == "logits"
        for keyword in statement.value.keywords
    )


def _nodes(statements: list[ast.stmt]) -> Iterator[ast.AST]:
    for statement in statements:
        yield from ast.walk(statement)
