"""The records of ``lora_rows``' forward and backward: their arguments and their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from stablelora_kernels.projection import split


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
    masks: Sequence[Tensor]


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
    s: Sequence[Tensor]
    masks: Sequence[Tensor]
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
