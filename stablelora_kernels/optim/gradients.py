"""The gradients of a step: how they lie in memory, and copies of those that the step cannot read where they lie."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, empty_like


class Layout(NamedTuple):
    """How contiguous tensors lie in memory. Equal from one step to the next if nothing was reallocated."""

    addresses: list[int]
    dtypes: list[torch.dtype]


def layout_of(tensors: Sequence[Any]) -> Layout | None:
    """The layout of ``tensors``; None if one is missing, not contiguous or without storage of its own.

    Passes over every tensor take most of a step's host time, so this makes as few as possible.
    """
    try:
        addresses = list(map(Tensor.data_ptr, tensors))
    except (TypeError, RuntimeError):
        return None
    return Layout(addresses, [t.dtype for t in tensors]) if all(map(Tensor.is_contiguous, tensors)) else None


class Gradients:
    """The gradients of some parameters, read when first asked for.

    A step whose gradients lie where the last step's did asks for their layout alone, so that Python touches no gradient.
    """

    def __init__(self, params: Sequence[Tensor] = (), tensors: list[Tensor | None] | None = None) -> None:
        """``tensors``: the gradients themselves, if they are not those of ``params``."""
        self.params = params
        if tensors is not None:
            self.tensors = tensors

    @cached_property
    def tensors(self) -> list[Tensor | None]:
        """One gradient a parameter, None for none."""
        return [p.grad for p in self.params]

    @cached_property
    def layout(self) -> Layout | None:
        """Their :func:`layout_of`."""
        return layout_of(self.tensors)

    def of(self, indices: Sequence[int]) -> Gradients:
        """The gradients at ``indices``."""
        return Gradients(tensors=[self.tensors[i] for i in indices])


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
    return empty_like(p, dtype=grad.dtype).copy_(grad)
