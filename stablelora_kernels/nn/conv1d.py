"""``LoRAConv1D``: LoRA on transformers' ``Conv1D``."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from stablelora_kernels.nn.linear import LoRALinear


class LoRAConv1D(LoRALinear):
    """A :class:`~stablelora_kernels.LoRALinear` over transformers' ``Conv1D``, whose ``weight`` is [in_features, out_features].

    The kernels read the weight through its strides. Merging adds ``(scaling · B A)^T``.
    """

    keeps_base = True

    def _base_output(self, x: Tensor) -> Tensor:
        # Conv1D's own operator, whose rounding differs from that of nn.functional.linear.
        y = torch.addmm(cast(Tensor, self.bias), x.reshape(-1, self.in_features), self.frozen_weight)
        return y.view(*x.shape[:-1], self.out_features)

    def _matrix(self) -> Tensor:
        return self.weight.t()

    def _stored_delta(self) -> Tensor:
        return self.delta_weight().t()
