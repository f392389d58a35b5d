"""What a fused MLP and a projection group read of this library's layers, and of frozen ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stablelora_kernels.functional import LoRAWeights, lora_linear_group
from stablelora_kernels.nn.conv1d import LoRAConv1D
from stablelora_kernels.nn.fused_mlp import Facts, LayerKind, Operand
from stablelora_kernels.nn.linear import LoRALinear, is_plain, trained_and_bias, weight_and_bias
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear
from stablelora_kernels.quantized import FP8Weight, read
from stablelora_kernels.utils.autocast import autocast_dtype


def read_operand(layer: Any, x: Tensor, dtype: torch.dtype | None) -> Operand | None:
    """A layer's operand for an input like ``x``, or None if the layer must compute by itself.

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
    tensors: tuple[Any, ...] = (bias, lora_A, lora_B)
    if kind is LoRAQuantizedLinear:
        # The layer would cast x to another compute dtype, and its result back.
        if dtype is not None and (getattr(layer.__dict__["_base"], "compute_dtype", None) or dtype) != dtype:
            return None
        bias = None if bias is None else bias.to(x.dtype)
        weight = read(weight)
        if weight.stored.data.device != device:
            return None
    elif dtype is not None and weight.dtype != dtype:
        return None
    else:
        tensors = (weight, *tensors)
    for t in tensors:
        # FSDP parameters are DTensors until FSDP gathers them.
        if t is not None and ((type(t) is not nn.Parameter and type(t) is not Tensor) or t.device != device):
            return None
    return Operand(LoRAWeights(weight, bias, lora_A, lora_B, scaling), dropout_p)


def facts_of(layer: Any) -> Facts | str:
    """What must fit between a layer and the others of its MLP, or why it must compute by itself."""
    kind = type(layer)
    if not isinstance(layer, LoRALinear):
        if kind is nn.Linear and is_plain(layer):
            return Facts(None, None, layer.weight.dtype, layer)
        return f"is a {kind.__name__} without an adapter whose weight is not plain"
    if layer.calls_base:
        base = layer.to_linear()
        text = type(base).__name__ if type(base) is not nn.Linear else f"Linear with a {type(layer.weight).__name__}"
        return f"calls its base layer, a {text}, for its product"
    if kind not in (LoRALinear, LoRAConv1D, LoRAQuantizedLinear):
        return f"is a {kind.__name__}, which computes more than one product"
    if layer.merged:
        return "is merged"
    if layer._disabled:
        return "is disabled"
    dtype: torch.dtype | None = layer.weight.dtype
    if kind is LoRAQuantizedLinear and not isinstance(read(layer.weight), FP8Weight):
        # A 4-bit layer computes in its input's dtype unless it was told one.
        dtype = getattr(layer.__dict__["_base"], "compute_dtype", None)
    return Facts(layer.lora_dropout, layer.lora_A.dtype, dtype, layer, kind is LoRAQuantizedLinear)


OWN_LAYERS = LayerKind(LoRALinear, read_operand, facts_of)


def compute_projection_group(layers: Sequence[LoRALinear], x: Tensor) -> tuple[Tensor, ...] | None:
    """The outputs of layers that share the input ``x``, from one op; None if each layer must compute or raise by itself."""
    dtype = None if autocast_dtype(x.device.type) is not None else x.dtype
    operands: list[Operand] = []
    for layer in layers:
        operand = read_operand(layer, x, dtype)
        if operand is None or operand.weights.weight.shape[1:] != x.shape[-1:]:  # type: ignore[union-attr]
            return None
        operands.append(operand)
    projections, dropouts = zip(*operands, strict=True)
    if len({*dropouts}) > 1:
        return None
    weights, biases, lora_As, lora_Bs, scalings = zip(*projections, strict=True)
    return lora_linear_group(x, weights, biases, lora_As, lora_Bs, scalings, dropouts[0])
