"""What PEFT's LoRA layers hold, as operands of this library's ops, or why PEFT's own forward must
compute it.

This code runs at every call of every layer, so it avoids nn.Module's slow ``__getattr__``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from stablelora_kernels.dispatch.backend import resolve_backend
from stablelora_kernels.functional import FLOAT_DTYPES, lora_branch, lora_linear
from stablelora_kernels.nn.operands import Base, plain_tensors, read_base
from stablelora_kernels.utils.modules import is_hooked
from stablelora_kernels.utils.tensors import autocast_dtype


class PeftLayer(Protocol):
    """What this library reads of PEFT's LoRA layers."""

    # With "base_layer", "lora_A", "lora_B" and "lora_dropout"; the latter three hold a module an
    # adapter.
    _modules: dict[str, Any]
    in_features: int
    out_features: int
    scaling: dict[str, float]
    lora_dropout: nn.ModuleDict
    # The kind of each adapter that is not plain LoRA.
    lora_variant: dict[str, object]
    lora_magnitude_vector: nn.ModuleDict
    ephemeral_gpu_offload: bool

    @property
    def active_adapters(self) -> list[str]: ...

    @property
    def merged(self) -> bool: ...

    @property
    def disable_adapters(self) -> bool: ...


class Branch(NamedTuple):
    """One adapter's part of the output: scaling · (D(x) A^T B^T + bias)."""

    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float

    def fits(self, x: Tensor, features: int | None = None) -> bool:
        """Whether the ops accept ``x`` with the adapter. Otherwise PEFT casts x to the adapter's
        dtype, or raises its own error.

        ``features`` are those of the layer's input if that is not ``x`` but a tensor like it.
        """
        lora_A = self.lora_A
        dtype = lora_A.dtype
        x_dtype = x.dtype
        if x_dtype not in FLOAT_DTYPES or x.device != lora_A.device:
            return False
        # Not part of read_branch_or_dora: in a sharded model, parameters have other shapes between calls.
        in_features = x.shape[-1:] if features is None else (features,)
        if in_features != lora_A.shape[1:] or lora_A.shape[:1] != self.lora_B.shape[1:]:
            return False
        if torch.float64 in (x_dtype, dtype):
            return x_dtype == dtype and resolve_backend(x.device) == "torch"
        return dtype in (torch.float32, x_dtype) or autocast_dtype(x.device.type) is not None

    def output(self, base: nn.Module, x: Tensor) -> Tensor:
        """The base layer's output and the branch, in one op if the base layer can be read."""
        operand = read_base(base, x)
        if isinstance(operand, str):
            return self.add_to(base(x), x)
        result = self.with_base(operand, x)
        # Quantized base layers return x's dtype, even under autocast.
        return result if isinstance(operand.weight, Tensor) else result.to(x.dtype)

    def add_to(self, base_out: Tensor, x: Tensor) -> Tensor:
        """``base_out`` with the branch of ``x``, in a tensor of its own."""
        if self.bias is not None:
            base_out = base_out + (self.scaling * self.bias).to(base_out.dtype)
        return lora_branch(base_out, x, self.lora_A, self.lora_B, self.scaling, self.dropout_p)

    def with_base(self, base: Base, x: Tensor) -> Tensor:
        """The base product and the branch, in one op."""
        bias = self.bias_with(base)
        return lora_linear(
            x, base.weight, bias, self.lora_A, self.lora_B, self.scaling, self.dropout_p
        )

    def bias_with(self, base: Base) -> Tensor | None:
        """The biases of the base layer and of lora_B in one."""
        if self.bias is None:
            return base.bias
        bias = self.scaling * self.bias
        if base.bias is not None:
            bias = base.bias + bias
        return bias.to(base.dtype)


def read_branch(layer: PeftLayer, adapter: str, between_calls: bool = False) -> Branch | str:
    """An adapter's branch, with the dropout of now, or why PEFT's own forward must compute it.

    ``between_calls``: its tensors may be shards, as in :func:`plain_tensors`.
    """
    modules = layer._modules
    tensors_of_A = plain_tensors(modules["lora_A"]._modules[adapter], between_calls)
    tensors_of_B = plain_tensors(modules["lora_B"]._modules[adapter], between_calls)
    if tensors_of_A is None or tensors_of_B is None:
        name = "lora_A" if tensors_of_A is None else "lora_B"
        return f"{name} of adapter {adapter!r} is not a plain nn.Linear, or has hooks"
    lora_A, bias_of_A = tensors_of_A
    lora_B, bias = tensors_of_B
    if bias_of_A is not None or lora_A.dtype != lora_B.dtype:
        return f"lora_A of adapter {adapter!r} has a bias, or another dtype than lora_B"
    dropout = modules["lora_dropout"]._modules[adapter]
    kind = type(dropout)
    if (kind is not nn.Identity and kind is not nn.Dropout) or is_hooked(dropout):
        return f"the dropout of adapter {adapter!r} is a {kind.__name__}, or has hooks"
    if kind is nn.Dropout and dropout.p >= 1:
        return f"the dropout of adapter {adapter!r} drops everything"
    scaling = layer.scaling[adapter]
    if not isinstance(scaling, (int, float)):
        return f"the scaling of adapter {adapter!r} is a {type(scaling).__name__}, not a number"
    dropout_p = dropout.p if kind is nn.Dropout and dropout.training else 0.0
    return Branch(lora_A, lora_B, bias, scaling, dropout_p)


def is_observed(layer: object) -> bool:
    """Whether global hooks or tracing must see every module's call. PEFT can also be told not to
    cast the input.
    """
    return (
        _has_any_global_hook()
        or torch.jit.is_tracing()
        or not getattr(layer, "cast_input_dtype_enabled", True)
    )
