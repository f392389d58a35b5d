"""What a fused MLP reads of this library's layers, and of frozen ones beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stablelora_kernels.functional import LoRAWeights
from stablelora_kernels.nn.conv1d import LoRAConv1D
from stablelora_kernels.nn.factory import is_conv1d
from stablelora_kernels.nn.fused_mlp import Facts, LayerKind, Operand
from stablelora_kernels.nn.linear import LoRALinear, is_plain, trained_and_bias, weight_and_bias
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear
from stablelora_kernels.quantized import FP8Weight, read


def read_operand(layer: Any, x: Tensor, features: int, dtype: torch.dtype | None) -> Operand | None:
    """A layer's operand for an input like ``x`` with ``features`` features, or None if the layer must compute by itself.

    ``dtype`` is x's, or None under autocast.
    """
    kind, device = type(layer), x.device
    lora_A = lora_B = dropout_p = None
    scaling = 1.0
    weight: Any
    if kind is nn.Linear:
        weight, bias = weight_and_bias(layer)
    elif kind is LoRALinear or kind is LoRAConv1D or kind is LoRAQuantizedLinear:
        if layer._disabled or layer.merged:
            return None
        bias, lora_A, lora_B = trained_and_bias(layer)
        scaling, dropout_p = layer.scaling, layer.lora_dropout if layer.training else 0.0
        weight = layer.weight if kind is LoRAQuantizedLinear else layer._matrix()
    else:
        return None
    if bias is not None and bias.requires_grad:
        return None
    tensors: tuple[Any, ...] = (bias, lora_A, lora_B)
    if kind is LoRAQuantizedLinear:
        # The layer would cast x to another compute dtype, and its result back.
        if dtype is not None and (getattr(layer.__dict__["_base"], "compute_dtype", None) or dtype) != dtype:
            return None
        bias = None if bias is None else bias.to(x.dtype)
        weight = read(weight)
        if weight.stored.data.device != device:
            return None
    elif weight.requires_grad or (dtype is not None and weight.dtype != dtype):
        return None
    else:
        tensors = (weight, *tensors)
    for t in tensors:
        # FSDP parameters are DTensors until FSDP gathers them.
        if t is not None and ((type(t) is not nn.Parameter and type(t) is not Tensor) or t.device != device):
            return None
    if weight.shape[1] != features:
        return None
    return Operand(LoRAWeights(weight, bias, lora_A, lora_B, scaling), dropout_p)


def facts_of(layer: Any) -> Facts | str:
    """What must fit between a layer and the others of its MLP, or why it must compute by itself."""
    kind = type(layer)
    if not isinstance(layer, LoRALinear):
        if kind is not nn.Linear or not is_plain(layer):
            return f"is a {kind.__name__} without an adapter whose weight is not plain"
    elif layer.calls_base:
        base = layer.to_linear()
        text = type(base).__name__ if type(base) is not nn.Linear else f"Linear with a {type(layer.weight).__name__}"
        return f"calls its base layer, a {text}, for its product"
    elif kind not in (LoRALinear, LoRAConv1D, LoRAQuantizedLinear):
        return f"is a {kind.__name__}, which computes more than one product"
    elif layer.merged:
        return "is merged"
    elif layer._disabled:
        return "is disabled"
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        if parameter is not None and parameter.requires_grad:
            return f"has a {name} that trains; the op would keep activations for its gradient"
    dtype: torch.dtype | None = layer.weight.dtype
    if not isinstance(layer, LoRALinear):
        return Facts(None, None, dtype)
    if kind is LoRAQuantizedLinear and not isinstance(read(layer.weight), FP8Weight):
        # A 4-bit layer computes in its input's dtype unless it was told one.
        dtype = getattr(layer.__dict__["_base"], "compute_dtype", None)
    return Facts(layer.lora_dropout, layer.lora_A.dtype, dtype, kind is LoRAQuantizedLinear)


def is_projection(module: Any) -> bool:
    """Whether ``module`` computes a projection, with LoRA or without."""
    return isinstance(module, (nn.Linear, LoRALinear)) or is_conv1d(module)


OWN_LAYERS = LayerKind(is_projection, lambda module: isinstance(module, LoRALinear), read_operand, facts_of)
