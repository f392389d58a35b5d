"""x [..., K] as a matrix [M, K], in tiles of rows, and a result [M, N] with the leading sizes of x."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_unsafe_view = torch.ops.aten._unsafe_view.default


def row_count(x: Tensor) -> int:
    """M of x [..., K]."""
    # Not Size.numel(), which turns symbolic sizes into numbers.
    return math.prod(x.shape[:-1])


class RowTile(NamedTuple):
    """Some of x's rows, of which an op computes all before the next ones."""

    number: int
    rows: slice


def _row_tile_size(rows: int, most: int) -> int:
    """The rows of a tile, of which there are at most ``most``: those of all but the last."""
    return -(-rows // -(-rows // most)) if rows else most


def row_tile_count(rows: int, most: int) -> int:
    """How many tiles :func:`row_tiles` gives."""
    return -(-rows // _row_tile_size(rows, most))


def row_tiles(rows: int, most: int) -> Iterator[RowTile]:
    """As few tiles of so many ``rows`` as there can be, of about one size."""
    size = _row_tile_size(rows, most)
    for number, start in enumerate(range(0, rows, size)):
        yield RowTile(number, slice(start, min(start + size, rows)))


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
