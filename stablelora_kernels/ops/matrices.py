"""x [..., K] as a matrix [M, K], and a result [M, N] with the leading sizes of x."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_unsafe_view = torch.ops.aten._unsafe_view.default


def row_count(x: Tensor) -> int:
    """M of x [..., K]."""
    # Not Size.numel(), which turns symbolic sizes into numbers.
    return math.prod(x.shape[:-1])


def as_matrix(x: Tensor) -> Tensor:
    """View [..., K] as [M, K]."""
    # Return a matrix itself: a view would be a node of the autograd graph and cost a third of a
    # small product.
    if x.dim() == 2:
        return x
    # Count the rows: PyTorch cannot infer them where K is 0.
    return x.reshape(row_count(x), x.shape[-1])


def like_rows_of(y: Tensor, x: Tensor) -> Tensor:
    """``y`` [M, N], of a custom autograd function, with the leading sizes of x [..., K]: [..., N]."""
    if x.dim() == 2:
        return y
    # Not a view to autograd, which forbids changing such a function's views in place.
    reshaped: Tensor = _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
    return reshaped


def with_own_memory(grad: Tensor) -> Tensor:
    """Give a broadcast gradient, such as sum()'s, its own memory; otherwise each product would
    expand it again.
    """
    # Older versions of torch.compile cannot ask for strides.
    if torch.compiler.is_compiling() or 0 not in grad.stride():
        return grad
    return grad.contiguous()
