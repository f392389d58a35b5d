"""DoRA adapters of PEFT's layers on this library's ops, where they drop nothing. This module imports peft."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from stablelora_kernels.integrations.peft_operands import (
    READABLE,
    Base,
    Branch,
    base_operand,
    fits,
    is_observed,
    is_plain,
    read_matrices,
)
from stablelora_kernels.nn.linear import weight_and_bias
from stablelora_kernels.ops.dora import row_norms, scale_columns, square_sums
from stablelora_kernels.quantized import is_quantized, read
from stablelora_kernels.utils.modules import is_hooked
from stablelora_kernels.utils.tensors import is_sharded


class Dora(NamedTuple):
    """A DoRA adapter: its branch and its magnitude [N], and the base layer's weight and bias."""

    branch: Branch
    magnitude: Tensor
    weight: Any
    bias: Tensor | None

    def output(self, base: Any, x: Tensor) -> Tensor:
        """(m / n) Z + bias, for the product Z of the base layer and the branch without a bias."""
        operand = base_operand(base, x)
        if isinstance(operand, Base):
            z = self.branch.with_base(operand._replace(bias=None), x)
        else:
            z = self.branch.add_to(self.product(base, x), x)
        with torch.no_grad():
            norms = _row_norms(self, base, z.dtype)
        return scale_columns(z, self.magnitude / norms, self.bias)

    def product(self, base: Any, x: Tensor) -> Tensor:
        """X W^T, as the base layer computes it."""
        y = base(x)
        return y if self.bias is None else y - self.bias


# By quantized weight, where its memory is and its version, and |W_n|^2.
_square_sums = WeakTensorKeyDictionary()


def _row_norms(dora: Dora, base: Any, dtype: torch.dtype) -> Tensor:
    (lora_A, lora_B, _, scaling, _), weight = dora.branch, dora.weight
    if is_quantized(weight):
        sums, products = _sums_of_quantized(weight), dora.product(base, lora_A.to(dtype))
    else:
        sums = square_sums(weight)
        with torch.autocast(weight.device.type, enabled=False):
            products = nn.functional.linear(lora_A.to(weight.dtype), weight)
    return row_norms(sums, products, lora_A, lora_B, scaling)


def _sums_of_quantized(weight: Any) -> Tensor:
    """|W_n|^2, kept until the weight is moved or written: dequantizing takes a while."""
    stored = read(weight).stored
    if torch.compiler.is_compiling():
        return square_sums(stored.dequantize(torch.float32))
    state = stored.data.device, stored.data.data_ptr(), stored.data._version
    known, sums = _square_sums.get(weight, (None, None))
    if known != state:
        sums = square_sums(stored.dequantize(torch.float32))
        _square_sums[weight] = state, sums
    return sums


def is_dora(layer: Any, adapter: str) -> bool:
    return type(layer.lora_variant.get(adapter)) is DoraLinearVariant


def read_dora(layer: Any, adapter: str) -> Dora | str:
    """A DoRA adapter, or why PEFT's own forward must compute it."""
    branch, base = read_matrices(layer, adapter), layer._modules["base_layer"]
    if isinstance(branch, str):
        return branch
    magnitude = layer.lora_magnitude_vector[adapter]
    if type(magnitude) is not DoraLinearLayer or is_hooked(magnitude) or layer.ephemeral_gpu_offload:
        return f"adapter {adapter!r} is DoRA with hooks, or with a weight on another device"
    if type(base) not in READABLE or is_hooked(base):
        return f"adapter {adapter!r} is DoRA on a {type(base).__name__}, or on a layer with hooks"
    weight, bias = weight_and_bias(base)
    if not is_quantized(weight) and not is_sharded(weight) and not is_plain(weight, bias):
        return f"adapter {adapter!r} is DoRA on a {type(weight).__name__}"
    return Dora(branch, magnitude.weight, weight, bias)


def dora_output(layer: Any, x: Tensor) -> Tensor | None:
    """The output with a single adapter, if that is DoRA and drops nothing; None if PEFT's own forward must compute it."""
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer._modules["lora_A"]._modules]
    if len(adapters) != 1 or not is_dora(layer, adapters[0]) or is_observed(layer):
        return None
    dora = read_dora(layer, adapters[0])
    if isinstance(dora, str) or dora.branch.dropout_p or not fits(x, dora.branch.lora_A, dora.branch.lora_B):
        return None
    return dora.output(layer._modules["base_layer"], x)
