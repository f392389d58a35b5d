"""What a fused MLP reads of this library's layers, and of frozen ones beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stablelora_kernels.functional import LoRAWeights
from stablelora_kernels.nn.conv1d import LoRAConv1D
from stablelora_kernels.nn.factory import is_conv1d
from stablelora_kernels.nn.fused_mlp import Facts, LayerKind, Operand
from stablelora_kernels.nn.linear import LoRALinear, is_plain, trained_and_bias
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear
from stablelora_kernels.quantized import FP8Weight, read


def read_operand(layer: Any, x: Tensor, features: int, dtype: torch.dtype | None) -> Operand | None:
    """A layer's operand for an input like ``x`` with ``features`` features, or None if the layer must compute by itself.

    ``dtype`` is x's, or None under autocast.
    """
    kind, device = type(layer), x.device
    lora_A = lora_B = None
    weight: Any
    if kind is nn.Linear:
        weight, bias = _weight_and_bias(layer)
    elif kind is not LoRALinear and kind is not LoRAConv1D and kind is not LoRAQuantizedLinear:
        return None
    elif layer._disabled or layer.merged:
        return None
    else:
        bias, lora_A, lora_B = trained_and_bias(layer)
        weight = layer.weight if kind is LoRAQuantizedLinear else layer._matrix()
    scaling, dropout_p = 1.0, None
    if lora_A is not None:
        scaling, dropout_p = layer.scaling, layer.lora_dropout if layer.training else 0.0
    if kind is LoRAQuantizedLinear:
        # The layer would cast x to another compute dtype, and its result back.
        if (getattr(layer.__dict__["_base"], "compute_dtype", None) or x.dtype) != x.dtype and dtype is not None:
            return None
        if bias is not None and not bias.requires_grad:
            bias = bias.to(x.dtype)
        tensors = (bias, lora_A, lora_B)
        weight = read(weight)
        if weight.stored.data.device != device:
            return None
    else:
        if weight.requires_grad or (dtype is not None and weight.dtype != dtype):
            return None
        tensors = (weight, bias, lora_A, lora_B)
    if bias is not None and bias.requires_grad:
        return None
    for t in tensors:
        # FSDP parameters are DTensors until FSDP gathers them.
        if t is not None and ((type(t) is not nn.Parameter and type(t) is not Tensor) or t.device != device):
            return None
    if weight.shape[1] != features:
        return None
    return Operand(LoRAWeights(weight, bias, lora_A, lora_B, scaling), dropout_p)


def _weight_and_bias(linear: Any) -> tuple[Any, Any]:
    own = linear._parameters
    try:
        return own["weight"], own["bias"]
    except KeyError:
        # FSDP and parametrizations put plain attributes in their stead.
        return linear.weight, linear.bias


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
    adapter = (layer.lora_dropout, layer.lora_A.dtype) if isinstance(layer, LoRALinear) else (None, None)
    if kind is LoRAQuantizedLinear:
        # A 4-bit layer computes in its input's dtype unless it was told one.
        is_float8 = isinstance(read(layer.weight), FP8Weight)
        dtype = layer.weight.dtype if is_float8 else getattr(layer.__dict__["_base"], "compute_dtype", None)
        return Facts(*adapter, dtype, quantized=True)
    return Facts(*adapter, layer.weight.dtype)


def is_projection(module: Any) -> bool:
    """Whether ``module`` computes a projection, with LoRA or without."""
    return isinstance(module, (nn.Linear, LoRALinear)) or is_conv1d(module)


OWN_LAYERS = LayerKind(is_projection, lambda module: isinstance(module, LoRALinear), read_operand, facts_of)
