"""The arguments and results of the ops of ``lora_experts``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from stablelora_kernels.packed_experts import PackedExperts


class ExpertsForward(NamedTuple):
    """The arguments of ``lora_experts_fwd``. The scaling is s'."""

    x: Tensor
    # The ops take the data of a packed stack, and its scales and layout below. _to_multiply puts
    # the stack together.
    weight: Tensor | PackedExperts
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    offsets: Tensor
    keep: Tensor | None
    scales: Sequence[Tensor]
    # A StackLayout, or nothing if the stack is not packed.
    layout: Sequence[int]
    scaling: float
    transposed: bool
    save_s: bool


class ExpertsBackward(NamedTuple):
    """The arguments of ``lora_experts_bwd``. The scaling is s'."""

    x: Tensor | None
    grad: Tensor
    weight: Tensor | PackedExperts
    lora_A: Tensor
    lora_B: Tensor
    s: Tensor
    offsets: Tensor
    keep: Tensor | None
    # As in ExpertsForward.
    scales: Sequence[Tensor]
    layout: Sequence[int]
    scaling: float
    transposed: bool
    need_x: bool
    need_a: bool
    need_b: bool


class ExpertsGradients(NamedTuple):
    """dX [T, K], dA [E, r, K] and dB [E, N, r]; those that are not needed are empty."""

    dx: Tensor
    da: Tensor
    db: Tensor
