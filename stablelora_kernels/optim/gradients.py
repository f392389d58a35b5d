"""Gradients in the layout that the step reads: their addresses, and copies where dtype or strides differ."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class GradientLayout(NamedTuple):
    """The addresses and dtypes of all gradients, equal from one step to the next if nothing was reallocated."""

    addresses: list[int]
    dtypes: list[torch.dtype]


def gradient_layout(grads: Sequence[Any]) -> GradientLayout | None:
    """The layout of ``grads``; None if one is missing, not contiguous or without storage of its own.

    Passes over every tensor take most of a step's host time, so this makes as few as possible.
    """
    try:
        addresses = list(map(Tensor.data_ptr, grads))
    except (TypeError, RuntimeError):
        return None
    return GradientLayout(addresses, [g.dtype for g in grads]) if all(map(Tensor.is_contiguous, grads)) else None


def convert_gradients(like: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], bool]:
    """The gradients in the dtypes and strides of the dense tensors ``like``, and whether none is missing or a copy."""
    converted = [
        g if g is None else with_strides_of(t, g if g.dtype is t.dtype else g.to(t.dtype))
        for t, g in zip(like, grads, strict=True)
    ]
    return converted, all(map(operator.is_, converted, grads)) and all(g is not None for g in converted)


def with_strides_of(p: Tensor, grad: Tensor) -> Tensor:
    """``grad`` with the strides of the dense ``p``, so that flat memory holds both in the same order."""
    if grad.stride() == p.stride():
        return grad
    return torch.empty_like(p, dtype=grad.dtype).copy_(grad)
