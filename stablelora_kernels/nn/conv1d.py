"""``LoRAConv1D``: LoRA on transformers' ``Conv1D``."""

from __future__ import annotations

from torch import Tensor

from stablelora_kernels.nn.linear import LoRALinear


class LoRAConv1D(LoRALinear):
    """A :class:`~stablelora_kernels.LoRALinear` over transformers' ``Conv1D``, whose ``weight`` is [in_features, out_features].

    The kernels read the weight through its strides. Merging adds ``(scaling · B A)^T``.
    """

    keeps_base = True

    def _matrix(self) -> Tensor:
        return self.weight.t()

    def _stored_delta(self) -> Tensor:
        return self.delta_weight().t()
