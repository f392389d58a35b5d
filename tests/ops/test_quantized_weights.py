"""Weights in 4 and 8 bits stand for what bitsandbytes and torchao say they do, and are refused
where they don't fit.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from stablelora_kernels import formats
from stablelora_kernels.formats import FORMATS
from stablelora_kernels.kernels.lora import linear_quantized
from stablelora_kernels.launch.quantized import dequantize
from stablelora_kernels.quantized import WEIGHTS, FP4Weight, FP8Weight, NF4Weight, QuantizedWeight
from stablelora_kernels.reference import fp8_ref
from stablelora_kernels.testing import dequantized_ref, nf4_weight
from stablelora_kernels.testing.cases import DEVICE, make, run
from stablelora_kernels.testing.inputs import QUANTIZED, REFERENCES, can_hold, fp4_weight
from stablelora_kernels.testing.ops.lora_linear import on_device
from tests.helpers.cases import small
from tests.helpers.quantized_weights import NF4_FIELDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(weight: QuantizedWeight, dtype: torch.dtype, theirs: torch.Tensor) -> None:
    """Theirs is ours bit for bit, and both are what the oracle rounds to, but for the float32 they
    are computed in.
    """
    ours = weight.dequantize(dtype)
    assert ours.dtype == theirs.dtype == dtype and torch.equal(ours, theirs)
    exact = dequantized_ref(weight)
    assert torch.equal(weight.dequantize(torch.float64), exact)
    assert ((ours.double() - exact).abs() <= torch.finfo(dtype).eps * (exact.abs() + 2**-24)).all()
    assert exact.abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "n", "k"),
    [
        (kind, n, k)
        for kind in QUANTIZED
        for n, k in ((7, 33), (48, 64), (5, 200), (300, 96), (3, 48))
        if can_hold(kind, k)
    ],
)
def test_values_are_the_references(kind, n, k):
    weight = QUANTIZED[kind](n, k)
    assert torch.equal(weight.dequantize(torch.float64), dequantized_ref(weight))
    for dtype in DTYPES:
        assert torch.equal(weight.dequantize(dtype), weight.dequantize(torch.float32).to(dtype))


def test_every_format_has_a_kernel_a_reference_and_random_weights():
    source = inspect.getsource(linear_quantized._weight_tile.fn)
    assert re.findall(r'FORMAT == "(\w+)"', source) == [*WEIGHTS] == [*REFERENCES]
    assert {kind.split()[0] for kind in QUANTIZED} == {*WEIGHTS}
    for name, make_zeros in WEIGHTS.items():
        zeros = make_zeros(3, 64, "meta")
        assert zeros.shape == (3, 64) and zeros.stored.layout.name == name


def test_a_kernel_refuses_a_format_that_it_does_not_read(monkeypatch):
    case = small("fp8", 9, backend="triton")
    operands = make(case)
    unknown = FORMATS[FP8Weight.format]._replace(name="unknown")
    monkeypatch.setitem(FORMATS, FP8Weight.format, unknown)
    with pytest.raises(Exception, match="does not read this format"):
        run(case, operands)


def test_fp8_reference_has_all_256_values():
    data = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    scale = torch.rand(16) + 0.5
    expected = data.double() * scale.double()[:, None]
    assert expected.isnan().sum() == 2
    assert torch.equal(fp8_ref(data, scale).nan_to_num(7e7), expected.nan_to_num(7e7))


def bitsandbytes() -> Any:
    return pytest.importorskip(
        "bitsandbytes", reason="runs where bitsandbytes is installed: pip install .[test]"
    )


# How many elements are dequantized at once.
in_parts = pytest.mark.parametrize("elements", [1 << 22, 128])


@pytest.mark.covering
@in_parts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "blocksize"),
    [(48, 64, 64), (53, 37, 64), (30, 100, 128), (1, 1, 64), (65, 512, 256)],
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
# bitsandbytes would compile what dequantizes on a CPU, in seconds.
@torch.compiler.set_stance("force_eager")
def test_bitsandbytes(kind, n, k, blocksize, nested, dtype, elements, monkeypatch):
    bnb = bitsandbytes()
    monkeypatch.setattr(formats, "_ELEMENTS", elements)
    torch.manual_seed(n)
    packed, state = bnb.functional.quantize_4bit(
        torch.randn(n, k, dtype=dtype),
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=kind,
    )
    parameter = bnb.nn.Params4bit(packed, quant_state=state, bnb_quantized=True)
    weight = NF4Weight.from_bitsandbytes(parameter)
    assert weight.packed.data_ptr() == parameter.data_ptr()
    check(weight, dtype, bnb.functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_bitsandbytes_storage(storage):
    bnb = bitsandbytes()
    layer = bnb.nn.Linear4bit(
        64, 48, compute_dtype=torch.bfloat16, quant_type="nf4", quant_storage=storage
    )
    for given, got in (
        (layer.weight, "Params4bit"),
        (torch.ones(2, 2), r"Tensor of shape \[2, 2\]"),
    ):
        with pytest.raises(
            TypeError, match=f"weight must be a quantized Params4bit of two dimensions, got {got}"
        ):
            NF4Weight.from_bitsandbytes(given)
    layer.to("cpu")
    assert layer.weight.dtype == storage
    theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(NF4Weight.from_bitsandbytes(layer.weight).dequantize(theirs.dtype), theirs)


def test_bitsandbytes_packing_for_cpus_is_refused():
    bnb = bitsandbytes()
    layer = bnb.nn.Linear4bit(64, 48, quant_type="nf4").to("cpu")
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        ValueError,
        match="weight must be in bitsandbytes' usual packing, got the one that it makes on a CPU",
    ):
        NF4Weight.from_bitsandbytes(layer.weight)


@in_parts
def test_torchao(elements, monkeypatch):
    monkeypatch.setattr(formats, "_ELEMENTS", elements)
    torchao = pytest.importorskip(
        "torchao.quantization", reason="runs where torchao is installed: pip install .[test]"
    )
    model = torch.nn.Sequential(
        torch.nn.Linear(37, 53, dtype=torch.bfloat16), torch.nn.Linear(16, 16)
    )
    torchao.quantize_(model[0], torchao.Float8WeightOnlyConfig())
    torchao.quantize_(model[1], torchao.Int8WeightOnlyConfig())
    check(FP8Weight.from_torchao(model[0].weight), torch.bfloat16, model[0].weight.dequantize())
    for given in (model[1].weight, torch.ones(2, 2)):
        with pytest.raises(
            (TypeError, ValueError),
            match=r"weight must be torchao's Float8Tensor|data must be torch\.float8",
        ):
            FP8Weight.from_torchao(given)


def mx_formats() -> Any:
    return pytest.importorskip(
        "torchao.prototype.mx_formats",
        reason="runs where torchao is installed: pip install .[test]",
    )


@in_parts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_tensor", [True, False])
@pytest.mark.parametrize("swizzled", [True, False])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (272, 80), (128, 64)])
def test_torchaos_nvfp4(n, k, swizzled, by_tensor, dtype, elements, monkeypatch):
    mx_formats()
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    monkeypatch.setattr(formats, "_ELEMENTS", elements)
    torch.manual_seed(n)
    # Some scales are subnormal in float8.
    values = torch.randn(n, k) * torch.logspace(-4, 2, n)[:, None]
    scale = per_tensor_amax_to_scale(values.abs().max()) if by_tensor else None
    theirs = NVFP4Tensor.to_nvfp4(values, per_tensor_scale=scale, is_swizzled_scales=swizzled)
    weight = FP4Weight.from_torchao(theirs)
    assert weight.packed.data_ptr() == theirs.qdata.data_ptr()
    assert weight.scale.data_ptr() == theirs.scale.data_ptr()
    check(weight, dtype, theirs.dequantize(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("swizzled", [True, False])
def test_torchaos_mxfp4(swizzled, dtype):
    mx_formats()
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    torch.manual_seed(0)
    values = torch.randn(200, 160) * torch.logspace(-20, 20, 200)[:, None]
    theirs = MXTensor.to_mx(values, torch.float4_e2m1fn_x2, 32, is_swizzled_scales=swizzled)
    weight = FP4Weight.from_torchao(theirs)
    assert weight.packed.data_ptr() == theirs.qdata.data_ptr()
    assert weight.scale.data_ptr() == theirs.scale.data_ptr()
    check(weight, dtype, theirs.dequantize(dtype))


def test_torchaos_usual_nvfp4_takes_0_5625_bytes_an_element():
    config = mx_formats().NVFP4WeightOnlyConfig()
    linear = torch.nn.Linear(256, 128, dtype=torch.bfloat16)
    pytest.importorskip("torchao.quantization").quantize_(linear, config)
    weight = FP4Weight.from_torchao(linear.weight)
    assert weight.swizzled and weight.tensor_scale is linear.weight.per_tensor_scale
    check(weight, torch.bfloat16, linear.weight.dequantize())
    assert weight.packed.nbytes + weight.scale.nbytes == 0.5625 * linear.weight.numel()


def test_what_is_no_fp4_weight_of_torchao_is_refused():
    mx_formats()
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import (
        NVFP4Tensor,
        QuantizeTensorToNVFP4Kwargs,
    )

    values = torch.randn(32, 32)
    activations = NVFP4Tensor.to_nvfp4(values, act_quant_kwargs=QuantizeTensorToNVFP4Kwargs())
    for given, error, message in (
        (values, TypeError, "got Tensor$"),
        (
            MXTensor.to_mx(values, torch.float8_e4m3fn, 32),
            TypeError,
            r"got MXTensor of torch\.float8",
        ),
        (
            activations,
            ValueError,
            "weight must leave activations as they are, got act_quant_kwargs",
        ),
        (NVFP4Tensor.to_nvfp4(values).t(), ValueError, "packed must be contiguous"),
    ):
        with pytest.raises(error, match=message):
            FP4Weight.from_torchao(given)


def by_kernel(weight: QuantizedWeight) -> torch.Tensor:
    """W in float32, by the kernel that dequantizes it before a product."""
    made = on_device(weight, DEVICE)
    out = torch.full(weight.shape, torch.nan, device=DEVICE)
    dequantize(out, made.stored).run(out.device)
    return out.cpu()


@pytest.mark.parametrize(
    ("scale", "block"), [(torch.float8_e4m3fn, 16), (torch.uint8, 32)], ids=str
)
def test_fp4_has_every_element_with_every_scale(scale, block):
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    of_byte = torch.arange(256, dtype=torch.uint8)
    scales = of_byte[:, None].repeat(1, 512 // block).contiguous().view(scale)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    code = torch.cat((magnitudes, -magnitudes))
    values = torch.stack((code[packed[0].long() % 16], code[packed[0].long() // 16]), 1).flatten()
    float8 = torch.float8_e4m3fn if block == 16 else torch.float8_e8m0fnu
    expected = values * of_byte.view(float8).double()[:, None]
    weight = FP4Weight(packed, scales)
    low = by_kernel(weight).double(), weight.dequantize(torch.float32).double()
    for got in (dequantized_ref(weight), weight.dequantize(torch.float64), *low):
        # Beside float32's largest number lie products with 2^127.
        right = expected if got.isinf().sum() == 0 else expected.float().double()
        assert torch.equal(got.nan_to_num(7e77), right.nan_to_num(7e77))
    assert expected.isnan().sum() == (2 if block == 16 else 1) * 512


@pytest.mark.parametrize("swizzled", [True, False])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_the_kernel_reads_every_scale_of_fp4_at_its_place(format, swizzled):
    """Two tiles of scales in each direction, whose last ones are not full."""
    weight = fp4_weight(200, 96 if format == "nvfp4" else 160, format, swizzled)
    assert torch.equal(by_kernel(weight), weight.dequantize(torch.float32))


# What does not fit.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shape": (0, 37)}, ValueError, r"shape\[0\] must be at least 1, got 0"),
        ({"shape": (6, 37)}, ValueError, r"packed must be \[111\], got \[93\]"),
        ({"blocksize": 48}, ValueError, "blocksize must be a power of two, got 48"),
        ({"blocksize": 32}, ValueError, r"absmax must be \[6\], got \[3\]"),
        ({"packed": torch.zeros(93)}, TypeError, "packed must be torch.uint8, got torch.float32"),
        ({"absmax": torch.zeros(3)}, TypeError, "absmax must be torch.uint8, got torch.float32"),
        ({"code": torch.zeros(8)}, ValueError, r"code must be \[16\], got \[8\]"),
        ({"code": torch.zeros(32)[::2]}, ValueError, r"code must be contiguous, got strides \[2\]"),
        ({"code": torch.zeros(16, device="meta")}, ValueError, "code must be on the device of the others, cpu, got meta"),
        ({"offset": None}, ValueError, "must be given all or not at all, got"),
        ({"nested_blocksize": 2}, ValueError, r"nested_absmax must be \[2\], got \[1\]"),
    ],
)  # fmt: skip
def test_nf4_errors(changes, error, message):
    weight = nf4_weight(5, 37, 64, nested=True)
    fields = {name: getattr(weight, name) for name in NF4_FIELDS}
    NF4Weight(**fields)
    with pytest.raises(error, match=message):
        NF4Weight(**fields | changes)


@pytest.mark.parametrize(
    ("data", "scale", "error", "message"),
    [
        (
            torch.zeros(4, 8),
            torch.ones(4),
            TypeError,
            "data must be torch.float8_e4m3fn, got torch.float32",
        ),
        (
            torch.zeros(4).to(torch.float8_e4m3fn),
            torch.ones(4),
            ValueError,
            r"data must be \[N, K\], .* got \[4\]",
        ),
        (
            torch.zeros(4, 8).to(torch.float8_e4m3fn).t(),
            torch.ones(8),
            ValueError,
            "data must be contiguous",
        ),
        (
            torch.zeros(4, 8).to(torch.float8_e4m3fn),
            torch.ones(8),
            ValueError,
            r"scale must be \[4\], got \[8\]",
        ),
        (
            torch.zeros(4, 8).to(torch.float8_e4m3fn),
            torch.ones(4).double(),
            TypeError,
            "scale must be torch.float32",
        ),
    ],
)
def test_fp8_errors(data, scale, error, message):
    with pytest.raises(error, match=message):
        FP8Weight(data, scale)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"packed": torch.zeros(4)}, ValueError, r"packed must be \[N, K / 2\], N and K at least 1, got \[4\]"),
        ({"packed": torch.zeros(4, 16)}, TypeError, "packed must be torch.uint8, got torch.float32"),
        ({"packed": torch.zeros(32, 4, dtype=torch.uint8).t()}, ValueError, "packed must be contiguous"),
        ({"packed": torch.zeros(4, 12, dtype=torch.uint8)}, ValueError, "whole blocks of 16 elements in a row, got 24 elements"),
        ({"scale": torch.zeros(4, 4)}, TypeError, "scale must be torch.float8_e4m3fn or torch.uint8, got torch.float32"),
        ({"scale": torch.zeros(4, 2, dtype=torch.uint8)}, ValueError, r"scale must be \[4, 1\], got \[4, 2\]"),
        ({"swizzled": True}, ValueError, r"scale must be \[32, 16\], got \[4, 2\]"),
        ({"tensor_scale": torch.ones(2)}, ValueError, r"tensor_scale must be \[1\], got \[2\]"),
        ({"tensor_scale": torch.ones(()).double()}, TypeError, "tensor_scale must be torch.float32, got torch.float64"),
        (
            {"scale": torch.zeros(4, 1, dtype=torch.uint8)}, ValueError,
            "tensor_scale must be None for scales of torch.uint8, got a tensor",
        ),
    ],
)  # fmt: skip
def test_fp4_errors(changes, error, message):
    weight = fp4_weight(4, 32, "nvfp4")
    names = ("packed", "scale", "tensor_scale", "swizzled")
    fields = {name: getattr(weight, name) for name in names}
    FP4Weight(**fields)
    with pytest.raises(error, match=message):
        FP4Weight(**fields | changes)
