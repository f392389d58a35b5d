"""Defines the torch.library ops of this package."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from stablelora_kernels.utils.tensors import outside_autocast

NAMESPACE = "stablelora_kernels"


def define_op(
    name: str, schema: str, fake: Callable[..., Any], device_types: Sequence[str] = ("cpu", "cuda")
) -> Callable[[Callable[..., Any]], Any]:
    """Turn the decorated function into the op ``name``. ``fake`` takes its arguments and returns outputs without values."""

    def decorate(function: Callable[..., Any]) -> Any:
        qualified = f"{NAMESPACE}::{name}"
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, device_types, function)  # type: ignore[call-overload]
        torch.library.register_fake(qualified, fake)
        return getattr(getattr(torch.ops, NAMESPACE), name)

    return decorate


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` of an autograd function, once differentiable and in the dtypes of its forward, autocast or not."""
    careful = once_differentiable(outside_autocast(backward))

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        # The usual backward pass needs no care, which would take longer than the rest of this function's Python.
        usual = not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._is_any_autocast_enabled())
        return backward(ctx, *grads) if usual else careful(ctx, *grads)

    return run


def apply(function: type[torch.autograd.Function], entry: Any, *args: Any) -> Any:
    """``function.apply(entry, *args)``. ``entry``: that of the call's key, or None."""
    if entry is None:
        return function.apply(entry, *args)
    # A call with a key is neither traced nor transformed. Function.apply would ask about every argument, then calls this.
    return super(torch.autograd.Function, function).apply(entry, *args)  # type: ignore[misc]
