"""accelerate_peft with half-precision weights, adapters and autocast: no worse than PEFT's own against float64."""

from __future__ import annotations

import pytest
import torch

import stablelora_kernels as slk
from tests.helpers.inputs import BF16, DTYPES, FP16, FP32
from tests.helpers.oracle import check_all, layer_oracle, run_layer
from tests.helpers.peft_models import calls, one_layer


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts float32 tensors of at least so many elements that an operator makes."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.dtype == FP32 and out.numel() >= self.elements:
            self.count += 1
        return out


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_float32_adapters_without_a_float32_copy_of_the_activations(dtype, backend):
    model, x = one_layer(dtype)
    with Copies(x.numel()) as pefts:
        model(x)
    slk.accelerate_peft(model)
    with Copies(x.numel()) as ours:
        y = model(x)
    assert y.dtype == dtype
    # In the interpreter, some of what the kernels do runs on PyTorch's operators.
    assert pefts.count > 0 and ours.count == 0
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert model.base_model.model[0].lora_A["default"].weight.grad.dtype == FP32


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_error_against_float64_is_pefts(dtypes, autocast, backend):
    """Of PEFT's own forward in the dtype of the products: where PEFT computes the branch in float32, that is autocast."""
    if autocast and dtypes[0] == FP16:
        pytest.skip("autocast is tried to bfloat16")
    model, x = one_layer(*dtypes)
    low = BF16 if autocast else dtypes[0]
    layer = model.base_model.model[0]
    pair, base = (layer.lora_A["default"].weight, layer.lora_B["default"].weight), layer.base_layer
    grad = torch.randn(x.shape).to(low)
    lower = low != FP32 and dtypes[1] == FP32
    eager = run_layer(torch.autocast("cpu", low, enabled=autocast or lower)(model), x, pair, grad)
    slk.accelerate_peft(model)
    found = run_layer(torch.autocast("cpu", low, enabled=autocast)(model), x, pair, grad)
    ref = layer_oracle(x, base.weight, base.bias, pair, grad, layer.scaling["default"])
    check_all(found, ref, eager, low)
    assert found["Y"].dtype == (low if autocast else dtypes[0])


def test_adapters_that_do_not_fit_are_pefts_own(monkeypatch):
    """bfloat16 adapters beside float32 activations: PEFT casts the activations."""
    model, x = one_layer(FP32, BF16)
    expected = model(x)
    slk.accelerate_peft(model)
    count = calls(monkeypatch)
    assert torch.equal(model(x), expected) and not count
    with torch.autocast("cpu", BF16):
        assert model(x).dtype == BF16
    assert count == {"lora_linear": 1}
