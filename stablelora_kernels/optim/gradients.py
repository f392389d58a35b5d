"""Looking at gradients: where all of them lie, and in which form the step can read them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Where all gradients lie, and their dtypes.
Seen = tuple[list[int], list[torch.dtype]]


def look_at(grads: Sequence[Any]) -> Seen | None:
    """None if a gradient is missing, not contiguous (its address does not tell enough) or has no memory of its own.

    Most of a step's time on the host goes into looks at every tensor, so these are as few as will do.
    """
    try:
        at = list(map(Tensor.data_ptr, grads))
    except (TypeError, RuntimeError):
        return None
    return (at, [g.dtype for g in grads]) if all(map(Tensor.is_contiguous, grads)) else None


def readable(like: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], bool]:
    """The gradients in the dtypes and strides of the dense tensors ``like``, and whether all are there and none is a copy."""
    ready = [
        g if g is None else dense_like(t, g if g.dtype is t.dtype else g.to(t.dtype))
        for t, g in zip(like, grads, strict=True)
    ]
    return ready, all(map(operator.is_, ready, grads)) and all(g is not None for g in ready)


def dense_like(p: Tensor, grad: Tensor) -> Tensor:
    """``grad`` with the strides of ``p``, which is dense, so that both can be walked through as flat memory."""
    if grad.stride() == p.stride():
        return grad
    return torch.empty_like(p, dtype=grad.dtype).copy_(grad)
