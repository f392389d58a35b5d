"""What ops over several layers read of each: of the projections of a gated MLP, and of projection
groups.

A library's layers are read at one place, its :data:`Read`. Here is that of this library;
``integrations/peft_layers.py`` has PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stablelora_kernels.functional import LoRAWeights, lora_linear_group, lora_linear_group_if
from stablelora_kernels.nn.factory import is_conv1d
from stablelora_kernels.nn.linear import (
    LoRAConv1D,
    LoRALinear,
    projection_group_key,
    trained_and_bias,
    weight_and_bias,
)
from stablelora_kernels.nn.quantized import LoRAQuantizedLinear
from stablelora_kernels.quantized import is_quantized
from stablelora_kernels.quantized import read as read_stored
from stablelora_kernels.utils.tensors import autocast_dtype, is_sharded


class Addend(Protocol):
    """A branch that can be added to the output of an op."""

    def add_to(self, base_out: Tensor, x: Tensor) -> Tensor: ...


class Operand(NamedTuple):
    """A layer as an op reads it."""

    weights: LoRAWeights
    # None without an adapter. In a call, 0 in evaluation.
    dropout_p: float | None
    # The product's; None if it is that of any x.
    dtype: torch.dtype | None
    # The branches of a second adapter and others, which no op takes: they are added to its output.
    added: tuple[Addend, ...] = ()
    # Why a gated MLP cannot take the layer, though a projection group can.
    reason_against_mlp: str | None = None


# A layer's operand for an input of the dtype and device of x, or why the layer must compute by
# itself. Without an x: for any that the layer may get in training, once its parameters are on their
# devices.
Read = Callable[[nn.Module, Tensor | None], Operand | str]
# What Read finds for any x in a layer with one adapter on a plain weight, if it finds no reason in
# dtypes, shapes and devices, which the key of an op's call has. None for any other layer.
ReadUsual = Callable[[nn.Module], Operand | None]


class LayerKind(NamedTuple):
    """How to handle one library's layers."""

    # The class of those with adapters.
    adapted: type
    read: Read
    read_usual: ReadUsual
    # Layers can form a projection group if their keys are equal; ``read`` checks the rest.
    group_key: Callable[[Any], Hashable]

    def is_projection(self, module: object) -> bool:
        """Whether ``module`` computes a projection, with adapters or without."""
        return isinstance(module, (nn.Linear, self.adapted)) or is_conv1d(module)

    def compute_group(self, layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor] | None:
        """The outputs of layers that share the input ``x``, from one op; None if each layer must
        compute, or raise, by itself.
        """
        usual = [self.read_usual(layer) for layer in layers]
        projections = [operand.weights for operand in usual if operand is not None]
        dropouts = {operand.dropout_p for operand in usual if operand is not None}
        if len(projections) == len(layers) and len(dropouts) == 1:
            # Once calls of this kind are known to fit, the op's own key says so.
            def fits() -> bool:
                return self._read_group(layers, x) is not None

            return lora_linear_group_if(fits, x, projections, dropouts.pop() or 0.0)
        operands = self._read_group(layers, x)
        if operands is None:
            return None
        # Weights, biases, A's, B's and scalings.
        columns = zip(*[operand.weights for operand in operands], strict=True)
        outputs = lora_linear_group(x, *columns, operands[0].dropout_p)  # type: ignore[arg-type, call-arg]
        results = []
        for output, operand in zip(outputs, operands, strict=True):
            for branch in operand.added:
                output = branch.add_to(output, x)
            results.append(output)
        return results

    def _read_group(self, layers: Sequence[nn.Module], x: Tensor) -> list[Operand] | None:
        """The operands of layers that one op can compute for ``x``, or None."""
        operands: list[Operand] = []
        in_features = x.shape[-1:]
        for layer in layers:
            operand = self.read(layer, x)
            if isinstance(operand, str) or operand.weights.lora_A is None:
                return None
            weight = operand.weights.weight
            if not isinstance(weight, Tensor) or weight.shape[1:] != in_features:
                return None
            operands.append(operand)
        settings = {(operand.dropout_p, operand.weights.lora_A.dtype) for operand in operands}  # type: ignore[union-attr]
        if len(settings) > 1:
            return None
        return operands

    def reason_against_group(self, layer: nn.Module) -> str | None:
        """Why :meth:`compute_group` leaves a layer and its group to themselves as the layer is now,
        or None.
        """
        operand = self.read(layer, None)
        if isinstance(operand, str):
            return operand
        if operand.weights.lora_A is None:
            return "has no active adapter"
        return "has a quantized weight" if is_quantized(operand.weights.weight) else None


def read_own_layer(layer: nn.Module, x: Tensor | None) -> Operand | str:
    """:data:`Read` of this library's layers, and of frozen ones beside them."""
    kind = type(layer)
    if kind is nn.Linear:
        weight, bias = weight_and_bias(layer)
        operand = Operand(LoRAWeights(weight, bias, None, None, 1.0), None, weight.dtype)
        return _reason_against_tensors(layer, (weight, bias), weight.dtype, x) or operand
    if not isinstance(layer, LoRALinear):
        return f"is a {kind.__name__} without an adapter whose weight is not plain"
    if layer.calls_base:
        base = layer.to_linear()
        name = type(base).__name__
        if type(base) is nn.Linear:
            name = f"Linear with a {type(layer.weight).__name__}"
        return f"calls its base layer, a {name}, for its product"
    if kind not in (LoRALinear, LoRAConv1D, LoRAQuantizedLinear):
        return f"is a {kind.__name__}, which computes more than one product"
    if layer.merged:
        return "is merged"
    if layer._disabled:
        return "is disabled"
    bias, lora_A, lora_B = trained_and_bias(layer)
    dropout_p = layer.lora_dropout if layer.training or x is None else 0.0
    if kind is LoRAQuantizedLinear:
        stored = read_stored(layer.weight)
        # A 4-bit layer would cast x to the dtype that it was told, and its result back.
        dtype = getattr(layer.__dict__["_base"], "compute_dtype", None)
        tensors = (stored.stored.data, bias, lora_A, lora_B)
        if x is not None and bias is not None:
            bias = bias.to(x.dtype)
        weights = LoRAWeights(stored, bias, lora_A, lora_B, layer.scaling)
    else:
        weight = layer._matrix()
        dtype = weight.dtype
        tensors = (weight, bias, lora_A, lora_B)
        weights = LoRAWeights(weight, bias, lora_A, lora_B, layer.scaling)
    operand = Operand(weights, dropout_p, dtype)
    return _reason_against_tensors(layer, tensors, dtype, x) or operand


def read_usual_own_layer(layer: nn.Module) -> Operand | None:
    """:data:`ReadUsual` of this library's layers."""
    if not isinstance(layer, LoRALinear) or type(layer) is not LoRALinear:
        return None
    if layer.calls_base or layer.merged or layer._disabled:
        return None
    weight = layer._matrix()
    bias, lora_A, lora_B = trained_and_bias(layer)
    if not (_are_plain(weight, bias) and _are_plain(lora_A, lora_B)):
        return None
    weights = LoRAWeights(weight, bias, lora_A, lora_B, layer.scaling)
    return Operand(weights, layer.lora_dropout if layer.training else 0.0, None)


def _are_plain(first: Tensor, second: Tensor | None) -> bool:
    """Whether the types of two tensors have no operations of their own."""
    is_plain = type(first) is nn.Parameter or type(first) is Tensor
    return is_plain and (second is None or type(second) is nn.Parameter or type(second) is Tensor)


def _reason_against_tensors(
    layer: nn.Module,
    tensors: Iterable[Tensor | None],
    dtype: torch.dtype | None,
    x: Tensor | None,
) -> str | None:
    """Why an op cannot read the ``tensors`` of a layer that computes in ``dtype``, or None."""
    for tensor in tensors:
        # FSDP's parameters are DTensors until FSDP gathers them.
        if tensor is None or (x is None and is_sharded(tensor)):
            continue
        if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
            return f"is a {type(layer).__name__} with a {type(tensor).__name__}"
        if x is not None and tensor.device != x.device:
            return f"is on {tensor.device}"
    if x is None or dtype is None or dtype == x.dtype:
        return None
    return f"computes in {dtype}" if autocast_dtype(x.device.type) is None else None


OWN_LAYERS = LayerKind(LoRALinear, read_own_layer, read_usual_own_layer, projection_group_key)
