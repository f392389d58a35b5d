"""``LoRABranchLinear``: LoRA on a layer that computes its own product."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from stablelora_kernels.functional import FLOAT_DTYPES, lora_branch
from stablelora_kernels.nn.linear import LoRALinear


class LoRABranchLinear(LoRALinear):
    """LoRA on a frozen layer that computes its own product: ``y = base_layer(x) + scaling · D(x) A^T B^T``.

    ``LoRALinear.from_linear`` makes it over bitsandbytes' ``Linear8bitLt`` and over an ``nn.Linear`` whose weight is a tensor
    subclass, such as torchao's. ``base_layer`` is the original layer, a submodule as in PEFT; ``weight`` and ``bias`` are its
    own. :func:`~stablelora_kernels.functional.lora_branch` adds the branch in one launch (two above 4,096 rows or rank 128).

    It can't be merged. ``remove_lora(model, merge=False)`` returns the original layer.
    """

    base_layer: nn.Linear
    calls_base = True

    def _attach(self, base: Any) -> None:
        self.base_layer = base

    @staticmethod
    def _compute_dtype(base: Any) -> torch.dtype:
        return base.weight.dtype if base.weight.dtype in FLOAT_DTYPES else torch.float32

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return cast(nn.Parameter, self.base_layer.weight)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.base_layer.bias

    def to_linear(self) -> nn.Module:
        """The original layer."""
        return self.base_layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., in_features] to [..., out_features], in the dtype that the base layer returns.

        Raises:
            RuntimeError: ``x`` requires a gradient, but the base layer's result does not.
        """
        if self._disabled:
            return self.base_layer(x)
        base_out = self.base_layer(x)
        if torch.is_grad_enabled() and x.requires_grad and not base_out.requires_grad:
            raise RuntimeError(
                f"base_layer must give its input a gradient, got a result without one from a {type(self.base_layer).__name__} "
                f"with a {type(self.weight).__name__}; the layers before it would train on the branch's gradient alone"
            )
        return lora_branch(base_out, x, self.lora_A, self.lora_B, self.scaling, self.lora_dropout, self.training)

    def merge(self) -> NoReturn:
        """Not possible.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"the weight is a {type(self.weight).__name__} that only its {type(self.base_layer).__name__} can read, so nothing "
            "can be added to it; keep the branch, or remove_lora(model, merge=False)"
        )
