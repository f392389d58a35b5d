"""Weights in 4 and 8 bits stand for what bitsandbytes and torchao say they do, and are refused
where they don't fit.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from stablelora_kernels import quantized
from stablelora_kernels.kernels.lora import linear_quantized
from stablelora_kernels.quantized import FORMATS, WEIGHTS, FP8Weight, NF4Weight, QuantizedWeight
from stablelora_kernels.reference import fp8_ref
from stablelora_kernels.testing import dequantized_ref, nf4_weight
from stablelora_kernels.testing.cases import make, run
from stablelora_kernels.testing.inputs import QUANTIZED, REFERENCES
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


@pytest.mark.parametrize(("n", "k"), [(7, 33), (48, 64), (5, 200)])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_values_are_the_references(kind, n, k):
    weight = QUANTIZED[kind](n, k)
    assert torch.equal(weight.dequantize(torch.float64), dequantized_ref(weight))
    for dtype in DTYPES:
        assert torch.equal(weight.dequantize(dtype), weight.dequantize(torch.float32).to(dtype))


def test_every_format_has_a_kernel_a_reference_and_random_weights():
    source = inspect.getsource(linear_quantized._weight_tile.fn)
    assert re.findall(r'FORMAT == "(\w+)"', source) == [*WEIGHTS] == [*REFERENCES]
    assert {kind.split()[0] for kind in QUANTIZED} == {*WEIGHTS}
    for name, kind in WEIGHTS.items():
        zeros = kind.zeros(3, 64, "meta")
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
def test_bitsandbytes(kind, n, k, blocksize, nested, dtype, elements, monkeypatch):
    bnb = bitsandbytes()
    monkeypatch.setattr(quantized, "_ELEMENTS", elements)
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
    monkeypatch.setattr(quantized, "_ELEMENTS", elements)
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
