"""LoRA on layers that hold no plain [out, in] weight: ``LoRAConv1D``, ``LoRABranchLinear``, and which class a layer takes."""

from __future__ import annotations

from typing import Any

from torch import nn

from stablelora_kernels.nn.branch import LoRABranchLinear
from stablelora_kernels.nn.conv1d import LoRAConv1D
from stablelora_kernels.nn.linear import LoRALinear
from stablelora_kernels.quantized import is_quantized, read
from stablelora_kernels.utils.dtensor import is_sharded


def is_conv1d(module: Any) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``, which needs no transformers to find out."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"


def class_for(base: Any) -> type[LoRALinear]:
    """The class of the LoRA layer over ``base``.

    Raises:
        TypeError: there is none.
        ValueError: ``base`` gives its input no gradient, or is sharded in a way that none can follow.
    """
    if is_conv1d(base):
        return LoRAConv1D
    if not isinstance(base, nn.Linear):
        raise TypeError(f"linear must be an nn.Linear or transformers' Conv1D, got {type(base).__name__}")
    # As torchao's weights for products in 8 bits have it.
    if (kwargs := getattr(base.weight, "act_quant_kwargs", None)) is not None:
        raise ValueError(
            f"linear must give its input a gradient, which a layer that quantizes it does not, got act_quant_kwargs {kwargs}"
        )
    if is_sharded(base.weight):
        from stablelora_kernels.nn.sharded import LoRAShardedLinear, check_shards

        check_shards(base.weight)
        return LoRAShardedLinear
    if is_quantized(base.weight) and not _has_other_scales(base.weight):
        from stablelora_kernels.nn.quantized import LoRAQuantizedLinear

        return LoRAQuantizedLinear
    parts = [part for part in (base.weight, base.bias) if part is not None]
    plain = all(type(part) is nn.Parameter for part in parts) and type(base).__name__ != "Linear8bitLt"
    return LoRALinear if plain else LoRABranchLinear


def _has_other_scales(weight: Any) -> bool:
    """Whether ``weight`` is torchao's float8 with other scales than one a row."""
    if type(weight).__name__ != "Float8Tensor":
        return False
    try:
        read(weight)
    except ValueError:
        return True
    return False
