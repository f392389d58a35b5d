"""The record of a stack of experts, and the calls of ``lora_experts`` that read one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablelora_kernels.ops.formulas import Wanted
from stablelora_kernels.packed_experts import PackedExperts, packed_experts


class StackSettings(NamedTuple):
    """What of a stack is no tensor."""

    # A packed stack's; nothing if the stack is not packed.
    layout: Sequence[int]
    # s; s' in a call with dropout.
    scaling: float
    transposed: bool
    dropout_p: float


class ExpertStack(NamedTuple):
    """One projection of all experts, plain or packed, with its branches; a rank of 0 is no branch."""

    # [E, N, K]; transposed, [E, K, N]. None if nothing reads it.
    weight: Tensor | PackedExperts | None
    # [E, N].
    bias: Tensor | None
    # [E, r, K].
    lora_A: Tensor
    # [E, N, r].
    lora_B: Tensor
    # s; s' in a call with dropout.
    scaling: float
    transposed: bool = False
    dropout_p: float = 0.0
    # Dropout's mask of the rows of a call, or what draws it again.
    keep: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[2]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[1]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[1]

    @property
    def settings(self) -> StackSettings:
        layout = self.weight.layout if isinstance(self.weight, PackedExperts) else ()
        return StackSettings(layout, self.scaling, self.transposed, self.dropout_p)

    def tensors(self) -> list[Tensor | None]:
        """What backward reads, in the order of :meth:`of`."""
        weight = self.weight
        operands = [self.lora_A, self.lora_B, self.keep]
        if isinstance(weight, PackedExperts):
            return [*operands, weight.data, *weight.scales]
        return [*operands, weight]

    @staticmethod
    def of(
        tensors: Sequence[Any], settings: StackSettings, bias: Tensor | None = None
    ) -> ExpertStack:
        """The stack that :meth:`tensors` and :attr:`settings` have taken apart."""
        lora_A, lora_B, keep, weight, *scales = tensors
        if weight is not None and settings.layout:
            weight = packed_experts(weight, scales, settings.layout)
        stack = ExpertStack(weight, bias, lora_A, lora_B, settings.scaling, settings.transposed)
        return stack._replace(dropout_p=settings.dropout_p, keep=keep)

    def without_branch_for(self, dtype: torch.dtype) -> ExpertStack:
        """Itself, a stack without a branch, for an x of ``dtype``."""
        return self._replace(lora_A=self.lora_A.to(dtype), lora_B=self.lora_B.to(dtype))


class ExpertsForwardCall(NamedTuple):
    """A stack's product with rows x [T, K]: Y [T, N] and with ``save_s`` S [T, r], else empty."""

    x: Tensor
    stack: ExpertStack
    # [E]: behind which row each expert ends.
    offsets: Tensor
    save_s: bool


class ExpertsBackwardCall(NamedTuple):
    """The gradients of :class:`ExpertsForwardCall` for dY [T, N]."""

    # Read for dA.
    x: Tensor | None
    grad: Tensor
    # Its weight is read for dX.
    stack: ExpertStack
    offsets: Tensor
    # Read for dB.
    s: Tensor | None
    wanted: Wanted
