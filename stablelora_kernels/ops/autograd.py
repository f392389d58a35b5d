"""What the package's autograd functions share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stablelora_kernels.ops.matrices import as_matrix
from stablelora_kernels.projection import BIASES, WEIGHTS
from stablelora_kernels.utils.tensors import outside_autocast

Returned = TypeVar("Returned")


class Context(Protocol):
    """What an autograd function's ``ctx`` has."""

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def first_derivative(backward: Callable[..., Returned]) -> Callable[..., Returned]:
    """``backward`` of an autograd function, once differentiable and in the dtypes of its forward,
    autocast or not.
    """
    careful: Callable[..., Returned] = once_differentiable(outside_autocast(backward))

    @functools.wraps(backward)
    def run(ctx: Context, *grads: Tensor | None) -> Returned:
        # The usual backward pass needs no care, which would take longer than the rest of this
        # function's Python.
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or torch._C._is_any_autocast_enabled()
        ):
            return careful(ctx, *grads)
        return backward(ctx, *grads)

    return run


def apply_of_known_calls(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for calls with a key, which are neither traced nor transformed."""
    # Function.apply would ask about every argument, then calls this.
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


class _Keep(torch.autograd.Function):
    """x itself; its node saves x and ``others``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, others: Sequence[Tensor | None]) -> Tensor:
        # In a list, into which autograd does not look: none of them gets a gradient here.
        ctx.save_for_backward(x, *others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Kept(NamedTuple):
    """What :func:`keep` returns."""

    # x, as a node's output.
    x: Tensor
    # Its ``saved_tensors`` are x and the others. None if there is no node.
    node: Any


def keep(x: Tensor, others: Sequence[Tensor | None]) -> Kept:
    """Save x and ``others`` in a node in front of the one that computes, which then saves nothing.

    Non-reentrant activation checkpointing computes a layer again up to the last tensor that it has
    saved: it stops here, if nothing behind the computing node saves a tensor.

    There is no node if x gets no gradient, nor in a compiled graph: the computing node saves then.
    """
    if torch.compiler.is_compiling() or not x.requires_grad:
        return Kept(x, None)
    x = _Keep.apply(x, others)  # type: ignore[no-untyped-call]
    return Kept(x, x.grad_fn)


def read_by_backward(operands: Sequence[Tensor | None], weights: bool) -> list[Tensor | None]:
    """``operands`` without those that backward does not read: biases, and unless ``weights``,
    weights.
    """
    nothing = [None] * (len(operands) // 4)
    read = [*operands]
    read[BIASES] = nothing
    if not weights:
        read[WEIGHTS] = nothing
    return read


def distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A view in place of a tensor that comes a second time, such as a shared A: torch.compile
    refuses it otherwise.
    """
    distinct: list[Tensor | None] = []
    for t in tensors:
        if t is not None and any(t is earlier for earlier in distinct):
            t = t.view(t.shape)
        distinct.append(t)
    return distinct


def weight_gradient(x: Tensor | None, dy: Tensor) -> Tensor:
    """dW = dY^T X, [N, K], for x [..., K] and dY [..., N]."""
    assert x is not None
    return as_matrix(dy).t() @ as_matrix(x)


def bias_gradient(dy: Tensor) -> Tensor:
    """The sum of dY over its rows."""
    return as_matrix(dy).sum(0)
