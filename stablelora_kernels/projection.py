"""A frozen weight with its LoRA branch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from stablelora_kernels.quantized import FP8Weight, NF4Weight, Stored


class Projection(NamedTuple):
    """The operands of one projection."""

    weight: Tensor | Stored | NF4Weight | FP8Weight | None
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float
