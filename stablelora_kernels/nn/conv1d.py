"""LoRA on transformers' ``Conv1D``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stablelora_kernels.nn.linear import LoRALinear


class LoRAConv1D(LoRALinear):
    """A :class:`~stablelora_kernels.LoRALinear` over transformers' ``Conv1D``, whose ``weight`` is [in_features, out_features].

    The kernels read it as it lies. Merging adds ``(scaling · B A)^T``.
    """

    def _hold(self, base: Any) -> None:
        super()._hold(base)
        # Unregistered; it is for to_linear() alone.
        self.__dict__["_base"] = base

    def to_linear(self) -> nn.Module:
        """The very ``Conv1D`` that the layer was made of, with the weight, merged or not, and the bias."""
        base: nn.Module = self.__dict__["_base"]
        base.weight = self.weight
        base.register_parameter("bias", self.bias)
        return base.train(self.training)

    def _matrix(self) -> Tensor:
        return self.weight.t()

    def _stored_delta(self) -> Tensor:
        return self.delta_weight().t()
