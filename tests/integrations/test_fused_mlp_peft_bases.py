"""fuse_mlp on accelerated PEFT layers whose base is in low precision or quantized."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed (pip install .[test])")

from stablelora_kernels.testing import EPS
from tests.helpers.gated_mlps import MLP, assert_same, count_calls, rows
from tests.helpers.quantized_weights import bnb_4bit, torchao_int8
from tests.integrations.test_fused_mlp_peft import BF16, FP32, Wrapper, run, wrap

pytestmark = pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass.*", "ignore:.*4-bit linear.*")


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(autocast, calls):
    """Float32 adapters beside a bfloat16 base, as PEFT leaves a model that was loaded so; and autocast around float32."""
    dtype = FP32 if autocast else BF16
    models = []
    for fuse in (True, False):
        torch.manual_seed(0)
        models.append(wrap(Wrapper({"mlp": MLP(bias=True).to(dtype)}), fuse, FP32)[0])
    with torch.autocast("cpu", BF16, enabled=autocast):
        found, expected = (run(model, rows(dtype)) for model in models)
    assert found["y"].dtype == BF16 and calls == ["silu"]
    assert_same(found, expected, 8 * EPS[BF16])


def test_quantized_bases(backend, calls):
    """Triton's kernels read 4-bit weights. On PyTorch's operators, and in 8 bits, the base layer computes its product."""
    models = []
    for fuse in (True, False):
        torch.manual_seed(0)
        module = MLP(width=64, inner=64)
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(module, name, bnb_4bit(getattr(module, name), FP32))
        base = Wrapper({"mlp": module})
        base.is_loaded_in_4bit = True
        model, report = wrap(base, fuse, FP32)
        if fuse:
            reason = "'gate_proj' has a quantized weight, and without Triton its Linear4bit computes the product"
            assert report.mlps[0].reason == (None if backend == "triton" else reason)
        # Its first call may choose how it computes.
        with torch.no_grad():
            model(torch.randn(2, 64))
        models.append(model)
    calls.clear()
    x = torch.randn(70, 64)
    found, expected = (run(model, x.clone().requires_grad_()) for model in models)
    assert len(calls) == (1 if backend == "triton" else 0)
    assert_same(found, expected, 16 * EPS[FP32])


def test_int8_bases(calls):
    module = MLP().to(BF16)
    module.up_proj = torchao_int8(module.up_proj)
    kind = type(module.up_proj.weight).__name__
    model, report = wrap(Wrapper({"mlp": module}), dtype=FP32)
    assert report.mlps[0].reason == f"'up_proj' calls its base layer, a Linear with a {kind}, for its product"
    model(rows(BF16))
    assert calls == []
