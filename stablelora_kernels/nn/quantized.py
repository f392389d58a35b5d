"""``LoRAQuantizedLinear``: LoRA on a frozen 4-bit or float8 layer. The kernels read the quantized
weight.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from stablelora_kernels.functional import lora_linear
from stablelora_kernels.nn.factory import BaseLayer
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.quantized import NF4Weight, is_quantized, read
from stablelora_kernels.utils.tensors import autocast_dtype


class LoRAQuantizedLinear(LoRALinear):
    """A :class:`~stablelora_kernels.LoRALinear` whose ``weight`` is bitsandbytes' ``Params4bit`` or
    torchao's ``Float8Tensor``.

    ``LoRALinear.from_linear`` makes it. ``weight`` and ``bias`` belong to the given layer and move
    as they do there. The layer computes in the ``compute_dtype`` of ``Linear4bit``, or in its
    input's dtype if that is not set, and returns its input's dtype. A and B are float32 or of the
    compute dtype.

    It can't be merged: the sum would have to be quantized again, which loses more than most
    branches add. ``remove_lora(model, merge=False)`` returns the original layer. ``state_dict``
    holds A, B and everything that the original layer saves; bitsandbytes' entries load with the
    same limits as without LoRA.
    """

    keeps_base = True

    @staticmethod
    def check_base(base: BaseLayer) -> None:
        read(base.weight)

    @staticmethod
    def _compute_dtype(base: BaseLayer) -> torch.dtype:
        if isinstance(read(base.weight), NF4Weight):
            return getattr(base, "compute_dtype", None) or torch.float32
        return base.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., in_features] to [..., out_features], in x's dtype or, under autocast, in
        autocast's.
        """
        if self._disabled:
            return self._base_output(x)
        autocast = autocast_dtype(x.device.type) is not None
        dtype = x.dtype
        if not autocast:
            dtype = getattr(self.__dict__["_base"], "compute_dtype", None) or x.dtype
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

    def _base_output(self, x: Tensor) -> Tensor:
        """The output of the original layer, which the call leaves as it was."""
        base: Any = self.__dict__["_base"]
        # Moving this layer to another device gave it another weight or bias.
        base = base if base.weight is self.weight and base.bias is self.bias else self.to_linear()
        # bitsandbytes' layer casts its bias in place, and keeps its first input's dtype
        # permanently.
        bias_data = None if base.bias is None else base.bias.data
        names = ("compute_dtype", "compute_type_is_set")
        settings = {name: getattr(base, name) for name in names if hasattr(base, name)}
        try:
            return base(x)
        finally:
            for name, value in settings.items():
                setattr(base, name, value)
            if bias_data is not None and base.bias.dtype != bias_data.dtype:
                base.bias.data = bias_data

    def merge(self) -> NoReturn:
        """Not possible.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"a weight in {self.weight.dtype} storage ({type(self.weight).__name__}) would have to be quantized anew to be "
            "merged, which loses more than most branches add; dequantize the layer first, or remove_lora(model, merge=False)"
        )

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None)
        if state is not None:
            # Linear4bit saves its quant_state the same way.
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {type(self.weight).__name__}"


def is_kernel_format(weight: Tensor) -> bool:
    """Whether ``weight`` is bitsandbytes' 4-bit parameter, or torchao's float8 tensor with one
    scale a row.
    """
    if type(weight).__name__ != "Float8Tensor":
        return is_quantized(weight)
    try:
        read(weight)
    except ValueError:
        return False
    return True
