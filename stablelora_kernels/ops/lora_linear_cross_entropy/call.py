"""The records of ``lora_linear_cross_entropy``: the arguments and the results of its op, and a chunk of
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A probability below 1 / V is subnormal in float16, which then holds few bits of it.
FLOAT16_UNIT = 256.0


class CrossEntropySettings(NamedTuple):
    """The arguments of ``lora_linear_cross_entropy`` that are no tensors."""

    ignore_index: int
    scaling: float
    # 0 is no cap.
    softcap: float
    logit_scale: float
    backend: str
    need_hidden: bool = False
    need_s: bool = False
    need_b: bool = False
    need_bias: bool = False
    need_entropy: bool = False

    @property
    def needs_gradient(self) -> bool:
        return self.need_hidden or self.need_s or self.need_b or self.need_bias


class CrossEntropyCall(NamedTuple):
    """The arguments of ``lora_linear_cross_entropy``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    # None with lora_B None: no branch.
    s: Tensor | None
    lora_B: Tensor | None
    labels: Tensor
    # g by token; None: 1.
    row_scale: Tensor | None
    # h by token, the gradient of its entropy; None: 0.
    entropy_scale: Tensor | None
    settings: CrossEntropySettings

    @staticmethod
    def of(tensors: Sequence[Any], settings: CrossEntropySettings) -> CrossEntropyCall:
        """The call of its tensors, one after another."""
        return CrossEntropyCall(*tensors, settings)  # type: ignore[call-arg]

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def unit(self) -> float:
        """The factor by which dX, dS, dB and dbias are returned too large."""
        is_float16 = self.hidden.dtype == torch.float16
        return FLOAT16_UNIT if is_float16 and self.row_scale is None else 1.0


class CrossEntropyResults(NamedTuple):
    """The losses [T] and the entropies [T], and dX [T, H], dS [T, r], dB [V, r] and dbias [V], each
    times ``unit``; those that are not needed are empty.
    """

    losses: Tensor
    entropies: Tensor
    dhidden: Tensor
    ds: Tensor
    db: Tensor
    dbias: Tensor


class Chunk(NamedTuple):
    """Logits [rows, V], which dZ replaces, with labels, and each row's gradients of loss and entropy
    or None.
    """

    logits: Tensor
    labels: Tensor
    row_scale: Tensor | None
    entropy_scale: Tensor | None = None


class OfTokens(NamedTuple):
    """The losses [rows], and the entropies [rows], which are empty if they are not needed."""

    losses: Tensor
    entropies: Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and of sums over tokens."""
    return torch.promote_types(dtype, torch.float32)
