"""``LoRAQuantizedLinear``: LoRA on a frozen layer in 4 or 8 bits, whose weight is never kept in full."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from stablelora_kernels.functional import lora_linear
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.quantized import NF4Weight, read


class LoRAQuantizedLinear(LoRALinear):
    """A :class:`~stablelora_kernels.LoRALinear` whose ``weight`` is bitsandbytes' ``Params4bit`` or torchao's ``Float8Tensor``.

    ``LoRALinear.from_linear`` makes it. ``weight`` and ``bias`` are the given layer's own, and move as they do. The layer
    computes in what ``Linear4bit`` was told to (``compute_dtype``; where it was not told, in its input's dtype), and
    returns its input's. A and B are float32 or of that dtype.

    It can't be merged: the sum would have to be quantized anew, which loses more than most branches add. ``remove_lora(model,
    merge=False)`` gives the layer back. ``state_dict`` holds A and B and what the layer's own would hold; of bitsandbytes'
    that loads as little as it does without LoRA.
    """

    def _hold(self, base: nn.Linear) -> None:
        super()._hold(base)
        # Unregistered; it is for to_linear() alone, and its weight is what it was before a move to another device.
        self.__dict__["_base"] = base

    @staticmethod
    def _dtype_of(base: nn.Linear) -> torch.dtype:
        # Refuses what can't be read.
        if isinstance(read(base.weight), NF4Weight):
            return getattr(base, "compute_dtype", None) or torch.float32
        return base.weight.dtype

    def to_linear(self) -> nn.Linear:
        base: nn.Linear = self.__dict__["_base"]
        base.weight = self.weight
        base.register_parameter("bias", self.bias)
        return base.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in_features] to [..., out_features], in x's dtype (autocast's where that is on)."""
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = x.dtype if autocast else getattr(self.__dict__["_base"], "compute_dtype", None) or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        y = lora_linear(
            x.to(dtype),
            read(self.weight),
            bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.lora_dropout,
            self.training,
        )
        return y if autocast else y.to(x.dtype)

    def merge(self) -> NoReturn:
        """Not possible.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"a weight in {self.weight.dtype} storage ({type(self.weight).__name__}) would have to be quantized anew to be "
            "merged, which loses more than most branches add; dequantize the layer first, or remove_lora(model, merge=False)"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None)
        if state is not None:
            # As Linear4bit does.
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {type(self.weight).__name__}"
