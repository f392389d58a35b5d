"""What a fused MLP and a projection group read of this library's layers, and of frozen ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stablelora_kernels.functional import LoRAWeights, lora_linear_group
from stablelora_kernels.nn.conv1d import LoRAConv1D
from stablelora_kernels.nn.fused_mlp import LayerKind, Operand
from stablelora_kernels.nn.linear import LoRALinear, trained_and_bias, weight_and_bias
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear
from stablelora_kernels.quantized import read
from stablelora_kernels.utils.tensors import autocast_dtype, is_sharded


def read_operand(layer: Any, x: Tensor | None) -> Operand | str:
    """A layer's operand for an input like ``x``, or for any, or why the layer must compute by itself."""
    kind = type(layer)
    lora_A = lora_B = dropout_p = None
    scaling, is_quantized = 1.0, kind is LoRAQuantizedLinear
    weight: Any
    if kind is nn.Linear:
        weight, bias = weight_and_bias(layer)
    elif is_quantized or kind is LoRALinear or kind is LoRAConv1D:
        if layer.merged:
            return "is merged"
        if layer._disabled:
            return "is disabled"
        bias, lora_A, lora_B = trained_and_bias(layer)
        scaling, dropout_p = layer.scaling, layer.lora_dropout if layer.training or x is None else 0.0
        weight = layer.weight if is_quantized else layer._matrix()
    elif not isinstance(layer, LoRALinear):
        return f"is a {kind.__name__} without an adapter whose weight is not plain"
    elif layer.calls_base:
        base = layer.to_linear()
        text = type(base).__name__ if type(base) is not nn.Linear else f"Linear with a {type(layer.weight).__name__}"
        return f"calls its base layer, a {text}, for its product"
    else:
        return f"is a {kind.__name__}, which computes more than one product"
    if is_quantized:
        # A 4-bit layer would cast x to the dtype that it was told, and its result back.
        weight, dtype = read(weight), getattr(layer.__dict__["_base"], "compute_dtype", None)
    else:
        dtype = weight.dtype
    for t in (weight.stored.data if is_quantized else weight, bias, lora_A, lora_B):
        # FSDP's parameters are DTensors until FSDP gathers them.
        if t is None or (x is None and is_sharded(t)):
            continue
        if type(t) is not nn.Parameter and type(t) is not Tensor:
            return f"is a {kind.__name__} with a {type(t).__name__}"
        if x is not None and t.device != x.device:
            return f"is on {t.device}"
    if x is not None:
        if dtype not in (None, x.dtype) and autocast_dtype(x.device.type) is None:
            return f"computes in {dtype}"
        bias = bias.to(x.dtype) if is_quantized and bias is not None else bias
    return Operand(LoRAWeights(weight, bias, lora_A, lora_B, scaling), dropout_p, dtype)


OWN_LAYERS = LayerKind(LoRALinear, read_operand)


def compute_projection_group(layers: Sequence[LoRALinear], x: Tensor) -> tuple[Tensor, ...] | None:
    """The outputs of layers that share the input ``x``, from one op; None if each layer must compute or raise by itself."""
    operands: list[Operand] = []
    for layer in layers:
        operand = read_operand(layer, x)
        if isinstance(operand, str) or operand.weights.weight.shape[1:] != x.shape[-1:]:  # type: ignore[union-attr]
            return None
        operands.append(operand)
    projections, dropouts, _ = zip(*operands, strict=True)
    if len({*dropouts}) > 1:
        return None
    weights, biases, lora_As, lora_Bs, scalings = zip(*projections, strict=True)
    return lora_linear_group(x, weights, biases, lora_As, lora_Bs, scalings, dropouts[0])
