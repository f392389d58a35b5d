"""What ops over several layers read of each: of the projections of a gated MLP, of projection groups,
of a model's head.

:func:`read_layer` reads every kind: a :class:`~stablelora_kernels.LoRALinear` and a layer of PEFT's
that ``accelerate_peft`` runs, by their methods ``read_operand`` and ``read_usual_operand``; and a
frozen layer beside them. ``integrations/`` reads base layers by :func:`read_base` too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.functional import LoRAWeights, lora_linear_group, lora_linear_group_if
from stablelora_kernels.quantized import QuantizedWeight, is_quantized
from stablelora_kernels.quantized import read as read_stored
from stablelora_kernels.utils.modules import is_hooked, weight_and_bias
from stablelora_kernels.utils.refusal import Refusal
from stablelora_kernels.utils.tensors import autocast_dtype, is_sharded

# bitsandbytes' layers that can be computed from their weight without calling them, by name.
_FOUR_BITS = ("Linear4bit", "LinearNF4", "LinearFP4")


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
    # Whether the layer returns its input's dtype under autocast, as bitsandbytes' layers do.
    casts: bool = False


class Base(NamedTuple):
    """The base layer's operands of ``lora_linear``, which computes the base product in ``dtype``."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    dtype: torch.dtype


def is_adapted(module: object) -> bool:
    """Whether ``module`` is a layer with adapters, this library's or PEFT's."""
    kind = type(module)
    return hasattr(kind, "read_operand") or hasattr(kind, "get_base_layer")


def is_projection(module: object) -> bool:
    """Whether ``module`` computes a projection, with adapters or without."""
    return isinstance(module, nn.Linear) or is_adapted(module)


def read_layer(layer: nn.Module, x: Tensor | None) -> Operand | Refusal:
    """A layer's operand for an input of the dtype and device of x, or why the layer must compute by
    itself. Without an x: for any that the layer may get in training, once its parameters are on
    their devices.
    """
    # Of the class: nn.Module's __getattr__ takes long to find nothing.
    read = getattr(type(layer), "read_operand", None)
    if read is not None:
        return read(layer, x)  # type: ignore[no-any-return]
    if is_adapted(layer):
        return Refusal("runs PEFT's own forward; the report's skipped modules say why")
    base = read_base(layer, x)
    return base if isinstance(base, Refusal) else frozen_operand(base, x)


def read_usual_layer(layer: nn.Module) -> Operand | None:
    """What :func:`read_layer` finds for any x in a layer with one adapter on a plain weight, if it
    finds no reason in dtypes, shapes and devices, which the key of an op's call has. None for any
    other layer.
    """
    read = getattr(type(layer), "read_usual_operand", None)
    return None if read is None else read(layer)


def reason_against_tensors(
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


# Base layers

# The types without operations of their own.
PLAIN = (nn.Parameter, Tensor)


def are_plain(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the types of both have no operations of their own."""
    return type(weight) in PLAIN and (bias is None or type(bias) in PLAIN)


def is_readable(base: nn.Module) -> bool:
    """Whether a base layer can be computed from its weight without calling it."""
    return type(base) is nn.Linear or type(base).__name__ in _FOUR_BITS


def _calls(base: nn.Module, weight: str = "") -> Refusal:
    """The reason that a base layer must compute its own product."""
    return Refusal(f"calls its base layer, a {type(base).__name__}{weight}, for its product")


def read_base(base: nn.Module, x: Tensor | None) -> Base | Refusal:
    """The base layer's operands, or why its product cannot be in one op with a branch.

    For an input like ``x``; without one, for any that the layer may get once its parameters are on
    their devices.
    """
    if not is_readable(base) or is_hooked(base):
        return _calls(base)
    weight, bias = weight_and_bias(base)
    # Quantized and sharded weights have other types. During a forward, FSDP replaces parameters by
    # plain tensors.
    if is_quantized(weight):
        return _quantized_operand(base, weight, bias, x)
    if x is None and is_sharded(weight):
        return Base(weight, bias, weight.dtype)
    if type(base) is not nn.Linear or not are_plain(weight, bias):
        return _calls(base, f" with a {type(weight).__name__}")
    if x is None:
        return Base(weight, bias, weight.dtype)
    # Without a bias, the weight is compared twice.
    bias_or_weight = weight if bias is None else bias
    if weight.device != x.device or bias_or_weight.device != x.device:
        return _calls(base)
    if weight.dtype == bias_or_weight.dtype == x.dtype:
        return Base(weight, bias, x.dtype)
    if x.dtype != torch.float64 and autocast_dtype(x.device.type) is not None:
        return Base(weight, bias, weight.dtype)
    return _calls(base)


def _quantized_operand(
    base: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor | None
) -> Base | Refusal:
    """As :func:`read_base` for a 4-bit or float8 base layer, if the kernels compute the same
    product as the layer.
    """
    # The PyTorch backend would dequantize the weight in Python; the layer's own product is faster.
    if resolve_backend((weight if x is None else x).device) != "triton":
        return Refusal(
            f"has a quantized weight, and without Triton its {type(base).__name__} computes the product"
        )
    compute_dtype = getattr(base, "compute_dtype", weight.dtype)
    if x is None:
        return Base(weight, bias, compute_dtype)
    dtype = autocast_dtype(x.device.type) or x.dtype
    # bitsandbytes casts x with or without autocast. Its first call may choose the compute dtype and
    # cast the bias in place.
    casts = type(base) is not nn.Linear
    is_settled = base.compute_type_is_set if casts else x.dtype == dtype
    if compute_dtype != dtype or not is_settled:
        return _calls(base)
    if bias is not None and (bias.dtype != dtype or bias.device != x.device):
        return _calls(base)
    try:
        stored = read_stored(weight)
    except (TypeError, ValueError):
        return _calls(base)
    # bitsandbytes may have quantized the weight as [K, N].
    has_layout = stored.shape == (base.out_features, base.in_features)
    if not has_layout or stored.stored.data.device != x.device:
        return _calls(base)
    return Base(stored, bias, dtype)


def casts(base: Base, x: Tensor | None) -> bool:
    """Whether a base layer casts its product to the dtype of ``x``."""
    return x is not None and not isinstance(base.weight, Tensor) and base.dtype != x.dtype


def frozen_operand(base: Base, x: Tensor | None) -> Operand:
    """The operand of a base layer without an adapter, for an input ``x``."""
    weights = LoRAWeights(base.weight, base.bias, None, None, 1.0)
    return Operand(weights, None, base.dtype, casts=casts(base, x))


# Groups


def group_key(layer: Any) -> Hashable:
    """Layers can form a projection group if their keys are equal. :func:`read_layer` checks the
    rest.
    """
    base = getattr(layer, "base_layer", layer)
    kind = base.weight.dtype if has_plain_weight(layer) else type(base)
    return layer.in_features, kind


def has_plain_weight(layer: Any) -> bool:
    """Whether the layer is this library's or around an ``nn.Linear``, and its weight is not
    quantized. A projection group computes no other.
    """
    base = getattr(layer, "base_layer", layer)
    is_linear = type(base) is nn.Linear or base is layer
    return is_linear and not is_quantized(base.weight)


def compute_group(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor] | None:
    """The outputs of layers that share the input ``x``, from one op; None if each layer must
    compute, or raise, by itself.
    """
    usual = [read_usual_layer(layer) for layer in layers]
    projections = [operand.weights for operand in usual if operand is not None]
    dropouts = {operand.dropout_p for operand in usual if operand is not None}
    if len(projections) == len(layers) and len(dropouts) == 1:
        # Once calls of this kind are known to fit, the op's own key says so.
        def fits() -> bool:
            return _read_group(layers, x) is not None

        return lora_linear_group_if(fits, x, projections, dropouts.pop() or 0.0)
    operands = _read_group(layers, x)
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


def _read_group(layers: Sequence[nn.Module], x: Tensor) -> list[Operand] | None:
    """The operands of layers that one op can compute for ``x``, or None."""
    operands: list[Operand] = []
    in_features = x.shape[-1:]
    for layer in layers:
        operand = read_layer(layer, x)
        if isinstance(operand, Refusal) or operand.weights.lora_A is None:
            return None
        weight = operand.weights.weight
        if not isinstance(weight, Tensor) or weight.shape[1:] != in_features:
            return None
        operands.append(operand)
    settings = {(operand.dropout_p, operand.weights.lora_A.dtype) for operand in operands}  # type: ignore[union-attr]
    if len(settings) > 1:
        return None
    return operands


def reason_against_group(layer: nn.Module) -> str | None:
    """Why :func:`compute_group` leaves a layer and its group to themselves as the layer is now,
    or None.
    """
    if not has_plain_weight(layer):
        base = getattr(layer, "base_layer", layer)
        is_read = is_quantized(getattr(base, "weight", None))
        return "has a quantized weight" if is_read else f"is a {type(base).__name__}"
    operand = read_layer(layer, None)
    if isinstance(operand, Refusal):
        return operand.reason
    return "has no active adapter" if operand.weights.lora_A is None else None
