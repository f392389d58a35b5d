"""Layers with weights in 4 and 8 bits: as bitsandbytes and torchao make them, and stand-ins where
these are not installed.
"""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from stablelora_kernels.quantized import FP8Weight, NF4Weight

NF4_FIELDS = tuple(field.name for field in fields(NF4Weight))
N, K = 96, 64


def bnb_4bit(
    linear: nn.Linear, compute_dtype: torch.dtype | None = torch.float32, **options
) -> nn.Linear:
    bnb = pytest.importorskip(
        "bitsandbytes", reason="runs where bitsandbytes is installed: pip install .[test]"
    )
    options = {
        "quant_type": "nf4",
        "compute_dtype": compute_dtype,
        "bias": linear.bias is not None,
    } | options
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **options)
    layer.to(linear.weight.dtype).load_state_dict(linear.state_dict())
    return layer.to("cpu")


def bnb_8bit(linear: nn.Linear) -> nn.Linear:
    bnb = pytest.importorskip(
        "bitsandbytes", reason="runs where bitsandbytes is installed: pip install .[test]"
    )
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao(linear: nn.Linear, config: str) -> nn.Linear:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="runs where torchao is installed: pip install .[test]"
    )
    if config.startswith("NVFP4"):
        configs = pytest.importorskip(
            "torchao.prototype.mx_formats", reason="runs where torchao has it: pip install .[test]"
        )
    else:
        configs = quantization
    quantization.quantize_(linear, getattr(configs, config)())
    return linear


def torchao_int8(linear: nn.Linear) -> nn.Linear:
    return torchao(linear, "Int8WeightOnlyConfig")


# Stand-ins, with only what the library reads.


class QuantState(SimpleNamespace):
    """A class of its own, so that it can be referred to weakly."""


class Params4bit(nn.Parameter):
    def __new__(cls, weight: NF4Weight) -> Params4bit:
        self = Tensor._make_subclass(cls, weight.packed[:, None], False)
        inner = SimpleNamespace(
            absmax=weight.nested_absmax, code=weight.nested_code, blocksize=weight.nested_blocksize
        )
        state = {
            "absmax": weight.absmax,
            "code": weight.code,
            "shape": torch.Size(weight.shape),
            "nested": bool(inner.blocksize),
        }
        self.quant_state = QuantState(
            **state, blocksize=weight.blocksize, state2=inner, offset=weight.offset
        )
        self.quant_state.as_dict = lambda packed: {
            "absmax": weight.absmax,
            "quant_map": weight.code,
        }
        return self

    def __deepcopy__(self, memo: dict) -> Params4bit:
        return type(self)(NF4Weight.from_bitsandbytes(self))


class Linear4bit(nn.Linear):
    def __init__(self, weight: NF4Weight, bias: bool, compute_dtype: torch.dtype | None) -> None:
        super().__init__(*reversed(weight.shape), bias)
        self.weight, self.compute_dtype = Params4bit(weight), compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        weight = NF4Weight.from_bitsandbytes(self.weight).dequantize(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), weight, bias).to(x.dtype)


class Float8Tensor(Tensor):
    def __new__(cls, weight: FP8Weight, dtype: torch.dtype) -> Float8Tensor:
        self = Tensor._make_subclass(cls, torch.empty(weight.shape, dtype=dtype))
        self.qdata, self.scale, self.act_quant_kwargs = weight.data, weight.scale[:, None], None
        return self

    def detach(self) -> Float8Tensor:
        return type(self)(FP8Weight(self.qdata, self.scale[:, 0]), self.dtype)

    __deepcopy__ = lambda self, memo: nn.Parameter(self.detach(), self.requires_grad)  # noqa: E731


def fp8_linear(weight: FP8Weight, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(*reversed(weight.shape), dtype=dtype)
    linear.weight = nn.Parameter(Float8Tensor(weight, dtype), requires_grad=False)
    return linear


class Scaled(Tensor):
    """A weight that only its own code can read: the tensor holds half of each element."""

    def __deepcopy__(self, memo):
        return nn.Parameter(
            self.detach().as_subclass(Tensor).clone().as_subclass(type(self)), self.requires_grad
        )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = args
            return func(x, 2 * weight.as_subclass(Tensor), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def scaled(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter((linear.weight.detach() / 2).as_subclass(Scaled))
    return linear


class Failing(Scaled):
    """A weight that has no product on this device, and says that it quantizes its input."""

    act_quant_kwargs = "rows"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            raise RuntimeError("no kernel")
        return super().__torch_function__(func, types, args, kwargs or {})


def failing(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Failing))
    return linear


def compressed_tensors(linear: nn.Linear, input_activations: bool) -> nn.Linear:
    """As compressed-tensors leaves a layer: it rounds the weight, and the input if its scheme has
    ``input_activations``.
    """
    scheme = SimpleNamespace(
        weights="8 bits", input_activations="8 bits" if input_activations else None
    )

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            weight, rounded = (linear.weight * 64).round() / 64, (x * 64).round() / 64
        return nn.functional.linear(rounded if input_activations else x, weight, linear.bias)

    linear.quantization_scheme, linear.forward = scheme, forward
    return linear


def torchao_fp8_a_tensor(linear: nn.Linear) -> nn.Linear:
    """With one scale for the whole weight."""
    one = pytest.importorskip(
        "torchao.quantization", reason="runs where torchao is installed: pip install .[test]"
    ).PerTensor()
    torchao(linear, "Float8WeightOnlyConfig")
    values = torch.randn(linear.weight.shape, dtype=linear.weight.dtype)
    linear.weight = nn.Parameter(
        type(linear.weight).from_hp(values, granularity=one), requires_grad=False
    )
    return linear


def conv1d(n: int = N, k: int = K, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' layer, whose weight is [in, out]."""
    reason = "transformers is not installed (pip install .[test])"
    layer = pytest.importorskip("transformers.pytorch_utils", reason=reason).Conv1D(n, k)
    nn.init.normal_(layer.weight, std=k**-0.5)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)
