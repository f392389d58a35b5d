"""The norms that DoRA divides by: of the rows of W + s B A, without that sum, for the plain and the
quantized weights of PEFT's base layers.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from stablelora_kernels.ops.dora import row_norms, square_sums, square_sums_by_products
from stablelora_kernels.quantized import is_packed_for_cpu, is_quantized, read
from stablelora_kernels.utils.modules import weight_and_bias

# The largest element of an input for whose product a bias is taken away again.
_LARGEST = 64.0


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


def norms_of_rows(
    base: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor
) -> Tensor:
    """n [N] of a base layer and a branch. A weight that only its layer reads is multiplied with a
    matrix like ``magnitude``.
    """
    weight, _ = weight_and_bias(base)
    if not is_quantized(weight):
        products = nn.functional.linear(lora_A.to(weight.dtype), weight)
        return row_norms(square_sums(weight), products, lora_A, lora_B, scaling)
    products = _product(base, lora_A)
    return row_norms(_sums_of_quantized(base, magnitude), products, lora_A, lora_B, scaling)


def _product(base: nn.Module, x: Tensor) -> Tensor:
    """X W^T of a quantized weight, by its layer."""
    weight, bias = weight_and_bias(base)
    # bitsandbytes' layers cast their input themselves.
    x = x.to(torch.float32 if hasattr(base, "compute_dtype") else weight.dtype)
    if bias is None:
        return base(x)  # type: ignore[no-any-return]
    # Beside a much larger bias, few digits would be left for the product.
    factor = _LARGEST / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    return (base(x * factor) - bias) / factor  # type: ignore[no-any-return]


def _sums_of_quantized(base: nn.Module, magnitude: Tensor) -> Tensor:
    """|W_n|^2, kept until the weight or one of its scales is moved or written: dequantizing takes a
    while.
    """
    weight: Any = weight_and_bias(base)[0]
    if torch.compiler.is_compiling():
        return square_sums(read(weight).dequantize(torch.float32))
    state = [_state_of(tensor) for tensor in _tensors_of(weight)]
    known = _known_sums.get(weight)
    if known is None or known.state != state:
        known = _KnownSums(state, _compute_sums(base, weight, magnitude))
        _known_sums[weight] = known
    return known.sums


def _compute_sums(base: nn.Module, weight: Any, magnitude: Tensor) -> Tensor:
    """|W_n|^2 of a quantized weight: by its layer's products if only that can read it."""
    if is_packed_for_cpu(weight):
        return square_sums_by_products(
            lambda x: _product(base, x), weight.quant_state.shape, magnitude
        )
    return square_sums(read(weight).dequantize(torch.float32))


def _tensors_of(weight: Any) -> list[Tensor]:
    """The tensors that the values of a quantized weight come from. Views that are made in inference
    mode have no version.
    """
    if not hasattr(weight, "quant_state"):
        tensors = (weight.qdata, weight.scale, getattr(weight, "per_tensor_scale", None))
        return [tensor for tensor in tensors if tensor is not None]
    if is_packed_for_cpu(weight):
        return [weight, weight.quant_state.absmax, weight.quant_state.code]
    return [weight, *read(weight).stored.scales]


def _state_of(tensor: Tensor) -> _MemoryState:
    # A model that is made in inference mode has no versions either.
    version = 0 if tensor.is_inference() else tensor._version
    return _MemoryState(tensor.device, tensor.data_ptr(), version)
