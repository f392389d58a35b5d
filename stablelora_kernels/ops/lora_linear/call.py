"""The records of ``lora_linear``: the arguments and the results of its forward and its backward, and
what follows from the key of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.dispatch.tallies import Tally
from stablelora_kernels.ops.formulas import Wanted
from stablelora_kernels.ops.plans import Entry
from stablelora_kernels.projection import OPERANDS, scale_count_of, split


class LinearForwardSettings(NamedTuple):
    """The arguments of ``lora_linear_fwd`` that are no tensors."""

    layouts: tuple[int, ...]
    # s'.
    scalings: tuple[float, ...]
    dropout_p: float
    save_s: bool
    save_mask: bool


class LinearForwardCall(NamedTuple):
    """The arguments of ``lora_linear_fwd``."""

    x: Tensor
    # That of a lone branch.
    base: Tensor | None
    # ``projection.operands_of`` and ``scales_of`` of the projections.
    operands: Sequence[Tensor | None]
    scales: Sequence[Tensor]
    # None without dropout.
    seeds: Sequence[Tensor | None]
    settings: LinearForwardSettings

    @staticmethod
    def of(tensors: Sequence[Any], settings: LinearForwardSettings) -> LinearForwardCall:
        """The call of its tensors, one after another."""
        count = len(settings.scalings)
        x, base, *others = tensors
        lengths = (OPERANDS * count, scale_count_of(settings.layouts), count)
        operands, scales, seeds = split(others, lengths)
        return LinearForwardCall(x, base, operands, scales, seeds, settings)


class LinearForwardResults(NamedTuple):
    """The Y's [..., N], and what backward needs."""

    ys: Sequence[Tensor]
    # Each projection's, or one matrix that has all of them side by side; on Triton it is empty if
    # it is not saved.
    s: Sequence[Tensor]
    # Empty if they are not saved.
    masks: Sequence[Tensor | None]


class LinearBackwardSettings(NamedTuple):
    """The arguments of ``lora_linear_bwd`` that are no tensors."""

    layouts: tuple[int, ...]
    scalings: tuple[float, ...]
    dropout_p: float
    need_x: bool
    need_a: bool
    need_b: bool

    @property
    def wanted(self) -> Wanted:
        """Of each projection."""
        return Wanted(self.need_x, self.need_a, self.need_b)


class LinearBackwardCall(NamedTuple):
    """The arguments of ``lora_linear_bwd``."""

    # None if dA is not needed.
    x: Tensor | None
    grads: Sequence[Tensor]
    # Biases are None, and so is the data of a weight that dX does not read, or that a lone branch
    # does not have.
    operands: Sequence[Tensor | None]
    scales: Sequence[Tensor]
    # Each projection's S, or one matrix that has all of them side by side.
    s: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    settings: LinearBackwardSettings

    @staticmethod
    def of(tensors: Sequence[Any], settings: LinearBackwardSettings) -> LinearBackwardCall:
        """The call of its tensors, one after another."""
        count = len(settings.scalings)
        x, *others = tensors
        known_count = (1 + OPERANDS + 1) * count + scale_count_of(settings.layouts)
        lengths = (
            count,
            OPERANDS * count,
            scale_count_of(settings.layouts),
            len(others) - known_count,
            count,
        )
        arguments: Any = (x, *split(others, lengths), settings)
        return LinearBackwardCall(*arguments)


class LinearBackwardResults(NamedTuple):
    """dX [..., K], the dA's and the dB's. What is not needed is empty."""

    dx: Tensor
    das: Sequence[Tensor]
    dbs: Sequence[Tensor]


class LinearFacts(NamedTuple):
    """What follows from the key of a call."""

    # "one by one", by "plain operators", "with gradients" or "without gradients".
    strategy: str
    backend: str
    x_dtype: torch.dtype
    # Whether there is a base product in place of a weight.
    is_branch: bool
    operand_count: int
    scale_count: int
    forward: LinearForwardSettings
    # The gradients of all A's, or of none, are needed; so are those of the B's.
    backward: LinearBackwardSettings
    # Which weights and biases require gradients.
    need_weights: tuple[bool, ...]
    need_biases: tuple[bool, ...]
    # "one by one": the projections' own entries.
    members: tuple[Entry, ...]
    # Of calls on the PyTorch path that have a key.
    tally: Tally | None = None


def branches_in(operands: Sequence[Tensor | None], kind: slice) -> list[Tensor]:
    """The A's or the B's among ``operands``, where every projection has one."""
    return [t for t in operands[kind] if t is not None]


def split_s(s: Sequence[Tensor], lora_As: Sequence[Tensor]) -> list[Tensor]:
    """Each projection's S, of one matrix that has all of them, or if they are separate already."""
    if len(s) == 1 and len(lora_As) > 1:
        return list(s[0].split([lora_A.shape[0] for lora_A in lora_As], 1))
    return list(s)
