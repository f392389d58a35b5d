"""DoRA adapters of PEFT's layers on this library's ops, where they drop nothing. This module
imports peft.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from stablelora_kernels.integrations.peft_operands import (
    Branch,
    PeftLayer,
    read_branch,
)
from stablelora_kernels.nn.operands import Base, are_plain, is_readable, read_base
from stablelora_kernels.ops.cpu_products import without_autocast
from stablelora_kernels.ops.dora import (
    row_norms,
    scale_columns,
    square_sums,
    square_sums_by_products,
)
from stablelora_kernels.quantized import is_packed_for_cpu, is_quantized, read
from stablelora_kernels.utils.modules import is_hooked, weight_and_bias
from stablelora_kernels.utils.tensors import is_sharded

# The largest element of an input for whose product a bias is taken away again.
_LARGEST = 64.0


class Dora(NamedTuple):
    """A DoRA adapter: its branch and its magnitude [N], and the base layer's weight and bias."""

    name: str
    branch: Branch
    magnitude: Tensor
    weight: Any
    bias: Tensor | None

    def fits(self, x: Tensor) -> bool:
        """Whether the ops compute a call with ``x``: with dropout, DoRA needs the base product of
        two inputs.
        """
        return not self.branch.dropout_p and self.branch.fits(x)

    def output(self, base: nn.Module, x: Tensor) -> Tensor:
        """(m / n) (Z - bias) + bias in the dtype of the base layer's output, for that output and
        the branch, Z. A new adapter has B = 0 and, beside float32 weights, m = n: the output is
        then the base layer's.
        """
        operand = read_base(base, x)
        if isinstance(operand, Base):
            z = self.branch.with_base(operand, x)
            # Quantized base layers return x's dtype, even under autocast.
            dtype = z.dtype if isinstance(operand.weight, Tensor) else x.dtype
        else:
            base_out = base(x)
            z = self.branch.add_to(base_out, x)
            dtype = base_out.dtype
        # Norms need the digits of the weights, which autocast would take from them.
        with torch.no_grad(), without_autocast(x):
            norms = _row_norms(self, base)
        return scale_columns(z, self.magnitude / norms, self.bias).to(dtype)


class _MemoryState(NamedTuple):
    """What differs once a tensor is moved or written."""

    device: torch.device
    address: int
    version: int


class _KnownSums(NamedTuple):
    """|W_n|^2 of a quantized weight, and the state of its memory that they were computed from."""

    state: list[_MemoryState]
    sums: Tensor


# By quantized weight.
_known_sums: MutableMapping[Tensor, _KnownSums] = WeakTensorKeyDictionary()


def _row_norms(dora: Dora, base: nn.Module) -> Tensor:
    """n [N]: the norms of the rows of W + s B A, without that sum."""
    branch = dora.branch
    weight = dora.weight
    if not is_quantized(weight):
        products = nn.functional.linear(branch.lora_A.to(weight.dtype), weight)
        return row_norms(
            square_sums(weight), products, branch.lora_A, branch.lora_B, branch.scaling
        )
    products = _product(dora, base, branch.lora_A)
    return row_norms(
        _sums_of_quantized(dora, base), products, branch.lora_A, branch.lora_B, branch.scaling
    )


def _product(dora: Dora, base: nn.Module, x: Tensor) -> Tensor:
    """X W^T of a quantized weight, by its layer."""
    # bitsandbytes' layers cast their input themselves.
    x = x.to(torch.float32 if hasattr(base, "compute_dtype") else dora.weight.dtype)
    if dora.bias is None:
        return base(x)
    # Beside a much larger bias, few digits would be left for the product.
    factor = _LARGEST / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    return (base(x * factor) - dora.bias) / factor


def _sums_of_quantized(dora: Dora, base: nn.Module) -> Tensor:
    """|W_n|^2, kept until the weight or one of its scales is moved or written: dequantizing takes a
    while.
    """
    weight = dora.weight
    if torch.compiler.is_compiling():
        return square_sums(read(weight).dequantize(torch.float32))
    state = [_state_of(tensor) for tensor in _tensors_of(weight)]
    known = _known_sums.get(weight)
    if known is None or known.state != state:
        known = _KnownSums(state, _compute_sums(dora, base))
        _known_sums[weight] = known
    return known.sums


def _compute_sums(dora: Dora, base: nn.Module) -> Tensor:
    """|W_n|^2 of a quantized weight: by its layer's products if only that can read it."""
    if is_packed_for_cpu(dora.weight):
        return square_sums_by_products(
            lambda x: _product(dora, base, x), dora.weight.quant_state.shape, dora.magnitude
        )
    return square_sums(read(dora.weight).dequantize(torch.float32))


def _tensors_of(weight: Any) -> list[Tensor]:
    """The tensors that the values of a quantized weight come from. Views that are made in inference
    mode have no version.
    """
    if not hasattr(weight, "quant_state"):
        return [weight.qdata, weight.scale]
    if is_packed_for_cpu(weight):
        return [weight, weight.quant_state.absmax, weight.quant_state.code]
    return [weight, *read(weight).stored.scales]


def _state_of(tensor: Tensor) -> _MemoryState:
    # A model that is made in inference mode has no versions either.
    version = 0 if tensor.is_inference() else tensor._version
    return _MemoryState(tensor.device, tensor.data_ptr(), version)


def is_dora(layer: PeftLayer, adapter: str) -> bool:
    """Whether an adapter is DoRA of a linear layer."""
    return type(layer.lora_variant.get(adapter)) is DoraLinearVariant


def read_dora(layer: PeftLayer, adapter: str, between_calls: bool = False) -> Dora | str:
    """A DoRA adapter, or why PEFT's own forward must compute it. ``between_calls``: its tensors may
    be shards, as in :func:`read_branch`.
    """
    branch = read_branch(layer, adapter, between_calls)
    if isinstance(branch, str):
        return branch
    magnitude = layer.lora_magnitude_vector[adapter]
    if (
        type(magnitude) is not DoraLinearLayer
        or is_hooked(magnitude)
        or layer.ephemeral_gpu_offload
    ):
        return f"adapter {adapter!r} is DoRA with hooks, or with a weight on another device"
    base = layer._modules["base_layer"]
    if not is_readable(base) or is_hooked(base):
        return f"adapter {adapter!r} is DoRA on a {type(base).__name__}, or on a layer with hooks"
    weight, bias = weight_and_bias(base)
    if not is_quantized(weight) and not is_sharded(weight) and not are_plain(weight, bias):
        return f"adapter {adapter!r} is DoRA on a {type(weight).__name__}"
    return Dora(adapter, branch, magnitude.weight, weight, bias)
