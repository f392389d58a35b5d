"""The records of ``lora_rows``: the arguments and the results of its forward and its backward, and what
its backward knows beside tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.projection import Projection, split


class RowsSettings(NamedTuple):
    """The arguments of both ops that are no tensors. The sequences have an item a branch."""

    # The rows of x from ``starts`` to before ``ends``.
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    # s'.
    scalings: tuple[float, ...]
    dropout_ps: tuple[float, ...]
    # Whether a gradient of x, and one of an A or a B, is wanted.
    need_x: bool
    need_ab: bool

    @property
    def rows(self) -> list[slice]:
        """The rows of each branch."""
        return [slice(start, end) for start, end in zip(self.starts, self.ends, strict=True)]


class RowsForwardCall(NamedTuple):
    """The arguments of ``lora_rows_fwd``."""

    # [M, K].
    x: Tensor
    # [M, N], contiguous, to which the branches are added.
    y: Tensor
    lora_As: Sequence[Tensor]
    lora_Bs: Sequence[Tensor]
    # None without dropout.
    seeds: Sequence[Tensor | None]
    settings: RowsSettings

    @staticmethod
    def of(tensors: Sequence[Any], settings: RowsSettings) -> RowsForwardCall:
        """The call of its tensors, one after another."""
        x, y, *others = tensors
        lora_As, lora_Bs, seeds = split(others, [len(settings.starts)] * 3)
        return RowsForwardCall(x, y, lora_As, lora_Bs, seeds, settings)


class RowsForwardResults(NamedTuple):
    """What backward needs of each branch; empty where it needs nothing."""

    # [rows, r].
    s: Sequence[Tensor]
    # On the PyTorch path None without dropout.
    masks: Sequence[Tensor | None]


class RowsBackwardCall(NamedTuple):
    """The arguments of ``lora_rows_bwd``."""

    # dY [M, N].
    grad: Tensor
    # [M, K]; None if no dA is wanted.
    x: Tensor | None
    # [M, K], contiguous, to which the branches' gradients are added; None if it is not wanted.
    dx: Tensor | None
    lora_As: Sequence[Tensor]
    lora_Bs: Sequence[Tensor]
    # As in RowsForwardResults; None where it is not needed.
    s: Sequence[Tensor | None]
    masks: Sequence[Tensor | None]
    settings: RowsSettings

    @staticmethod
    def of(tensors: Sequence[Any], settings: RowsSettings) -> RowsBackwardCall:
        """The call of its tensors, one after another."""
        grad, x, dx, *others = tensors
        lists = split(others, [len(settings.starts)] * 4)
        arguments: Any = (grad, x, dx, *lists, settings)
        return RowsBackwardCall(*arguments)


class RowsBackwardResults(NamedTuple):
    """Every dA and dB; none if they are not wanted."""

    das: Sequence[Tensor]
    dbs: Sequence[Tensor]


class RowsFacts(NamedTuple):
    """What backward knows besides tensors."""

    backend: str
    settings: RowsSettings
    x_dtype: torch.dtype


def branches_of(call: RowsForwardCall | RowsBackwardCall) -> list[Projection]:
    """The branches of a call, as projections without a weight."""
    pairs = zip(call.lora_As, call.lora_Bs, call.settings.scalings, strict=True)
    return [Projection(None, None, lora_A, lora_B, scaling) for lora_A, lora_B, scaling in pairs]


def mask_of(masks: Sequence[Tensor | None], i: int) -> Tensor | None:
    """One branch's mask; None if it is not stored."""
    mask = masks[i]
    return None if mask is None or mask.numel() == 0 else mask
