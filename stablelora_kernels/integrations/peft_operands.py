"""What PEFT's LoRA layers hold, as operands of this library's ops, or why PEFT's own forward must
compute it. It imports peft.

This code runs at every call of every layer, so it avoids nn.Module's slow ``__getattr__``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.functional import FLOAT_DTYPES, lora_branch, lora_linear
from stablelora_kernels.nn.linear import weight_and_bias
from stablelora_kernels.quantized import FP8Weight, NF4Weight, is_quantized, read
from stablelora_kernels.utils.modules import is_hooked
from stablelora_kernels.utils.tensors import autocast_dtype, is_sharded

# Base layers that can be computed from their weight without calling them.
READABLE: tuple[type, ...] = (nn.Linear,)
if hasattr(lora, "Linear4bit"):
    from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4

    READABLE = (nn.Linear, Linear4bit, LinearNF4, LinearFP4)


class Base(NamedTuple):
    """The base layer's operands of ``lora_linear``, which computes the base product in ``dtype``."""

    weight: Tensor | NF4Weight | FP8Weight
    bias: Tensor | None
    dtype: torch.dtype


class Branch(NamedTuple):
    """One adapter's part of the output: scaling · (D(x) A^T B^T + bias)."""

    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float

    def add_to(self, base_out: Tensor, x: Tensor) -> Tensor:
        if self.bias is not None:
            base_out = base_out + (self.scaling * self.bias).to(base_out.dtype)
        return lora_branch(base_out, x, self.lora_A, self.lora_B, self.scaling, self.dropout_p)

    def with_base(self, base: Base, x: Tensor) -> Tensor:
        """The base product and the branch, in one op."""
        return lora_linear(x, *self.tensors_with(base), self.scaling, self.dropout_p)

    def tensors_with(self, base: Base) -> tuple[Any, Tensor | None, Tensor, Tensor]:
        """Weight, combined bias, A and B."""
        bias = base.bias
        if self.bias is not None:
            bias = self.scaling * self.bias if bias is None else bias + self.scaling * self.bias
            bias = bias.to(base.dtype)
        return base.weight, bias, self.lora_A, self.lora_B


def is_plain(weight: Tensor, bias: Tensor | None) -> bool:
    return type(weight) in (nn.Parameter, Tensor) and (
        bias is None or type(bias) in (nn.Parameter, Tensor)
    )


def plain_tensors(linear: Any) -> tuple[Any, Any]:
    """The weight and the bias of an ``nn.Linear`` that nothing watches; Nones for another module."""
    if type(linear) is nn.Linear and not is_hooked(linear):
        weight, bias = weight_and_bias(linear)
        if is_plain(weight, bias):
            return weight, bias
    return None, None


def read_branch(layer: Any, adapter: str) -> Branch | str:
    """An adapter's branch, with the dropout of now, or why PEFT's own forward must compute it."""
    if adapter in layer.lora_variant:
        return f"adapter {adapter!r} is a variant of LoRA ({type(layer.lora_variant[adapter]).__name__})"
    return read_matrices(layer, adapter)


def read_matrices(layer: Any, adapter: str) -> Branch | str:
    """:func:`read_branch` for a variant too."""
    modules = layer._modules
    a, b = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
    dropout, scaling = modules["lora_dropout"]._modules[adapter], layer.scaling[adapter]
    a_weight, a_bias = plain_tensors(a)
    b_weight, b_bias = plain_tensors(b)
    if a_weight is None or b_weight is None:
        name = "lora_A" if a_weight is None else "lora_B"
        return f"{name} of adapter {adapter!r} is not a plain nn.Linear, or has hooks"
    if a_bias is not None or a_weight.dtype != b_weight.dtype:
        return f"lora_A of adapter {adapter!r} has a bias, or another dtype than lora_B"
    kind = type(dropout)
    if (kind is not nn.Identity and kind is not nn.Dropout) or is_hooked(dropout):
        return f"the dropout of adapter {adapter!r} is a {kind.__name__}, or has hooks"
    if kind is nn.Dropout and dropout.p >= 1:
        return f"the dropout of adapter {adapter!r} drops everything"
    if not isinstance(scaling, (int, float)):
        return f"the scaling of adapter {adapter!r} is a {type(scaling).__name__}, not a number"
    return Branch(
        a_weight,
        b_weight,
        b_bias,
        scaling,
        dropout.p if kind is nn.Dropout and dropout.training else 0.0,
    )


def is_observed(layer: Any) -> bool:
    """Whether global hooks or tracing must see every module's call. PEFT can also be told not to
    cast the input.
    """
    return (
        _has_any_global_hook()
        or torch.jit.is_tracing()
        or not getattr(layer, "cast_input_dtype_enabled", True)
    )


def fits(x: Tensor, lora_A: Tensor, lora_B: Tensor, features: int | None = None) -> bool:
    """Whether the ops accept ``x`` with the adapter. Otherwise PEFT casts x to the adapter's dtype,
    or raises its own error.

    ``features`` are those of the layer's input if that is not ``x`` but a tensor like it.
    """
    if x.dtype not in FLOAT_DTYPES or x.device != lora_A.device:
        return False
    # Not part of reason_against: in a sharded model, parameters have other shapes between calls.
    if (x.shape[-1:] if features is None else (features,)) != lora_A.shape[1:] or lora_A.shape[
        :1
    ] != lora_B.shape[1:]:
        return False
    if torch.float64 in (x.dtype, lora_A.dtype):
        return x.dtype == lora_A.dtype and resolve_backend(x.device) == "torch"
    return lora_A.dtype in (torch.float32, x.dtype) or autocast_dtype(x.device.type) is not None


def _calls(base: Any, weight: str = "") -> str:
    return f"calls its base layer, a {type(base).__name__}{weight}, for its product"


def base_operand(base: Any, x: Tensor | None) -> Base | str:
    """The base layer's operands, or why its product cannot be in one op with a branch.

    For an input like ``x``; without one, for any that the layer may get once its parameters are on
    their devices.
    """
    if type(base) not in READABLE or is_hooked(base):
        return _calls(base)
    weight, bias = weight_and_bias(base)
    # Quantized and sharded weights have other types. During a forward, FSDP replaces parameters by
    # plain tensors.
    if is_quantized(weight):
        return _quantized_operand(base, weight, bias, x) or _calls(base)
    if x is None and is_sharded(weight):
        return Base(weight, bias, weight.dtype)
    if type(base) is not nn.Linear or not is_plain(weight, bias):
        return _calls(base, f" with a {type(weight).__name__}")
    other = weight if bias is None else bias
    if x is None:
        return Base(weight, bias, weight.dtype)
    if weight.device != x.device or other.device != x.device:
        return _calls(base)
    if weight.dtype == other.dtype == x.dtype:
        return Base(weight, bias, x.dtype)
    if x.dtype != torch.float64 and autocast_dtype(x.device.type) is not None:
        return Base(weight, bias, weight.dtype)
    return _calls(base)


def _quantized_operand(
    base: Any, weight: Any, bias: Tensor | None, x: Tensor | None
) -> Base | str | None:
    """As :func:`base_operand` for a 4-bit or float8 base layer, if the kernels compute the same
    product as the layer.
    """
    # The PyTorch backend would dequantize the weight in Python; the layer's own product is faster.
    if resolve_backend((weight if x is None else x).device) != "triton":
        return f"has a quantized weight, and without Triton its {type(base).__name__} computes the product"
    # bitsandbytes casts x with or without autocast. Its first call may choose the compute dtype and
    # cast the bias in place.
    casts, computed = type(base) is not nn.Linear, getattr(base, "compute_dtype", weight.dtype)
    if x is None:
        return Base(weight, bias, computed)
    dtype = autocast_dtype(x.device.type) or x.dtype
    if computed != dtype or not (base.compute_type_is_set if casts else x.dtype == dtype):
        return None
    if bias is not None and (bias.dtype != dtype or bias.device != x.device):
        return None
    try:
        stored = read(weight)
    except (TypeError, ValueError):
        return None
    # bitsandbytes may have quantized the weight as [K, N].
    if (
        stored.shape != (base.out_features, base.in_features)
        or stored.stored.data.device != x.device
    ):
        return None
    return Base(stored, bias, dtype)
